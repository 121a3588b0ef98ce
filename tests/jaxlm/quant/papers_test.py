"""The gradients of learned scales against their papers' formulas, and nested and block codes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  LsqFormat,
  MatquantFormat,
  PactFormat,
  ParetoqFormat,
  UniformFormat,
)
from jaxlm.quant import apply, bitnet, block_formats, lsq, matquant, uniform
from pallas_kernels.common.errors import UserError


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("format", "N"))
def pull_back(x_ZD, scales, upstream_ZD, format, N):
  _, pull = jax.vjp(lambda x, s: apply.quantize(x, format, scales=s, N=N or x.size), x_ZD, scales)
  return pull(upstream_ZD)


def gradients(format, x_ZD, scales, upstream_ZD, N=None):
  dx_ZD, d_scales = jax.device_get(pull_back(x_ZD, scales, upstream_ZD, format, N))
  return dx_ZD, next(iter(d_scales.values()))


@pytest.mark.parametrize("grid, offset", [("symmetric", 0), ("midrise", 0.5), ("unsigned", 0)])
def test_lsq_steps_have_the_gradient_of_equation_3(grid, offset):
  format = LsqFormat(bits=3, grid=grid)
  low, high = (0, 7) if grid == "unsigned" else (-4, 3)
  x_ZD, dy_ZD, s = draw(16, 24), draw(16, 24, seed=1), 0.4
  v = x_ZD / np.float32(s) - offset
  inside = (low <= v) & (v <= high)
  slope = np.where(inside, np.round(v) - v, np.clip(v, low, high) + offset)
  dx_ZD, ds = gradients(format, x_ZD, {"step": jnp.float32([s])}, dy_ZD, N=100)
  np.testing.assert_array_equal(dx_ZD, dy_ZD * inside)
  np.testing.assert_allclose(ds, [(dy_ZD * slope).sum() / np.sqrt(100 * high)], rtol=1e-4)


def test_lsq_slopes_are_finite_differences_beyond_the_grid_and_steps_stay_positive():
  """Where the code does not move, dy/ds is exact: the finite difference shows it."""
  format, s, h = LsqFormat(bits=2), 0.3, 1e-3
  x_ZD = jnp.float32([[2.0, -2.0, 5.0]])
  one, two = (lsq.quantize(x_ZD, format, 1, step=jnp.float32([v])) for v in (s - h, s + h))
  want = np.asarray(two - one).sum() / (2 * h)
  _, ds = gradients(format, x_ZD, {"step": jnp.float32([s])}, np.ones((1, 3), np.float32), N=1)
  np.testing.assert_allclose(ds, [want], rtol=1e-3)
  for step in (0.0, -1.0):
    y_ZD = lsq.quantize(x_ZD, format, 1, step=jnp.float32([step]))
    assert np.isfinite(y_ZD).all() and abs(y_ZD).max() <= 2 * lsq.LEAST_STEP


PARETOQ_ENDS = {"1": (1, 1), "ternary": (0.99, 2 / 3), "2": (0.99, 3 / 4)}


@pytest.mark.parametrize("bits", ["1", "ternary", "2", "3", "4"])
def test_paretoq_scales_start_and_learn_as_the_paper_says(bits):
  format, w_ZD, dy_ZD = ParetoqFormat(bits=bits), draw(8, 32), draw(8, 32, seed=1)
  a = np.asarray(apply.init_scales(jnp.asarray(w_ZD), format)["scale"])
  top = {"3": 3, "4": 7}.get(bits, 1)
  size = np.abs(w_ZD)
  np.testing.assert_allclose(a, size.mean(1) if bits == "1" else size.max(1) / top, rtol=1e-6)
  a = (0.5 * a).astype(np.float32)  # so that some weights lie beyond the levels
  v = w_ZD / a[:, None]
  if bits in ("3", "4"):
    inside, slope = (-top - 1 <= v) & (v <= top), np.round(v) - v
    slope = np.where(inside, slope, np.clip(v, -top - 1, top))
    factor = 1 / np.sqrt(w_ZD.size * top)
  else:
    edge, end = PARETOQ_ENDS[bits]
    n, shift = {"ternary": (1.5, 0), "2": (2, 0.5)}.get(bits, (1, 0))
    level = (
      np.sign(v) if bits == "1" else (np.round(np.clip(v, -edge, edge) * n - shift) + shift) / n
    )
    inside = np.abs(v) <= edge
    slope = np.where(inside & (bits != "1"), level - v, end * np.sign(v))
    factor = 1 / np.sqrt(w_ZD.size)
  dx_ZD, da = gradients(format, w_ZD, {"scale": jnp.asarray(a)}, dy_ZD)
  np.testing.assert_array_equal(dx_ZD, dy_ZD * inside)
  np.testing.assert_allclose(da, factor * (dy_ZD * slope).sum(1), rtol=1e-4, atol=1e-6)
  assert not inside.all()


def test_paretoq_ternary_learns_by_its_level_where_the_code_takes_one():
  w_ZD, scales = np.float32([[3.0, 3.0]]), {"scale": jnp.float32([1.0])}
  ones = np.ones((1, 2), np.float32)
  mine = gradients(ParetoqFormat(bits="ternary"), w_ZD, scales, ones)[1]
  code = gradients(ParetoqFormat(bits="ternary", repo_compat=True), w_ZD, scales, ones)[1]
  np.testing.assert_allclose(mine, 2 / 3 * code, rtol=1e-6)


def test_pact_passes_gradients_inside_the_clip_and_learns_from_above():
  """The published QuEST code inverts this mask, so that nothing reaches the input."""
  format, x_ZD, dy_ZD = PactFormat(bits=2), draw(4, 8), draw(4, 8, seed=1)
  dx_ZD, da = gradients(format, x_ZD, {"clip": jnp.float32([0.9])}, dy_ZD)
  np.testing.assert_array_equal(dx_ZD, dy_ZD * ((x_ZD >= 0) & (x_ZD < 0.9)))
  np.testing.assert_allclose(da, [dy_ZD[x_ZD >= 0.9].sum()], rtol=1e-5)
  assert (dx_ZD != 0).any()
  y_ZD = apply.quantize(jnp.asarray(x_ZD), format, scales={"clip": jnp.float32([0.9])}, N=1)
  np.testing.assert_allclose(np.unique(y_ZD), [0, 0.3, 0.6, 0.9], rtol=1e-6)


def test_ternary_weights_by_the_mean_magnitude():
  w_ZD = draw(256, 256)
  y_ZD = np.asarray(bitnet.quantize(jnp.asarray(w_ZD), BitnetFormat()))
  assert np.mean(y_ZD == 0) == pytest.approx(0.310, abs=0.01)
  assert np.mean((y_ZD - w_ZD) ** 2) / np.mean(w_ZD**2) == pytest.approx(0.2634, rel=0.01)


def test_slices_nest_in_the_codes_of_8_bits():
  codes = jnp.arange(256)
  sliced = {r: np.asarray(matquant.slice_codes(codes, r)) for r in range(1, 9)}
  np.testing.assert_array_equal(sliced[8], codes)
  for r in range(1, 9):
    step = 2 ** (8 - r)
    np.testing.assert_array_equal(matquant.slice_codes(jnp.asarray(sliced[r]), r), sliced[r])
    assert (sliced[r] % step == 0).all() and sliced[r].max() == 256 - step
    clipped = codes >= 256 - step / 2
    assert (np.abs(sliced[r] - codes)[~clipped] <= step / 2).all()
  twice = np.asarray(matquant.slice_codes(jnp.asarray(sliced[4]), 2))
  different = np.flatnonzero(twice != sliced[2])
  np.testing.assert_array_equal(different, [*range(24, 32), *range(88, 96), *range(152, 160)])
  extra = matquant.slice_codes(jnp.int32([234, 53, 240, 32]), 2, extra=True)
  np.testing.assert_array_equal(extra, [256, 64, 256, 64])
  np.testing.assert_array_equal(sliced[2][[234, 53, 240, 32]], [192, 64, 192, 64])


def test_nested_weights_are_the_affine_int8_weights_at_8_bits():
  w_ZD = draw(4, 32)
  quantize = jax.jit(uniform.quantize, static_argnums=1)
  whole = quantize(w_ZD, UniformFormat(bits=8, grid="affine"))
  nested = jax.jit(matquant.quantize, static_argnums=1)(w_ZD, MatquantFormat())
  np.testing.assert_array_equal(nested, whole)


def test_elements_are_those_of_the_float_types():
  """Against ml_dtypes, ties and the largest elements included."""
  kinds = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
  }
  values = np.concatenate([draw(4000) * 3, np.arange(-64, 64) / 8, [2.5, 3.5, 5, 0.25, 0.75]])
  for name, kind in kinds.items():
    element = block_formats.ELEMENTS[name]
    clipped = np.clip(values, -element.largest, element.largest).astype(np.float32)
    bits = jax.jit(lambda x, e=element: block_formats.to_bits(x, e))(clipped)
    from_bits = jax.jit(lambda bits, e=element: block_formats.from_bits(bits, e))
    got = np.asarray(from_bits(bits))
    np.testing.assert_array_equal(got, clipped.astype(kind).astype(np.float32))
    every = np.arange(2**element.bits, dtype=np.uint8)
    real = every.view(kind).astype(np.float32)
    finite = np.isfinite(real) & (np.abs(real) <= element.largest)
    got = np.asarray(from_bits(every.astype(np.int32)))
    np.testing.assert_array_equal(got[finite], real[finite])


def test_block_formats_on_normal_values_have_the_known_errors():
  x_ZD = draw(256, 512)
  wanted = [
    (BlockFormat(), 0.01324),
    (BlockFormat(ceil_scale=True), 0.01336),
    (BlockFormat(elements="nvfp4"), 0.00905),
    (UniformFormat(bits=4, shared="group", size=32), 0.00946),
    (UniformFormat(bits=4, shared="group", size=128), 0.01383),
  ]
  for format, want in wanted:
    y_ZD = jax.jit(lambda x_ZD, format=format: apply.quantize(x_ZD, format))(x_ZD)
    assert np.mean((y_ZD - x_ZD) ** 2) == pytest.approx(want, rel=0.03), str(format)


@pytest.mark.parametrize("elements", ["mxfp4", "nvfp4"])
def test_random_rounding_is_unbiased_and_needs_a_key(elements):
  format = BlockFormat(elements=elements, stochastic=True)
  x_ZD = draw(2, 64)
  keys = jax.random.split(jax.random.key(0), 4000)
  each = jax.jit(jax.vmap(lambda k: apply.quantize(x_ZD, format, key=k)))(keys)
  mean_ZD = np.mean(each, axis=0)
  # the largest step is 2 of 6 of a block's largest value, whose deviation is at most half
  tolerance = 4 * np.abs(x_ZD).max() / 3 / np.sqrt(len(keys))
  np.testing.assert_allclose(mean_ZD, x_ZD, atol=tolerance)
  with pytest.raises(UserError, match="needs the key"):
    apply.quantize(x_ZD, format)


def test_a_largest_value_sits_on_a_tie_only_under_the_other_rule():
  """Dividing by 7.5 puts every row's largest value at 7.5 steps; dividing by 7 puts it on 7."""
  x_ZD = jnp.asarray(draw(4, 16))
  for avoids, step in ((False, 7), (True, 7.5)):
    scale = uniform.encode(x_ZD, UniformFormat(avoids_ties=avoids)).scale
    np.testing.assert_allclose(scale * step, jnp.abs(x_ZD).max(1), rtol=1e-6)
