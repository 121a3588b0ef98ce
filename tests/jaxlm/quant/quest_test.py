"""QuEST: its optimal clips, the share of values it trusts, its gradient, and what the code has."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.formats import QuestFormat
from jaxlm.quant import quest

# levels: (mean square error on N(0, 1), masked share), computed for the paper's definitions
TABLE = {
  "int1": (0.363380, 0.2996),
  "ternary": (0.190174, 0.0664),
  "int2": (0.118846, 0.0464),
  "int3": (0.0374397, 0.0191),
  "int4": (0.0115429, 0.00733),
  "int5": (0.00349521, 0.00261),
  "int6": (0.00104005, 0.000868),
  "int7": (0.000304333, 0.000273),
  "int8": (0.0000876862, 0.0000823),
  "fp4": (0.0126849, None),
}
OUTPUT_ERROR = {"int8": 0.0130, "int4": 0.152, "int3": 0.271, "int2": 0.473, "int1": 0.773}


@functools.cache
def normal():
  return np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def value_and_mask(x_ZD, format):
  """Returns the rounded values and, from the gradient, the mask; both in the rotated space."""
  y_ZD, pull = jax.vjp(lambda x: quest.quantize_rotated(x, format), x_ZD)
  # with the rotation the gradient is (ones M) H: rotating it back shows M
  return y_ZD, quest.rotate(pull(jnp.ones_like(x_ZD))[0], format)


@pytest.mark.parametrize("levels", TABLE)
def test_error_and_masked_share_on_normal_values_are_those_of_the_table(levels):
  error, share = TABLE[levels]
  format = QuestFormat(levels=levels)
  rotated_ZD = quest.rotate(normal(), format)
  y_ZD, mask_ZD = value_and_mask(normal(), format)
  assert float(jnp.mean(jnp.square(y_ZD - rotated_ZD))) == pytest.approx(error, rel=0.02)
  masked = 1 - float(jnp.mean(mask_ZD))
  if share is not None:
    assert abs(masked - share) < 3 * math.sqrt(share / normal().size) + 0.005 * share


@pytest.mark.parametrize("levels", [name for name in quest.BEST_CLIP])
def test_no_other_clip_has_a_smaller_error(levels):
  """By integration over the density, for the default constants; the code's 8 bits are beaten."""
  x = np.linspace(-9, 9, 200_001)
  density = np.exp(-(x**2) / 2)
  count = 3 if levels == "ternary" else 2 ** int(levels[3:])

  def error(clip):
    step = 2 * clip / (count - 1)
    offset = (count - 1) / 2
    codes = np.clip(np.round(x / step + offset), 0, count - 1) - offset
    return float(((codes * step - x) ** 2 * density).sum())

  best = quest.BEST_CLIP[levels]
  assert error(best) <= min(error(best * 0.995), error(best * 1.005))
  assert error(best) < error(quest.REPO_CLIP[levels]) * (1 + 1e-7)
  if levels == "int8":
    assert error(quest.REPO_CLIP[levels]) > 1.001 * error(best)


def test_scaling_the_input_scales_the_output_and_moves_no_mask():
  x_ZD = normal()[:32]
  for levels in ("int1", "int4", "fp4"):
    format = QuestFormat(levels=levels)
    y_ZD, mask_ZD = value_and_mask(x_ZD, format)
    scaled_ZD, same_ZD = value_and_mask(4 * x_ZD, format)  # a power of two, so exactly
    np.testing.assert_allclose(scaled_ZD, 4 * y_ZD, rtol=1e-6)
    np.testing.assert_allclose(same_ZD, mask_ZD, atol=1e-5)


@pytest.mark.parametrize("levels", OUTPUT_ERROR)
def test_the_error_of_a_product(levels):
  """sqrt(2m - m^2) for the error m of one operand, and a product shrunk by (1 - m)^2."""
  format = QuestFormat(levels=levels)
  x_ZD, w_ZD = normal()[:256], normal()[256:]
  y_ZZ = quest.quantize_rotated(x_ZD, format) @ quest.quantize_rotated(w_ZD, format).T
  exact_ZZ = x_ZD @ w_ZD.T
  error = float(jnp.linalg.norm(y_ZZ - exact_ZZ) / jnp.linalg.norm(exact_ZZ))
  m = TABLE[levels][0]
  assert error == pytest.approx(OUTPUT_ERROR[levels], rel=0.03)
  assert error == pytest.approx(math.sqrt(2 * m - m**2), rel=0.03)
  shrunk = float(jnp.sum(y_ZZ * exact_ZZ) / jnp.sum(exact_ZZ**2))
  assert shrunk == pytest.approx((1 - m) ** 2, abs=0.02)


def test_gradients_are_masked_in_the_rotated_space():
  """The upstream gradient where the mask is one; not zero at any place after rotating back."""
  format = QuestFormat(levels="int2", hadamard=64)
  x_ZD, upstream_ZD = normal()[:16, :64], normal()[16:32, :64]
  _, mask_ZD = value_and_mask(x_ZD, format)
  _, pull = jax.vjp(lambda x: quest.quantize(x, format), x_ZD)
  (dx_ZD,) = pull(upstream_ZD)
  want_ZD = quest.rotate(jnp.round(mask_ZD) * quest.rotate(upstream_ZD, format), format)
  np.testing.assert_allclose(dx_ZD, want_ZD, atol=1e-5)
  assert (np.round(mask_ZD) == 0).any() and (dx_ZD != 0).all()


def test_pruned_pairs_are_zero_and_trusted_only_where_small():
  format = QuestFormat(levels="int4", hadamard=0, sparse=True)
  x_ZD = normal()
  y_ZD, mask_ZD = value_and_mask(x_ZD, format)
  pairs = np.asarray(y_ZD).reshape(512, -1, 4, 2)
  assert ((pairs != 0).all(-1).sum(-1) == 2).all()
  keep_ZD = np.asarray(quest.keep_pairs(x_ZD))
  assert float((x_ZD[keep_ZD] ** 2).sum() / (x_ZD**2).sum()) == pytest.approx(0.792, abs=0.003)
  root_Z1 = np.sqrt((x_ZD**2).mean(-1, keepdims=True))
  trust_Z1 = quest.BEST_CLIP["int4"] * root_Z1 / 15
  pruned = ~keep_ZD & (np.abs(np.abs(x_ZD) - trust_Z1) > 1e-4)
  np.testing.assert_array_equal((mask_ZD == 1)[pruned], (np.abs(x_ZD) < trust_Z1)[pruned])


def test_what_the_published_code_does_otherwise():
  """FP4 trusts within 0.4871 and not 0.3186, and the rotation is orthogonal to float32."""
  x_ZD = normal()
  shares = [
    float(jnp.mean(value_and_mask(x_ZD, QuestFormat(levels="fp4", repo_compat=c))[1]))
    for c in (False, True)
  ]
  assert shares[0] > 0.999 > 0.99 > shares[1]
  format = QuestFormat()
  back_ZD = quest.rotate(quest.rotate(x_ZD, format), format)
  np.testing.assert_allclose(
    back_ZD, x_ZD, rtol=2e-6, atol=2e-6
  )  # the code's bfloat16 matrix: 2e-4
