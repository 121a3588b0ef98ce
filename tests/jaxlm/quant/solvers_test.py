"""GPTQ, AWQ and learned clipping: what they reduce to, and what they improve."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import QuantRule, QuantSpec, decoder
from jaxlm.config.formats import UniformFormat
from jaxlm.models import Transformer
from jaxlm.models.parts import list_matmuls
from jaxlm.quant import apply, awq, gptq, uniform
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

D, F = 32, 24


def draws():
  draw = np.random.default_rng(0)
  mixing = draw.normal(size=(D, D))
  x_ZD = (draw.normal(size=(256, D)) @ mixing).astype(np.float32)
  return jnp.asarray(draw.normal(size=(F, D)), jnp.float32), jnp.asarray(x_ZD)


FORMATS = [
  UniformFormat(bits=4),
  UniformFormat(bits=3, grid="affine"),
  UniformFormat(bits=4, shared="group", size=8),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq_rounds_to_the_nearest_under_an_identity_and_lowers_the_outputs_error(format):
  w_FD, x_ZD = draws()
  same = gptq.solve(w_FD, 3 * jnp.eye(D), format)
  nearest = uniform.encode(w_FD, format)
  np.testing.assert_array_equal(same.codes, nearest.codes)
  np.testing.assert_allclose(same.scale, nearest.scale, rtol=1e-6)
  solved = gptq.solve(w_FD, gptq.hessian(x_ZD), format)
  errors = [
    float(jnp.linalg.norm(x_ZD @ (uniform.decode(e, format) - w_FD).T)) for e in (solved, nearest)
  ]
  assert errors[0] < 0.8 * errors[1]


def test_gptq_takes_a_groups_scale_after_the_updates_of_the_columns_before():
  """With the scale of the weights before, the last codes would not reach the ends of the grid."""
  w_FD, x_ZD = draws()
  format = UniformFormat(bits=4, shared="group", size=8)
  solved = gptq.solve(w_FD, gptq.hessian(x_ZD), format)
  stale = uniform.encode(w_FD, format).scale
  np.testing.assert_allclose(solved.scale[:, 0], stale[:, 0], rtol=1e-5)
  assert float(jnp.abs(solved.scale[:, 1:] / stale[:, 1:] - 1).max()) > 0.05


def test_awq_scales_protect_the_channels_that_are_active():
  w_FD, x_ZD = draws()
  x_ZD = x_ZD.at[:, 5].mul(50.0)
  format = UniformFormat(bits=3)
  s_D = awq.find_scales(w_FD, jnp.mean(jnp.abs(x_ZD), axis=0), format)
  assert s_D[5] == s_D.max() and float(s_D.max() * s_D.min()) == pytest.approx(1, rel=1e-4)
  exact = x_ZD @ w_FD.T
  scaled = (x_ZD / s_D[None]) @ apply.quantize(w_FD * s_D[None], format).T
  plain = x_ZD @ apply.quantize(w_FD, format).T
  assert jnp.linalg.norm(scaled - exact) < 0.7 * jnp.linalg.norm(plain - exact)


def test_scaled_channels_change_no_logits():
  """Of all matmuls that share an input, with two query heads for each key head."""
  rule = QuantRule(match=".*", spec=QuantSpec(weight=UniformFormat(bits=3)))
  config = decoder(V=16, D=16, F=24, N=4, K=2, H=4, layers=2, qkv_bias=True, norm_offset=1)
  params = Transformer(config).init(jax.random.key(0))
  draw = np.random.default_rng(0)
  shapes = {name: m.shape[0] for m in list_matmuls(config) for name in m.names}
  activity = {name: draw.lognormal(size=D).astype(np.float32) for name, D in shapes.items()}
  scale = functools.partial(awq.scale_channels, dataclasses.replace(config, quant=(rule,)))
  params, scaled = jax.device_get((params, jax.jit(scale)(params, activity)))
  logits = jax.jit(lambda params: Transformer(config).apply(params, np.arange(5)[None]))
  chex.assert_trees_all_close(logits(scaled), logits(params), atol=2e-5)
  for before, after in zip(jax.tree.leaves(params["stacks"]), jax.tree.leaves(scaled["stacks"])):
    assert before.ndim == 2 or np.abs(after / before - 1).max() > 0.1

  other = (dataclasses.replace(rule, match=".*[.]q"),)
  with pytest.raises(UserError, match="layers.0.mixer.q, layers.0.mixer.k"):
    awq.scale_channels(dataclasses.replace(config, quant=other), params, activity)
  rotated = (QuantRule(match=".*", spec=QuantSpec(weight=UniformFormat(), hadamard=16)),)
  with pytest.raises(UserError, match="neither learned nor rotated"):
    awq.scale_channels(dataclasses.replace(config, quant=rotated), params, activity)


def test_learned_clipping_lowers_the_error_from_where_it_starts():
  w_FD, x_ZD = draws()
  w_FD = w_FD.at[:, 3].mul(4.0)
  high, low = awq.learn_clipping(w_FD, x_ZD, 2, steps=50, rate=0.05)
  start = jnp.full(F, 4.0)
  errors = [
    float(jnp.linalg.norm(x_ZD @ (awq.clipped_affine(w_FD, *bounds, 2) - w_FD).T))
    for bounds in ((high, low), (start, start))
  ]
  assert errors[0] < 0.9 * errors[1]
  rounded_FD = awq.clipped_affine(w_FD, high, low, 2)
  assert len(np.unique(np.asarray(rounded_FD)[0].round(5))) <= 4
  codes = awq.encode_clipped(w_FD, high, low, 2)
  decoded_FD = uniform.decode(codes, UniformFormat(bits=2, grid="affine"))
  np.testing.assert_allclose(decoded_FD, rounded_FD, atol=1e-5)
