"""Linear cross-entropy on TPU (Pallas Mosaic): tiles of the logits live in VMEM only.

Tiles are transposed, [entries, rows], so that what belongs to a row lies along the lanes. Forward: a block of E stays
while C streams past. Backward: for one block of rows at a time, a kernel visits the vocabulary once, adds to the
block's gradient in VMEM and to C's gradient in HBM, read and written tile by tile: 6NVD FLOPs with the logits made
again, and no memory beyond the float32 gradients. Where two cores share a device each takes half of the vocabulary.
"""

# N tokens, D model, V vocabulary; R rows and W entries of a tile; A cores
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_cross_entropy import blocks, terms
from pallas_kernels.linear_cross_entropy.blocks import Blocks
from pallas_kernels.linear_cross_entropy.terms import Options, Rows, Statistics


def unsupported(embeddings_ND: jax.Array, classifier: jax.Array, options: Options) -> str | None:
  """Why these inputs cannot run here; None if they can."""
  if embeddings_ND.dtype not in (jnp.float32, jnp.bfloat16):
    return f"embeddings_ND.dtype={embeddings_ND.dtype}, the MXU multiplies float32 and bfloat16"
  if not options.interpret and "tpu" not in blocks.device_kind().lower():
    return f"the device is {blocks.device_kind()!r}, not a TPU; interpret=True runs the kernel interpreted"
  if None in tiles_for(embeddings_ND, classifier, options):
    return f"embeddings_ND.shape={embeddings_ND.shape}, rows of this width do not fit in VMEM"
  return None


def tiles_for(
  embeddings_ND: jax.Array, classifier: jax.Array, options: Options
) -> tuple[Blocks | None, Blocks | None]:
  """Forward and backward tiles on the chip at hand."""
  V, (N, D) = classifier.shape[options.vocabulary_axis], embeddings_ND.shape
  chip = blocks.tpu_chip(options.interpret)
  choices = (blocks.tpu_forward, blocks.tpu_backward)
  forward, backward = (choose(N, V, D, embeddings_ND.dtype, chip) for choose in choices)
  return forward, backward


def backward_tile(embeddings_ND: jax.Array, classifier: jax.Array, options: Options) -> Blocks:
  """The tile that filters decide about in `gradients`."""
  tile = tiles_for(embeddings_ND, classifier, options)[1]
  assert tile is not None, "unsupported() has let through what does not fit"
  return tile


def forward_tile(embeddings_ND: jax.Array, classifier: jax.Array, options: Options) -> Blocks:
  tile = tiles_for(embeddings_ND, classifier, options)[0]
  assert tile is not None, "unsupported() has let through what does not fit"
  return tile


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  numbers = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def pad(array: jax.Array, size: int, axis: int, value: float = 0) -> jax.Array:
  """Pads one axis to `size`; large arrays are never padded, their last blocks are ragged."""
  widths = [(0, max(0, size - length) if i == axis else 0) for i, length in enumerate(array.shape)]
  return jnp.pad(array, widths, constant_values=value)


def as_column(row_1W: jax.Array) -> jax.Array:
  """[1, W] along the lanes to [W, 1] along the sublanes."""
  return jnp.broadcast_to(row_1W, (blocks.LANES, row_1W.shape[1])).T[:, :1]


def as_row(column_W1: jax.Array) -> jax.Array:
  return jnp.broadcast_to(column_W1, (column_W1.shape[0], blocks.LANES)).T[:1]


class Inside(NamedTuple):
  """Which entries of the vocabulary a tile holds: their ids as a column, and those that exist (None: all)."""

  ids_W1: jax.Array
  exists_W1: jax.Array | None


def tile_entries(tile: jax.Array, width: int, V: int) -> Inside:
  ids_W1 = tile * width + jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0)
  return Inside(ids_W1, None if V % width == 0 else ids_W1 < V)


def tile_logits(
  c: jax.Array, e_RD: jax.Array, bias_1W: jax.Array | None, options: Options
) -> jax.Array:
  product_WR = dot(c, e_RD, 1 - options.vocabulary_axis, 1)
  return terms.logits(product_WR, None if bias_1W is None else as_column(bias_1W), options)


# ---------------------------------------------------------------------------------------------------------- forward


def forward_kernel(*refs: Any, options: Options, V: int, width: int, biased: bool) -> None:
  labels_1R, e_RD, c = refs[:3]
  bias_1W = refs[3] if biased else None
  lse_1R, target_1R, total_1R, top_1R, mass_1R = refs[-5:]
  tile = pl.program_id(1)

  @pl.when(tile == 0)
  def start() -> None:
    top_1R[...] = jnp.full_like(top_1R, -jnp.inf)
    for ref in (mass_1R, target_1R, total_1R):
      ref[...] = jnp.zeros_like(ref)

  inside = tile_entries(tile, width, V)
  x_WR = tile_logits(c[...], e_RD[...], None if bias_1W is None else bias_1W[...], options)
  hit_WR = inside.ids_W1 == labels_1R[...]
  target_1R[...] += jnp.sum(jnp.where(hit_WR, x_WR, 0.0), axis=0, keepdims=True)
  if options.total:
    shown_WR = x_WR if inside.exists_W1 is None else jnp.where(inside.exists_W1, x_WR, 0.0)
    total_1R[...] += jnp.sum(shown_WR, axis=0, keepdims=True)
  if inside.exists_W1 is not None:
    x_WR = jnp.where(inside.exists_W1, x_WR, -jnp.inf)
  top_1R[...], mass_1R[...] = terms.add_exponentials(top_1R[...], mass_1R[...], x_WR, axis=0)

  @pl.when(tile == pl.num_programs(1) - 1)
  def finish() -> None:
    lse_1R[...] = terms.finish_exponentials(top_1R[...], mass_1R[...])


def statistics(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
) -> Statistics:
  """Row statistics; C is read once for every block of rows."""
  V, (N, D) = classifier.shape[options.vocabulary_axis], embeddings_ND.shape
  chip = blocks.tpu_chip(options.interpret)
  rows, width = forward_tile(embeddings_ND, classifier, options)
  tiles = pl.cdiv(V, width)
  row_block = pl.BlockSpec((1, rows), lambda n, v: (0, n))
  operands = [
    (labels_1N(labels_N, V, rows), row_block),
    (pad(embeddings_ND, rows, 0), pl.BlockSpec((rows, D), lambda n, v: (n, 0))),
    (
      pad(classifier, width, options.vocabulary_axis),
      classifier_block(options, width, D, lambda n, v: v),
    ),
  ]
  if bias_V is not None:
    operands.append(
      (pad_bias(bias_V, tiles * width), pl.BlockSpec((1, width), lambda n, v: (0, v)))
    )
  shape = struct((1, max(N, rows)), embeddings_ND)
  lse_1N, target_1N, total_1N = pl.pallas_call(
    functools.partial(forward_kernel, options=options, V=V, width=width, biased=bias_V is not None),
    grid=(pl.cdiv(N, rows), tiles),
    in_specs=[spec for _, spec in operands],
    out_specs=[row_block] * 3,
    out_shape=[shape] * 3,
    scratch_shapes=[pltpu.VMEM((1, rows), jnp.float32)] * 2,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=int(0.9 * chip.vmem)
    ),
    interpret=options.interpret,
    name="linear_cross_entropy_forward",
  )(*(operand for operand, _ in operands))
  return Statistics(lse_1N[0, :N], target_1N[0, :N], total_1N[0, :N])


def classifier_block(options: Options, width: int, D: int, index: Any) -> pl.BlockSpec:
  if options.layout == "vd":
    return pl.BlockSpec((width, D), lambda *i: (index(*i), 0))
  return pl.BlockSpec((D, width), lambda *i: (0, index(*i)))


def pad_bias(bias_V: jax.Array, size: int) -> jax.Array:
  return pad(bias_V.astype(jnp.float32)[None], size, 1)


def struct(shape: tuple[int, ...], like: jax.Array) -> jax.ShapeDtypeStruct:
  """A float32 output that varies over the mesh axes that `like` varies over."""
  return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=jax.typeof(like).mat)


def labels_1N(labels_N: jax.Array, V: int, size: int) -> jax.Array:
  """Labels as a row; -1 for those that name no entry here, so that they match no padding either."""
  return pad(jnp.where((labels_N >= 0) & (labels_N < V), labels_N, -1)[None], size, 1, -1)


# --------------------------------------------------------------------------------------------------------- backward


class Plan(NamedTuple):
  """What is fixed about one backward kernel."""

  options: Options
  V: int
  width: int
  tiles: int
  tiles_per_core: int
  biased: bool


def backward_kernel(*refs: Any, plan: Plan) -> None:
  """One tile: adds its part of dC (and db) to what earlier chunks left there, and of dE to the block in VMEM."""
  inputs, (de_RD, dc_out, *db_out), masked_RD = (
    refs[1 : -3 - plan.biased],
    refs[-3 - plan.biased : -1],
    refs[-1],
  )
  labels_1R, *rows_1R, active_R1, e_RD, c, dc_in = inputs[:10]
  bias_1W, db_in_1W = inputs[10:] if plan.biased else (None, None)
  options, step = plan.options, pl.program_id(1)
  tile = pl.program_id(0) * plan.tiles_per_core + step

  @pl.when(step == 0)
  def start() -> None:
    # Ragged and inactive rows may hold NaN, and 0 * NaN would reach all of dC.
    masked_RD[...] = jnp.where(active_R1[...] > 0, e_RD[...], jnp.zeros_like(e_RD))
    de_RD[...] = jnp.zeros_like(de_RD)

  @pl.when(tile < plan.tiles)
  def work() -> None:
    inside = tile_entries(tile, plan.width, plan.V)
    c_tile = c[...]
    if inside.exists_W1 is not None:
      exists = inside.exists_W1 if options.layout == "vd" else id_row(tile, plan) < plan.V
      c_tile = jnp.where(exists, c_tile, jnp.zeros_like(c_tile))
    x_WR = tile_logits(c_tile, masked_RD[...], None if bias_1W is None else bias_1W[...], options)
    rows = Rows(*(ref[...] for ref in (*rows_1R, active_R1)))
    bracket_WR = terms.logit_gradient(x_WR, inside.ids_W1 == labels_1R[...], rows, options)
    if inside.exists_W1 is not None:
      bracket_WR = jnp.where(inside.exists_W1, bracket_WR, 0.0)
    g_WR = bracket_WR * terms.slope(x_WR, options)
    small_WR = g_WR.astype(e_RD.dtype)

    def add_to_embeddings() -> None:
      de_RD[0] += dot(small_WR, c_tile, 0, options.vocabulary_axis)

    def add_to_classifier() -> None:
      if options.layout == "vd":
        dc_out[...] = dc_in[...] + dot(small_WR, masked_RD[...], 1, 0)
      else:
        dc_out[...] = dc_in[...] + dot(masked_RD[...], small_WR, 0, 1)
      for db_out_1W in db_out:
        db_out_1W[...] = db_in_1W[...] + as_row(jnp.sum(g_WR, axis=1, keepdims=True))

    def keep_classifier() -> None:
      dc_out[...] = dc_in[...]
      for db_out_1W in db_out:
        db_out_1W[...] = db_in_1W[...]

    branch(terms.keeps(bracket_WR, rows, options.threshold_e), add_to_embeddings)
    branch(terms.keeps(bracket_WR, rows, options.threshold_c), add_to_classifier, keep_classifier)


def id_row(tile: jax.Array, plan: Plan) -> jax.Array:
  return tile * plan.width + jax.lax.broadcasted_iota(jnp.int32, (1, plan.width), 1)


def branch(
  condition: jax.Array | bool, work: Callable[[], None], otherwise: Callable[[], None] | None = None
) -> None:
  """`work()` where the condition holds; without a branch where it is known to."""
  if condition is True:
    work()
    return
  pl.when(condition)(work)
  if otherwise is not None:
    pl.when(jnp.logical_not(condition))(otherwise)


def gradients(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  rows: Rows,
  options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Gradients of E, C and b in float32. Sorting the vocabulary copies C, and dC once more in float32."""
  if not options.sort:
    return unsorted_gradients(embeddings_ND, classifier, labels_N, bias_V, rows, options)
  order_V = terms.sorted_order(embeddings_ND, classifier, bias_V, rows.active_N, options)
  place_V = jnp.argsort(order_V).astype(jnp.int32)
  axis, V = options.vocabulary_axis, order_V.size
  moved_N = jnp.where((labels_N >= 0) & (labels_N < V), place_V[jnp.clip(labels_N, 0, V - 1)], -1)
  sorted_bias_V = None if bias_V is None else bias_V[order_V]
  sorted_classifier = jnp.take(classifier, order_V, axis=axis)
  de_ND, dc, db_V = unsorted_gradients(
    embeddings_ND, sorted_classifier, moved_N, sorted_bias_V, rows, options
  )
  return de_ND, jnp.take(dc, place_V, axis=axis), None if db_V is None else db_V[place_V]


def unsorted_gradients(
  embeddings_ND: jax.Array,
  classifier: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  rows: Rows,
  options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  V, (N, D), axis = (
    classifier.shape[options.vocabulary_axis],
    embeddings_ND.shape,
    options.vocabulary_axis,
  )
  chip = blocks.tpu_chip(options.interpret)
  size, width = backward_tile(embeddings_ND, classifier, options)
  tiles, chunks = pl.cdiv(V, width), pl.cdiv(N, size)
  cores = min(chip.cores, tiles)
  plan = Plan(options, V, width, tiles, pl.cdiv(tiles, cores), bias_V is not None)

  def column(core: Any, step: Any, chunk: Any) -> Any:
    return jnp.minimum(core * plan.tiles_per_core + step, tiles - 1)

  c_block = classifier_block(options, width, D, column)
  row_block = pl.BlockSpec((1, size), lambda core, step, chunk: (0, chunk[0]))
  bias_block = pl.BlockSpec((1, width), lambda core, step, chunk: (0, column(core, step, chunk)))
  once = pl.Buffered(1)  # one fetch a call: a second buffer would only cost memory
  fixed = [(labels_1N(labels_N, V, chunks * size), row_block)]
  fixed += [
    (pad(value_N[None], chunks * size, 1, fill), row_block)
    for value_N, fill in zip(rows[:5], (jnp.inf, 0, 0, 0, 1))
  ]
  fixed += [
    (
      pad(rows.active_N[:, None].astype(jnp.float32), chunks * size, 0),
      pl.BlockSpec((size, 1), lambda core, step, chunk: (chunk[0], 0), pipeline_mode=once),
    ),
    (
      pad(embeddings_ND, size, 0),
      pl.BlockSpec((size, D), lambda core, step, chunk: (chunk[0], 0), pipeline_mode=once),
    ),
    (pad(classifier, width, axis), c_block),
  ]
  c_size = fixed[-1][0].shape
  bias = [] if bias_V is None else [(pad_bias(bias_V, tiles * width), bias_block)]
  sums = [(c_size, c_block)] + [((1, tiles * width), bias_block) for _ in bias]
  call = pl.pallas_call(
    functools.partial(backward_kernel, plan=plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(cores, plan.tiles_per_core),
      in_specs=[spec for _, spec in fixed] + [c_block] + [bias_block, bias_block][: 2 * len(bias)],
      out_specs=[
        pl.BlockSpec((1, size, D), lambda core, step, chunk: (core, 0, 0)),
        *(spec for _, spec in sums),
      ],
      scratch_shapes=[pltpu.VMEM((size, D), embeddings_ND.dtype)],
    ),
    out_shape=[
      struct((cores, size, D), embeddings_ND),
      *(struct(shape, embeddings_ND) for shape, _ in sums),
    ],
    input_output_aliases={1 + len(fixed): 1, **({3 + len(fixed): 2} if bias else {})},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=int(0.9 * chip.vmem)
    ),
    interpret=options.interpret,
    name="linear_cross_entropy_backward",
  )

  def one_chunk(sums: list[jax.Array], chunk: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    extra = [bias[0][0], sums[1]] if bias else []
    de_ARD, *sums = call(chunk[None], *(operand for operand, _ in fixed), sums[0], *extra)
    return sums, jnp.sum(de_ARD, axis=0)

  start = [terms.zeros(shape, jnp.float32, embeddings_ND) for shape, _ in sums]
  (dc, *db), de = jax.lax.scan(one_chunk, start, jnp.arange(chunks, dtype=jnp.int32))
  dc = dc[:V] if axis == 0 else dc[:, :V]
  return de.reshape(-1, D)[:N], dc, db[0][0, :V] if db else None
