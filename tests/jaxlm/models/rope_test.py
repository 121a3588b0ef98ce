"""Rotary embedding: frequencies against formulas in float64, rotations by their properties."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import RopeConfig
from jaxlm.models.rope import apply_rope, frequencies, rope_tables
from pallas_kernels.common.errors import UserError

SCALED = [
  RopeConfig(),
  RopeConfig(scaling="linear", factor=4.0),
  RopeConfig(scaling="ntk", factor=8.0),
  RopeConfig(scaling="dynamic", factor=2.0, original_length=32),
  RopeConfig(scaling="yarn", factor=4.0, original_length=32),
  RopeConfig(scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
  RopeConfig(scaling="yarn", factor=16.0, original_length=4096, truncate=False),
  RopeConfig(scaling="llama3", factor=4.0, original_length=32, theta=1e5),
  RopeConfig(scaling="llama3", factor=8.0, original_length=8192, theta=5e5),
]


def expected_frequency(rope, j, width, length):
  """Returns one pair's frequency, with branches where the code under test has arrays and clips."""
  f = 1.0 / math.pow(rope.theta, 2 * j / width)
  s, original = rope.factor, rope.original_length
  if rope.scaling == "linear":
    return f / s
  if rope.scaling in ("ntk", "dynamic"):
    grown = s if rope.scaling == "ntk" else s * max(length, original) / original - (s - 1)
    return 1.0 / math.pow(rope.theta * grown ** (width / (width - 2)), 2 * j / width)
  if rope.scaling == "yarn":
    # pair d has wavelength 2 pi theta^(2 d / width); at the border it is original / rotations
    pairs = width / 2 / math.log(rope.theta)
    low = pairs * math.log(original / (2 * math.pi * rope.beta_fast))
    high = pairs * math.log(original / (2 * math.pi * rope.beta_slow))
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if j <= low:
      return f
    if j >= high:
      return f / s
    gamma = (high - j) / (high - low)
    return gamma * f + (1 - gamma) * f / s
  if rope.scaling == "llama3":
    wavelength = 2 * math.pi / f
    if wavelength < original / rope.high_freq_factor:
      return f
    if wavelength > original / rope.low_freq_factor:
      return f / s
    smooth = (original / wavelength - rope.low_freq_factor) / (
      rope.high_freq_factor - rope.low_freq_factor
    )
    return (1 - smooth) * f / s + smooth * f
  return f


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("rope", SCALED, ids=lambda rope: f"{rope.scaling}-{rope.factor:g}")
def test_frequencies_match_the_formula_in_float64(rope, width):
  f_R, _ = frequencies(rope, width, 80)
  want = [expected_frequency(rope, j, width, 80) for j in range(width // 2)]
  chex.assert_type(f_R, jnp.float32)
  np.testing.assert_allclose(f_R, want, rtol=2e-6)


@pytest.mark.parametrize(
  "factor, anchor", [(4.0, 1.13863), (16.0, 1.27726), (32.0, 1.34657), (1.0, 1.0)]
)
def test_yarn_attention_factor(factor, anchor):
  rope = RopeConfig(scaling="yarn", factor=factor)
  assert frequencies(rope, 64, 1)[1] == pytest.approx(anchor, abs=5e-6)
  cos, sin = rope_tables(rope, jnp.arange(5)[None], 64, 1)
  np.testing.assert_allclose(jnp.hypot(cos, sin), anchor, atol=5e-6)


def test_yarn_attention_factor_of_deepseek_and_by_hand():
  both = RopeConfig(scaling="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707)
  assert frequencies(both, 64, 1)[1] == 1.0
  differ = RopeConfig(scaling="yarn", factor=math.e, mscale=2.0, mscale_all_dim=1.0)
  assert frequencies(differ, 64, 1)[1] == pytest.approx(1.2 / 1.1)
  given = RopeConfig(
    scaling="yarn", factor=4.0, mscale=2.0, mscale_all_dim=1.0, attention_factor=0.5
  )
  assert frequencies(given, 64, 1)[1] == 0.5


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
  plain, scaled = (
    np.asarray(frequencies(RopeConfig(scaling=kind, factor=16.0), 128, 1)[0])
    for kind in ("none", "yarn")
  )
  # Llama 2's settings: borders at pairs 20.9 -> 20 and 45.03 -> 46.
  np.testing.assert_array_equal(scaled[:21], plain[:21])
  np.testing.assert_allclose(scaled[46:], plain[46:] / 16, rtol=1e-6)
  assert np.all((scaled[21:46] < plain[21:46]) & (scaled[21:46] > plain[21:46] / 16))


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_factor():
  plain, scaled = (
    np.asarray(frequencies(RopeConfig(scaling=kind, factor=8.0), 64, 1)[0])
    for kind in ("none", "ntk")
  )
  assert scaled[0] == plain[0]
  np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)


def test_dynamic_is_plain_up_to_the_original_length_and_ntk_like_beyond():
  rope = RopeConfig(scaling="dynamic", factor=2.0, original_length=32)
  plain, _ = frequencies(RopeConfig(), 16, 1)
  at = jax.jit(lambda length: frequencies(rope, 16, length)[0])
  for length in (1, 31, 32):
    np.testing.assert_array_equal(at(jnp.int32(length)), plain)
    np.testing.assert_array_equal(frequencies(rope, 16, length)[0], plain)
  assert np.all(at(jnp.int32(33))[1:] < plain[1:])
  same_stretch, _ = frequencies(RopeConfig(scaling="ntk", factor=3.0), 16, 1)
  np.testing.assert_allclose(at(jnp.int32(64)), same_stretch, rtol=1e-6)


def test_each_row_of_a_batch_may_have_a_length_of_its_own():
  rope = RopeConfig(scaling="dynamic", factor=2.0, original_length=32)
  lengths = (5, 40, 64)
  f_BR, _ = jax.jit(lambda length_B: frequencies(rope, 16, length_B))(jnp.array(lengths))
  tables = rope_tables(rope, jnp.arange(6)[None], 16, jnp.array(lengths)[:, None])
  for row, length in enumerate(lengths):
    chex.assert_trees_all_close(f_BR[row], frequencies(rope, 16, length)[0], rtol=1e-6)
    alone = rope_tables(rope, jnp.arange(6)[None], 16, length)
    chex.assert_trees_all_close([table[row] for table in tables], [table[0] for table in alone])


def random_heads(seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 6, 3, 16)))


def rotate(x_BTNH, positions_BT):
  return apply_rope(x_BTNH, *rope_tables(RopeConfig(), positions_BT, x_BTNH.shape[-1], 1))


class Rotations(chex.TestCase):
  """Properties that define the rotation, compiled and not."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_products_depend_on_the_distance_alone(self):
    turn = self.variant(rotate)
    q_BTNH, k_BTNH = random_heads(0), random_heads(1)
    positions_BT = jnp.array([[0, 1, 5, 17, 40, 41], [3, 2, 9, 1, 0, 77]])

    def products(shift):
      q_turned, k_turned = turn(q_BTNH, positions_BT + shift), turn(k_BTNH, positions_BT + shift)
      return jnp.einsum("btnh,bsnh->bnts", q_turned, k_turned)

    chex.assert_trees_all_close(products(0), products(100), atol=1e-4)
    unturned = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH)
    assert np.abs(products(0) - unturned).max() > 1

  @chex.variants(with_jit=True, without_jit=True)
  def test_pairs_turn_as_complex_numbers(self):
    x_BTNH = random_heads(2)
    positions_BT = jnp.array([[0, 1, 2, 3, 4, 5], [7, 7, 0, 2, 9, 30]])
    angles_BTR = np.asarray(positions_BT)[..., None] * 10_000.0 ** (-2 * np.arange(8) / 16)
    z = np.asarray(x_BTNH[..., :8]) + 1j * np.asarray(x_BTNH[..., 8:])
    z = z * np.exp(1j * angles_BTR)[:, :, None]
    y_BTNH = self.variant(rotate)(x_BTNH, positions_BT)
    np.testing.assert_allclose(y_BTNH, np.concatenate([z.real, z.imag], -1), atol=2e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_norms_are_kept_and_position_zero_changes_nothing(self):
    x_BTNH = random_heads(3)
    y_BTNH = self.variant(rotate)(x_BTNH, jnp.array([[0, 1, 10, 100, 1000, 30_000]] * 2))
    chex.assert_equal_shape((x_BTNH, y_BTNH))
    norms = [jnp.linalg.norm(array, axis=-1) for array in (x_BTNH, y_BTNH)]
    chex.assert_trees_all_close(*norms, rtol=1e-5)
    chex.assert_trees_all_equal(y_BTNH[:, 0], x_BTNH[:, 0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_shared_positions_and_bfloat16(self):
    turn, x_BTNH = self.variant(rotate), random_heads(4)
    shared_BT = jnp.arange(6)[None]
    chex.assert_trees_all_equal(turn(x_BTNH, shared_BT), turn(x_BTNH, jnp.tile(shared_BT, (2, 1))))
    low_BTNH = x_BTNH.astype(jnp.bfloat16)
    exact_BTNH = turn(low_BTNH.astype(jnp.float32), shared_BT)
    # one rounding, at the end
    chex.assert_trees_all_equal(turn(low_BTNH, shared_BT), exact_BTNH.astype(jnp.bfloat16))

  @chex.variants(with_jit=True, without_jit=True)
  def test_tables_have_the_shape_of_positions_and_pairs(self):
    tables = self.variant(lambda positions_BT: rope_tables(RopeConfig(), positions_BT, 16, 1))
    cos_BTR, sin_BTR = tables(jnp.arange(6)[None])
    chex.assert_shape((cos_BTR, sin_BTR), (1, 6, 8))
    chex.assert_type((cos_BTR, sin_BTR), jnp.float32)


def test_the_gradient_is_that_of_the_turning_matrix():
  """With an attention factor other than 1, so that the transpose is not the inverse."""
  x_BTNH, dy_BTNH = random_heads(5), random_heads(6)
  rope = RopeConfig(scaling="yarn", factor=4.0, original_length=32)
  angles = rope_tables(rope, jnp.array([[0, 1, 5, 9, 40, 41]]), 16, 1)
  _, transpose = jax.vjp(lambda x_BTNH: apply_rope(x_BTNH, *angles), x_BTNH)
  tangent_BTNH = random_heads(7)
  np.testing.assert_allclose(
    jnp.vdot(transpose(dy_BTNH)[0], tangent_BTNH),
    jnp.vdot(dy_BTNH, apply_rope(tangent_BTNH, *angles)),
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  "rope, width, message",
  [
    (RopeConfig(), 15, "width=15: .*even"),
    (RopeConfig(), 0, "width=0"),
    (RopeConfig(scaling="ntk", factor=2.0), 2, "width=2: ntk .*above 2"),
    (
      RopeConfig(scaling="yarn", factor=2.0, beta_fast=1.0, beta_slow=32.0),
      64,
      "beta_fast=1.0: .*backwards",
    ),
    (RopeConfig(scaling="yarn", factor=2.0, original_length=2), 64, "original_length=2"),
  ],
)
def test_bad_widths_and_borders_are_named(rope, width, message):
  with pytest.raises(ValueError, match=message):
    frequencies(rope, width, 1)


def tables():
  return rope_tables(RopeConfig(), jnp.arange(6)[None], 16, 1)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: rope_tables(RopeConfig(), jnp.arange(6), 16, 1), r"positions_BT.shape=\(6,\): must"),
    (
      lambda: rope_tables(RopeConfig(scaling="dynamic"), jnp.arange(6)[None], 16),
      "length=None: dynamic scaling goes by",
    ),
    (lambda: rope_tables(RopeConfig(), jnp.ones((1, 6)), 16, 1), "positions_BT.dtype='float32'"),
    (lambda: apply_rope(random_heads(0)[0], *tables()), r"x_BTNH.shape=\(6, 3, 16\): must"),
    (lambda: apply_rope(random_heads(0)[..., :8], *tables()), r"x_BTNH.shape=\(2, 6, 3, 8\): must"),
    (lambda: apply_rope(random_heads(0)[:, :1], *tables()), r"x_BTNH.shape=\(2, 1, 3, 16\): must"),
    (
      lambda: apply_rope(random_heads(0), tables()[0], tables()[1][:, :1]),
      r"sin_BTR.shape=\(1, 1, 8",
    ),
  ],
)
def test_arrays_that_do_not_fit_are_named(call, message):
  """Broadcasting would take some of them without a word."""
  with pytest.raises(UserError, match=message):
    call()
