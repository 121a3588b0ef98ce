"""What every format promises: few levels, the same in all transformations, finite at zero."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  Fp8Format,
  LsqFormat,
  MatquantFormat,
  PactFormat,
  ParetoqFormat,
  QuestFormat,
  SparseFormat,
  UniformFormat,
)
from jaxlm.quant import apply, packing, turning
from jaxlm.quant.groups import split
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

PARETOQ_LEVELS = {"1": 2, "ternary": 3, "2": 4, "3": 8, "4": 16}
COUNTED = [
  *((UniformFormat(bits=b), 2**b) for b in (2, 3, 4, 8)),
  *((UniformFormat(bits=b, grid="midrise", ratio=0.8), 2**b) for b in (1, 2, 4)),
  (UniformFormat(bits=3, grid="affine"), 8),
  (UniformFormat(bits=4, shared="group", size=8), 16),
  (UniformFormat(bits=4, shared="block", size=4, avoids_ties=True), 16),
  (UniformFormat(bits=4, shared="tensor", clips_gradient=True, ratio=0.5), 16),
  *((LsqFormat(bits=b), 2**b) for b in (2, 4)),
  (LsqFormat(bits=1, grid="midrise", start="gaussian"), 2),
  (LsqFormat(bits=3, grid="midrise", shared="row"), 8),
  (LsqFormat(bits=3, grid="unsigned"), 8),
  (PactFormat(bits=3, start=1.5), 8),
  (BitnetFormat(), 3),
  *((ParetoqFormat(bits=b), n) for b, n in PARETOQ_LEVELS.items()),
  *((QuestFormat(levels=f"int{b}", hadamard=0), 2**b) for b in (1, 2, 4, 8)),
  (QuestFormat(levels="ternary", hadamard=8), 3),
  (QuestFormat(levels="fp4", hadamard=32), 15),
  (QuestFormat(levels="int4", hadamard=0, sparse=True), 17),
  (QuestFormat(levels="int6", hadamard=16, repo_compat=True), 64),
  *((MatquantFormat(bits=r), 2**r) for r in (2, 4, 8)),
  (MatquantFormat(bits=2, extra=True), 5),
  *((BlockFormat(elements=e), 16) for e in ("mxfp4", "nvfp4")),
  (BlockFormat(elements="mxfp4", shared="block", ceil_scale=True), 16),
  *((BlockFormat(elements=e), 64) for e in ("mxfp6_e2m3", "mxfp6_e3m2")),
  *((BlockFormat(elements=e), 256) for e in ("mxfp8_e4m3", "mxfp8_e5m2")),
  (Fp8Format(size=16), 255),
  (Fp8Format(elements="e5m2", shared="tensor"), 256),
]
CASES = [case for case, _ in COUNTED]
ALIKE = {
  *(UniformFormat(bits=b) for b in (3, 8)),
  *(UniformFormat(bits=b, grid="midrise", ratio=0.8) for b in (1, 4)),
  LsqFormat(bits=4),
  LsqFormat(bits=3, grid="midrise", shared="row"),
  *(ParetoqFormat(bits=b) for b in ("3", "4")),
  *(QuestFormat(levels=f"int{b}", hadamard=0) for b in (2, 8)),
  *(MatquantFormat(bits=r) for r in (4, 8)),
  *(BlockFormat(elements=e) for e in ("mxfp6_e3m2", "mxfp8_e5m2")),
  Fp8Format(elements="e5m2", shared="tensor"),
}
"""formats that differ from others by numbers alone: slow, as each is a program of its own"""


def marked(cases):
  rows = [case if isinstance(case, tuple) else (case,) for case in cases]
  return [pytest.param(*row, marks=pytest.mark.slow if row[0] in ALIKE else ()) for row in rows]


SHAPE = (32, 64)
SAMPLE_ZD = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
STRAIGHT_ALONG_X = [
  case for case in CASES if not (isinstance(case, QuestFormat) and (case.hadamard or case.sparse))
]
"""formats that round each value by itself, given the scales"""
NEAREST = [
  case
  for case in STRAIGHT_ALONG_X
  if packing.code_range(case).levels <= 16
  and not (
    isinstance(case, MatquantFormat) or (isinstance(case, ParetoqFormat) and case.bits == "1")
  )
]


@functools.cache
def outcome(format):
  """Returns the input and everything that one compiled program computes of it."""
  draw = np.random.default_rng(0)
  x_ZD = draw.standard_t(4, SHAPE).astype(np.float32)
  x_ZD[3] = 0
  upstream_ZD = draw.normal(size=SHAPE).astype(np.float32)
  module = apply.FORMATS[type(format)]
  init_scales = jax.jit(apply.init_scales, static_argnums=1)
  scales = init_scales(x_ZD, format) if apply.learned_names(format) else {}

  def run(x_ZD, scales):
    return apply.quantize(x_ZD, format, scales=scales, N=x_ZD.size)

  @jax.jit
  def everything(x_ZD, scales):
    y_ZD, pull = jax.vjp(run, x_ZD, scales)
    encoded = module.encode(x_ZD, format, **scales)
    both = jnp.stack([x_ZD, 0.5 * x_ZD])
    out = {
      "y": y_ZD,
      "grads": pull(upstream_ZD),
      "encoded": encoded,
      "decoded": module.decode(encoded, format),
      "mapped": jax.vmap(run, (0, None))(both, scales),
      "half": run(0.5 * x_ZD, scales),
      "negated": run(-x_ZD, scales),
      "bfloat16": run(x_ZD.astype(jnp.bfloat16), scales),
    }
    if format in NEAREST:
      codes = packing.code_range(format)
      every = jnp.arange(codes.levels, dtype=jnp.int32) + codes.lowest
      fill = lambda code: encoded._replace(codes=jnp.full(SHAPE, code))  # noqa: E731
      out["levels"] = jax.vmap(lambda code: module.decode(fill(code), format))(every)
    if isinstance(format, QuestFormat):
      out["decoded"] = module.rotate(out["decoded"], format)
    return out

  return x_ZD, upstream_ZD, jax.device_get(everything(x_ZD, scales))


@pytest.mark.parametrize("format, most", marked(COUNTED), ids=str)
def test_codes_are_few_and_decode_to_what_is_computed(format, most):
  x_ZD, _, out = outcome(format)
  chex.assert_trees_all_close(out["decoded"], out["y"], atol=2e-6)
  codes_split, axes = split(jnp.asarray(out["encoded"].codes), format.shared, format.size)
  rows = np.moveaxis(np.asarray(codes_split), axes, range(len(axes)))
  rows = rows.reshape(np.prod(rows.shape[: len(axes)]), -1).T
  assert max(len(np.unique(row)) for row in rows) <= most


@pytest.mark.parametrize("format", marked(CASES), ids=str)
def test_it_is_the_same_under_vmap_in_bfloat16_and_at_zero(format):
  x_ZD, _, out = outcome(format)
  chex.assert_tree_all_finite(out)
  chex.assert_trees_all_close(out["mapped"], np.stack([out["y"], out["half"]]), atol=1e-6)
  assert out["bfloat16"].dtype == jnp.bfloat16
  error = np.linalg.norm(out["y"] - x_ZD) / np.linalg.norm(x_ZD)
  rounded = np.linalg.norm(out["bfloat16"].astype(np.float32) - x_ZD) / np.linalg.norm(x_ZD)
  assert rounded <= error + 0.02
  if not isinstance(format, LsqFormat | PactFormat | ParetoqFormat):  # these scales are learned
    assert np.abs(out["y"][3]).max() <= (1e-7 if format.shared == "row" else np.abs(out["y"]).max())


STRAIGHT = [
  case
  for case in CASES
  if isinstance(case, BitnetFormat | MatquantFormat | BlockFormat | Fp8Format)
  or (isinstance(case, UniformFormat) and not case.clips_gradient)
]


@pytest.mark.parametrize("format", marked(STRAIGHT), ids=str)
def test_the_straight_through_gradient_is_the_upstream_one(format):
  _, upstream_ZD, out = outcome(format)
  np.testing.assert_array_equal(out["grads"][0], upstream_ZD)


GRIDS = [
  case
  for case in CASES
  if isinstance(case, UniformFormat | LsqFormat)
  or (isinstance(case, QuestFormat) and case.hadamard == 0 and not case.sparse)
]


@pytest.mark.parametrize("format", marked(GRIDS), ids=str)
def test_errors_within_the_grid_are_half_a_step_and_the_gradient_ends_where_it_ends(format):
  x_ZD, upstream_ZD, out = outcome(format)
  module = apply.FORMATS[type(format)]
  one = out["encoded"]._replace(codes=np.ones(SHAPE, np.int32))
  two = one._replace(codes=np.full(SHAPE, 2, np.int32))
  step_ZD = np.abs(np.asarray(module.decode(two, format)) - np.asarray(module.decode(one, format)))
  codes = out["encoded"].codes
  inner_ZD = (codes > codes.min()) & (codes < codes.max())
  assert (np.abs(out["y"] - x_ZD)[inner_ZD] <= step_ZD[inner_ZD] / 2 * (1 + 1e-5)).all()
  dx_ZD = out["grads"][0]
  assert (dx_ZD[inner_ZD] == upstream_ZD[inner_ZD]).all()
  assert ((dx_ZD == upstream_ZD) | (dx_ZD == 0)).all()
  clips = isinstance(format, LsqFormat | QuestFormat) or format.clips_gradient
  assert (dx_ZD == 0).any() == bool(clips)


@pytest.mark.parametrize("format", marked(NEAREST), ids=str)
def test_values_become_the_nearest_level_so_that_rounding_again_under_the_same_scale_does_nothing(
  format,
):
  x_ZD, _, out = outcome(format)
  levels_LZD = out["levels"]
  if isinstance(format, BlockFormat):  # codes count from 0 up, and then the signs
    levels_LZD = levels_LZD[np.isfinite(levels_LZD).all(axis=(1, 2))]
  size = np.abs(x_ZD).max()
  nearest_ZD = np.abs(levels_LZD - x_ZD).min(axis=0)
  np.testing.assert_allclose(np.abs(out["y"] - x_ZD), nearest_ZD, atol=2e-6 * size)
  np.testing.assert_allclose(np.abs(levels_LZD - out["y"]).min(axis=0), 0, atol=1e-6 * size)


@pytest.mark.parametrize("format", marked(STRAIGHT_ALONG_X), ids=str)
def test_rounding_keeps_the_order_and_is_odd_where_levels_are(format):
  x_ZD, _, out = outcome(format)
  x_split, axes = split(jnp.asarray(x_ZD), format.shared, format.size)
  y_split, _ = split(jnp.asarray(out["y"]), format.shared, format.size)

  def rows(array):  # of values that share a scale
    array = np.moveaxis(np.asarray(array), axes, range(-len(axes), 0))
    return array.reshape(-1, np.prod(array.shape[-len(axes) :]))

  order = np.argsort(rows(x_split), axis=1)
  ordered = np.take_along_axis(rows(y_split), order, axis=1)
  assert (np.diff(ordered, axis=1) >= -1e-6).all()
  kind = getattr(format, "grid", "")
  if isinstance(format, PactFormat | MatquantFormat) or kind in ("affine", "unsigned"):
    return
  is_odd_ZD = np.abs(out["negated"] + out["y"]) <= 1e-6 * (1 + np.abs(out["y"]))
  codes, clips = out["encoded"].codes, isinstance(format, LsqFormat | ParetoqFormat)
  clips |= getattr(format, "ratio", 1) < 1 or getattr(format, "avoids_ties", False)
  if clips:  # there is one level more below than above
    is_odd_ZD |= (codes == codes.min()) | (codes == codes.max())
  assert is_odd_ZD[x_ZD != 0].all()


@pytest.mark.parametrize("n", [2, 16, 128])
def test_the_hadamard_matrix_is_symmetric_orthogonal_and_what_the_fast_transform_multiplies_by(n):
  places = np.arange(n)
  signs = [[(-1) ** bin(i & j).count("1") for j in places] for i in places]
  h_NN = np.array(signs) / np.sqrt(n)
  x_ZN = np.random.default_rng(0).normal(size=(4, n)).astype(np.float32)
  turned_ZN = turning.turn(x_ZN, n)
  np.testing.assert_allclose(turned_ZN, x_ZN @ h_NN, atol=1e-6)
  np.testing.assert_allclose(turning.turn(turned_ZN, n), x_ZN, rtol=1e-6, atol=1e-6)
  got_NN = np.asarray(jax.jit(turning.turn, static_argnums=1)(np.eye(n, dtype=np.float32), n))
  np.testing.assert_array_equal(got_NN, got_NN.T)
  np.testing.assert_allclose(got_NN @ got_NN.T, np.eye(n), atol=1e-6)


@pytest.mark.parametrize("format", marked(c for c in CASES if c.shared == "row"), ids=str)
def test_a_fixed_scale_rounds_to_what_is_on_the_grid_already(format):
  """Rounding twice under the same scale changes nothing; learned scales are such scales."""
  x_ZD, _, out = outcome(format)
  if apply.learned_names(format):
    scales = apply.init_scales(jnp.asarray(x_ZD), format)
    again = apply.quantize(jnp.asarray(out["y"]), format, scales=scales, N=1)
    np.testing.assert_array_equal(again, out["y"])
  elif isinstance(format, UniformFormat) and format.ratio == 1:
    again = apply.quantize(jnp.asarray(out["y"]), format)
    chex.assert_trees_all_close(again, out["y"], rtol=1e-5)


def test_a_scale_that_is_recomputed_from_the_mean_square_is_not_idempotent():
  x_ZD, _, out = outcome(QuestFormat(levels="int2", hadamard=0))
  again = apply.quantize(jnp.asarray(out["y"]), QuestFormat(levels="int2", hadamard=0))
  assert np.abs(again - out["y"]).max() > 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("compile_in_less_time")
@pytest.mark.parametrize("axes", [("fsdp", None), (None, "fsdp")], ids=["rows", "contracted"])
def test_it_is_the_same_where_a_mesh_splits_the_array(axes):
  """The 64 contracted entries lie as 2 x 32, which are whole blocks of each format here."""
  cases = [
    UniformFormat(bits=3, grid="affine"),
    UniformFormat(shared="tensor", clips_gradient=True, ratio=0.5),
    UniformFormat(shared="group", size=8),
    LsqFormat(bits=2, shared="row"),
    PactFormat(bits=3, start=1.5),
    BitnetFormat(),
    ParetoqFormat(bits="2"),
    QuestFormat(levels="int4", hadamard=32),
    QuestFormat(levels="fp4", hadamard=0),
    MatquantFormat(bits=4),
    BlockFormat(),
    BlockFormat(elements="nvfp4"),
  ]
  x_ZD = np.random.default_rng(0).standard_t(4, SHAPE).astype(np.float32)

  def round_all(x_ZD):
    def one(format):
      learns = apply.learned_names(format)
      scales = apply.init_scales(jnp.asarray(SAMPLE_ZD), format) if learns else {}
      return apply.quantize(x_ZD, format, scales=scales, N=x_ZD.size)

    return [one(format) for format in cases]

  want = jax.jit(round_all)(x_ZD)
  with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=2))):
    got = jax.jit(round_all)(jax.device_put(x_ZD, jax.P(*axes)))
    assert all(jax.typeof(y).sharding.spec == jax.P(*axes) for y in got)
    got = jax.device_get(got)
  for format, a, b in zip(cases, got, want):
    np.testing.assert_allclose(a, b, atol=1e-6, err_msg=str(format))


@pytest.mark.parametrize("masks", [False, True])
def test_two_of_four_are_kept_and_kept_again(masks):
  format = SparseFormat(masks_gradient=masks)
  w_ZD = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32).at[0, :4].set(1.0)
  y_ZD, pull = jax.vjp(lambda w: apply.quantize(w, format), w_ZD)
  groups = np.asarray(y_ZD).reshape(8, 4, 4)
  assert ((groups != 0).sum(-1) == 2).all()
  np.testing.assert_array_equal(groups[0, 0], [1, 1, 0, 0])  # of equals the first
  np.testing.assert_array_equal(apply.quantize(y_ZD, format), y_ZD)
  (dw_ZD,) = pull(jnp.ones_like(w_ZD))
  np.testing.assert_array_equal(dw_ZD, (y_ZD != 0) if masks else np.ones(w_ZD.shape))
