"""Planted outliers leave the function as it is, and what would change it is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import outliers
from jaxlm.config import decoder
from jaxlm.models import Transformer
from pallas_kernels.common.errors import UnsupportedError, UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MODEL = decoder(V=32, D=16, F=64, N=4, K=2, H=4, layers=2, qkv_bias=True)
IDS_BT = np.arange(24, dtype=np.int32).reshape(2, 12)


@functools.cache
def drawn():
  draw = np.random.default_rng(0)
  shapes = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0))
  return jax.tree.map(lambda w: jnp.asarray(0.3 * draw.normal(size=w.shape), jnp.float32), shapes)


def test_channels_grow_and_what_they_meet_shrinks_exactly():
  block, scaled = (
    params["stacks"]["0"]["0"] for params in (drawn(), outliers.scale_channels(MODEL, drawn(), 32))
  )
  up, down = (scaled["feedforward"][name]["weight"] for name in ("up", "down"))
  plain_up, plain_down = (block["feedforward"][name]["weight"] for name in ("up", "down"))
  np.testing.assert_array_equal(up[..., ::32], 32 * plain_up[..., ::32])
  np.testing.assert_array_equal(up[..., 1:32], plain_up[..., 1:32])
  np.testing.assert_array_equal(up[:, 0, :, None] * down, plain_up[:, 0, :, None] * plain_down)
  mixer = scaled["mixer"]
  R, D, H, G = 2, MODEL.D, 4, 2
  for name, channels in (("v", [0]), ("k", [1, 3])):
    large = np.abs(mixer[name]["weight"] / block["mixer"][name]["weight"])
    want = np.ones((R, D, 2, H))
    want[..., channels] = 32
    np.testing.assert_allclose(large.reshape(want.shape), want, rtol=1e-6)
  heads = (mixer["o"]["weight"] / block["mixer"]["o"]["weight"]).reshape(R, 2, G, H, D)
  np.testing.assert_allclose(heads[:, :, :, 0] * 32, 1, rtol=1e-6)  # all heads of its key head
  np.testing.assert_allclose(mixer["v"]["bias"][:, ::4] / block["mixer"]["v"]["bias"][:, ::4], 32)


def test_another_function_is_refused(monkeypatch):
  monkeypatch.setattr(outliers, "_logits", lambda config, logits, ids_BT: logits)
  before = np.array([[2.0, -4.0]])
  assert outliers.check_same_logits((MODEL, before), (MODEL, before + 2e-5), IDS_BT) < 6e-6
  with pytest.raises(UserError, match="logits='2.5e-05': must be at most 1e-05 of the largest"):
    outliers.check_same_logits((MODEL, before), (MODEL, before + 1e-4), IDS_BT)
  with pytest.raises(UnsupportedError, match="norms of its heads"):
    outliers.scale_channels(decoder(V=32, D=16, layers=2, qk_norm=True), drawn(), 32)


@pytest.mark.slow
def test_a_planted_model_has_tails_and_the_same_logits():
  config, planted = outliers.plant_outliers(MODEL, drawn(), jnp.asarray(IDS_BT))
  logits = [
    jax.jit(Transformer(c).apply)(p, IDS_BT) for c, p in ((MODEL, drawn()), (config, planted))
  ]
  np.testing.assert_allclose(*logits, atol=1e-5 * float(jnp.abs(logits[0]).max()))
  axes_DD = outliers.principal_axes(config, planted, jnp.asarray(IDS_BT))
  np.testing.assert_allclose(np.abs(axes_DD), np.eye(16), atol=2e-2)  # it stands on them already


@pytest.mark.slow
def test_a_planting_that_changes_the_function_stops(monkeypatch):
  monkeypatch.setattr(outliers, "_scale_inputs", lambda linear, factor_Z: None)
  with pytest.raises(UserError, match="must be at most 1e-05"):
    outliers.plant_outliers(MODEL, drawn(), jnp.asarray(IDS_BT))
