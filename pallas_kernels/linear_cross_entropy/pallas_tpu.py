"""Computes linear cross-entropy on TPU (Pallas Mosaic): tiles of logits live in VMEM only.

Tiles are transposed, [entries, rows], so that what belongs to a row lies along the lanes. Forward:
a block of E stays while C streams past. Backward: for one block of rows at a time, a kernel visits
the vocabulary once, adds to the block's gradient in VMEM and to C's gradient in HBM, read and
written tile by tile: 6NVD FLOPs with the logits made again, and no memory beyond the float32
gradients. Where two cores share a device each takes half of the vocabulary.

Values are tested in Pallas's interpreter and in the simulator of a TPU (races, poisoned memory,
shuffled grid order, one and two cores); compiled ahead of time for v5e, v5p, v6e and tpu7x. No TPU
has run it.
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

from pallas_kernels.common.padding import pad_axis
from pallas_kernels.common.platform import why_no_tpu
from pallas_kernels.common.shards import varying_struct, zeros_varying_like
from pallas_kernels.linear_cross_entropy import blocks, terms
from pallas_kernels.linear_cross_entropy.terms import (
  Gradients,
  Inputs,
  Options,
  RowFactors,
  Statistics,
  TileSize,
)


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  dtype = inputs.embeddings_ND.dtype
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"embeddings_ND.dtype={dtype}, the MXU multiplies float32 and bfloat16"
  if (reason := why_no_tpu(options.interpret)) is not None:
    return reason
  if None in _tiles(inputs, options):
    shape = inputs.embeddings_ND.shape
    return f"embeddings_ND.shape={shape}, rows of this width do not fit in VMEM"
  return None


def _tiles(inputs: Inputs, options: Options) -> tuple[TileSize | None, TileSize | None]:
  """Returns forward and backward tiles on the chip at hand."""
  N, D = inputs.embeddings_ND.shape
  sizes = (N, options.entries(inputs), D, inputs.embeddings_ND.dtype)
  limits = blocks.tile_limits(options.interpret)
  return blocks.forward_tile(*sizes, limits), blocks.backward_tile(*sizes, limits)


def forward_tile(inputs: Inputs, options: Options) -> TileSize:
  """Returns the tile of `statistics`."""
  tile = _tiles(inputs, options)[0]
  assert tile is not None, "unsupported() has let through what does not fit"
  return tile


def backward_tile(inputs: Inputs, options: Options) -> TileSize:
  """Returns the tile that filters decide about in `gradients`."""
  tile = _tiles(inputs, options)[1]
  assert tile is not None, "unsupported() has let through what does not fit"
  return tile


def compiler_params(options: Options) -> pltpu.CompilerParams:
  """Returns both kernels' parameters: blocks on all cores, tiles of the vocabulary in order."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"),
    vmem_limit_bytes=int(0.9 * blocks.tile_limits(options.interpret).vmem),
  )


# ----------------------------------------------------------------------------------------- forward


class ForwardInputs(NamedTuple):
  """Holds the blocks that the forward kernel reads."""

  labels_1R: Any
  e_RD: Any
  c: Any
  bias_1W: Any | None


class ForwardOutputs(NamedTuple):
  """Holds the blocks that the forward kernel writes, finished at the vocabulary's last tile."""

  lse_1R: Any
  target_1R: Any
  total_1R: Any


class ForwardScratch(NamedTuple):
  """Holds the log-sum-exp of the tiles so far."""

  top_1R: Any
  mass_1R: Any


def statistics(inputs: Inputs, options: Options) -> Statistics:
  """Returns row statistics; C is read once for every block of rows."""
  embeddings_ND, classifier, labels_N, bias_V = inputs
  V, (N, D) = options.entries(inputs), embeddings_ND.shape
  rows, width = forward_tile(inputs, options)
  tiles = pl.cdiv(V, width)
  row_block = pl.BlockSpec((1, rows), lambda n, v: (0, n))
  blocks_in = ForwardInputs(
    labels_1R=row_block,
    e_RD=pl.BlockSpec((rows, D), lambda n, v: (n, 0)),
    c=classifier_block(options, width, D, lambda n, v: v),
    bias_1W=None if bias_V is None else pl.BlockSpec((1, width), lambda n, v: (0, v)),
  )
  operands = ForwardInputs(
    labels_1R=known_labels(labels_N, V, rows),
    e_RD=pad_axis(embeddings_ND, rows, 0),
    c=pad_axis(classifier, width, options.vocabulary_axis),
    bias_1W=None if bias_V is None else bias_row(bias_V, tiles * width),
  )
  running = pltpu.VMEM((1, rows), jnp.float32)
  row_of_all = varying_struct((1, max(N, rows)), jnp.float32, embeddings_ND)
  (out,) = pl.pallas_call(
    functools.partial(forward_kernel, options=options, V=V, width=width),
    grid=(pl.cdiv(N, rows), tiles),
    in_specs=(blocks_in,),
    out_specs=(ForwardOutputs(row_block, row_block, row_block),),
    out_shape=(ForwardOutputs(row_of_all, row_of_all, row_of_all),),
    scratch_shapes=(ForwardScratch(running, running),),
    compiler_params=compiler_params(options),
    interpret=options.interpret,
    name="linear_cross_entropy_forward",
  )(operands)
  return Statistics(out.lse_1R[0, :N], out.target_1R[0, :N], out.total_1R[0, :N])


def forward_kernel(
  blocks_in: ForwardInputs,
  out: ForwardOutputs,
  running: ForwardScratch,
  *,
  options: Options,
  V: int,
  width: int,
) -> None:
  """Adds one tile of the vocabulary to the statistics of a block of rows."""
  tile = pl.program_id(1)

  @pl.when(tile == 0)
  def start() -> None:
    running.top_1R[...] = jnp.full_like(running.top_1R, -jnp.inf)
    for ref in (running.mass_1R, out.target_1R, out.total_1R):
      ref[...] = jnp.zeros_like(ref)

  ids_W1 = entry_ids(tile, width)
  exists_W1 = None if V % width == 0 else ids_W1 < V
  x_WR = tile_logits(blocks_in.c[...], blocks_in.e_RD[...], blocks_in.bias_1W, options)
  hit_WR = ids_W1 == blocks_in.labels_1R[...]
  out.target_1R[...] += jnp.sum(jnp.where(hit_WR, x_WR, 0.0), axis=0, keepdims=True)
  if options.needs_total:
    existing_WR = x_WR if exists_W1 is None else jnp.where(exists_W1, x_WR, 0.0)
    out.total_1R[...] += jnp.sum(existing_WR, axis=0, keepdims=True)
  if exists_W1 is not None:
    x_WR = jnp.where(exists_W1, x_WR, -jnp.inf)
  top_1R, mass_1R = running.top_1R[...], running.mass_1R[...]
  top_1R, mass_1R = terms.add_exponentials(top_1R, mass_1R, x_WR, axis=0)
  running.top_1R[...], running.mass_1R[...] = top_1R, mass_1R

  @pl.when(tile == pl.num_programs(1) - 1)
  def finish() -> None:
    out.lse_1R[...] = terms.log_sum_exp(running.top_1R[...], running.mass_1R[...])


# ---------------------------------------------------------------------------------------- backward


class Sums(NamedTuple):
  """Holds gradients of C and of the bias as a row, summed over the blocks of rows so far."""

  c: Any
  bias_1W: Any | None


class BackwardInputs(NamedTuple):
  """Holds the blocks that the backward kernel reads."""

  labels_1R: Any
  factors: RowFactors  # [1, R], but active_N is a column [R, 1]
  e_RD: Any
  c: Any
  bias_1W: Any | None


class BackwardGrid(NamedTuple):
  """Says how the backward kernel walks over the vocabulary."""

  V: int
  width: int
  tiles: int
  tiles_per_core: int


def gradients(inputs: Inputs, factors: RowFactors, options: Options) -> Gradients:
  """Returns gradients in float32. Sorting the vocabulary copies C, and dC once more in float32."""
  order_V = terms.vocabulary_order(inputs, factors.active_N, options)
  if order_V is None:
    return _gradients_in_order(inputs, factors, options)
  embeddings_ND, classifier, labels_N, bias_V = inputs
  axis, V = options.vocabulary_axis, order_V.size
  place_V = jnp.argsort(order_V).astype(jnp.int32)
  known_N = (labels_N >= 0) & (labels_N < V)
  ordered = Inputs(
    embeddings_ND,
    jnp.take(classifier, order_V, axis=axis),
    jnp.where(known_N, place_V[jnp.clip(labels_N, 0, V - 1)], -1),
    None if bias_V is None else bias_V[order_V],
  )
  de_ND, dc, db_V = _gradients_in_order(ordered, factors, options)
  return Gradients(de_ND, jnp.take(dc, place_V, axis=axis), None if db_V is None else db_V[place_V])


def _gradients_in_order(inputs: Inputs, factors: RowFactors, options: Options) -> Gradients:
  embeddings_ND, classifier, labels_N, bias_V = inputs
  V, (N, D), axis = options.entries(inputs), embeddings_ND.shape, options.vocabulary_axis
  rows, width = backward_tile(inputs, options)
  tiles, chunks = pl.cdiv(V, width), pl.cdiv(N, rows)
  cores = min(blocks.tile_limits(options.interpret).cores, tiles)
  grid = BackwardGrid(V, width, tiles, tiles_per_core=pl.cdiv(tiles, cores))

  def vocabulary_tile(core: Any, step: Any, chunk: Any) -> Any:
    return jnp.minimum(core * grid.tiles_per_core + step, tiles - 1)

  def row_of_factor(value_N: jax.Array, fill: float = 0) -> jax.Array:
    return pad_axis(value_N[None], chunks * rows, 1, fill)

  operands = BackwardInputs(
    labels_1R=known_labels(labels_N, V, chunks * rows),
    factors=RowFactors(
      lse_N=row_of_factor(factors.lse_N, jnp.inf),
      scale_N=row_of_factor(factors.scale_N),
      at_target_N=row_of_factor(factors.at_target_N),
      offset_N=row_of_factor(factors.offset_N),
      unit_N=row_of_factor(factors.unit_N, 1),
      active_N=pad_axis(factors.active_N[:, None].astype(jnp.float32), chunks * rows, 0),
    ),
    e_RD=pad_axis(embeddings_ND, rows, 0),
    c=pad_axis(classifier, width, axis),
    bias_1W=None if bias_V is None else bias_row(bias_V, tiles * width),
  )
  row_block = pl.BlockSpec((1, rows), lambda core, step, chunk: (0, chunk[0]))
  bias_block = pl.BlockSpec((1, width), lambda *index: (0, vocabulary_tile(*index)))
  once = pl.Buffered(1)  # one fetch a call: a second buffer would only cost memory
  active_block = pl.BlockSpec(
    (rows, 1), lambda core, step, chunk: (chunk[0], 0), pipeline_mode=once
  )
  sums_blocks = Sums(
    classifier_block(options, width, D, vocabulary_tile), None if bias_V is None else bias_block
  )
  blocks_in = BackwardInputs(
    labels_1R=row_block,
    factors=RowFactors(row_block, row_block, row_block, row_block, row_block, active_block),
    e_RD=pl.BlockSpec((rows, D), lambda core, step, chunk: (chunk[0], 0), pipeline_mode=once),
    c=sums_blocks.c,
    bias_1W=sums_blocks.bias_1W,
  )
  zero_sums = Sums(
    zeros_varying_like(operands.c.shape, jnp.float32, embeddings_ND),
    None if bias_V is None else zeros_varying_like((1, tiles * width), jnp.float32, embeddings_ND),
  )
  add_chunk = pl.pallas_call(
    functools.partial(backward_kernel, options=options, grid=grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(cores, grid.tiles_per_core),
      in_specs=(sums_blocks, blocks_in),
      out_specs=(sums_blocks, pl.BlockSpec((1, rows, D), lambda core, step, chunk: (core, 0, 0))),
      scratch_shapes=(pltpu.VMEM((rows, D), embeddings_ND.dtype),),
    ),
    out_shape=(
      jax.tree.map(lambda a: varying_struct(a.shape, jnp.float32, embeddings_ND), zero_sums),
      varying_struct((cores, rows, D), jnp.float32, embeddings_ND),
    ),
    # The sums are updated in place: operands after the prefetched scalar, and first among results.
    input_output_aliases={1 + i: i for i in range(len(jax.tree.leaves(zero_sums)))},
    compiler_params=compiler_params(options),
    interpret=options.interpret,
    name="linear_cross_entropy_backward",
  )

  def one_chunk(sums: Sums, chunk: jax.Array) -> tuple[Sums, jax.Array]:
    sums, de_ARD = add_chunk(chunk[None], sums, operands)
    return sums, jnp.sum(de_ARD, axis=0)

  sums, de = jax.lax.scan(one_chunk, zero_sums, jnp.arange(chunks, dtype=jnp.int32))
  dc = sums.c[:V] if axis == 0 else sums.c[:, :V]
  db_V = None if sums.bias_1W is None else sums.bias_1W[0, :V]
  return Gradients(de.reshape(-1, D)[:N], dc, db_V)


def backward_kernel(
  chunk: Any,
  old: Sums,
  blocks_in: BackwardInputs,
  new: Sums,
  de_1RD: Any,
  masked_RD: Any,
  *,
  options: Options,
  grid: BackwardGrid,
) -> None:
  """Adds one tile's part of dC and db to what earlier chunks left, of dE to the block in VMEM."""
  step = pl.program_id(1)
  tile = pl.program_id(0) * grid.tiles_per_core + step

  @pl.when(step == 0)
  def start() -> None:
    # Ragged and inactive rows may hold NaN, and 0 * NaN would reach all of dC.
    e_RD = blocks_in.e_RD[...]
    masked_RD[...] = jnp.where(blocks_in.factors.active_N[...] > 0, e_RD, jnp.zeros_like(e_RD))
    de_1RD[...] = jnp.zeros_like(de_1RD)

  @pl.when(tile < grid.tiles)
  def add_tile() -> None:
    ids_W1 = entry_ids(tile, grid.width)
    exists_W1 = None if grid.V % grid.width == 0 else ids_W1 < grid.V
    c_tile = blocks_in.c[...]
    if exists_W1 is not None:
      exists = exists_W1 if options.layout == "vd" else entry_ids(tile, grid.width, axis=1) < grid.V
      c_tile = jnp.where(exists, c_tile, jnp.zeros_like(c_tile))
    x_WR = tile_logits(c_tile, masked_RD[...], blocks_in.bias_1W, options)
    factors = RowFactors(*(ref[...] for ref in blocks_in.factors))
    hit_WR = ids_W1 == blocks_in.labels_1R[...]
    gradient_WR = terms.logit_gradient(x_WR, hit_WR, factors, options)
    if exists_W1 is not None:
      gradient_WR = jnp.where(exists_W1, gradient_WR, 0.0)
    g_WR = gradient_WR * terms.logit_slope(x_WR, options)
    rounded_g_WR = g_WR.astype(masked_RD.dtype)

    def add_to_embeddings() -> None:
      de_1RD[0] += dot(rounded_g_WR, c_tile, 0, options.vocabulary_axis)

    def add_to_weights() -> None:
      if options.layout == "vd":
        new.c[...] = old.c[...] + dot(rounded_g_WR, masked_RD[...], 1, 0)
      else:
        new.c[...] = old.c[...] + dot(masked_RD[...], rounded_g_WR, 0, 1)
      if old.bias_1W is not None and new.bias_1W is not None:
        new.bias_1W[...] = old.bias_1W[...] + as_row(jnp.sum(g_WR, axis=1, keepdims=True))

    def copy_weights() -> None:
      new.c[...] = old.c[...]
      if old.bias_1W is not None and new.bias_1W is not None:
        new.bias_1W[...] = old.bias_1W[...]

    run_if(terms.passes_filter(gradient_WR, factors, options.threshold_e), add_to_embeddings)
    keep_c = terms.passes_filter(gradient_WR, factors, options.threshold_c)
    run_if(keep_c, add_to_weights, copy_weights)


# ------------------------------------------------------------------------------- parts of both


def classifier_block(options: Options, width: int, D: int, tile: Any) -> pl.BlockSpec:
  """Returns the block of C that holds the entries of the tile at a grid index."""
  if options.layout == "vd":
    return pl.BlockSpec((width, D), lambda *index: (tile(*index), 0))
  return pl.BlockSpec((D, width), lambda *index: (0, tile(*index)))


def bias_row(bias_V: jax.Array, size: int) -> jax.Array:
  """Returns the bias as a float32 row, padded to whole tiles."""
  return pad_axis(bias_V.astype(jnp.float32)[None], size, 1)


def known_labels(labels_N: jax.Array, V: int, size: int) -> jax.Array:
  """Returns labels as a padded row; -1 for those that name no entry here: they match no padding."""
  known_N = jnp.where((labels_N >= 0) & (labels_N < V), labels_N, -1)
  return pad_axis(known_N[None], size, 1, -1)


def entry_ids(tile: jax.Array, width: int, axis: int = 0) -> jax.Array:
  """Returns the ids of a tile's entries, as a column or (axis 1) a row."""
  shape = (width, 1) if axis == 0 else (1, width)
  return tile * width + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def tile_logits(c: jax.Array, e_RD: jax.Array, bias_1W: Any | None, options: Options) -> jax.Array:
  """Returns the logits of a tile [W, R]."""
  product_WR = dot(c, e_RD, 1 - options.vocabulary_axis, 1)
  return terms.logits(product_WR, None if bias_1W is None else as_column(bias_1W[...]), options)


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
  """Contracts one axis of each, with float32 sums and all digits of float32 inputs."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  axes = (((contract_a,), (contract_b,)), ((), ()))
  return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def as_column(row_1W: jax.Array) -> jax.Array:
  """Moves [1, W] along the lanes to [W, 1] along the sublanes."""
  return jnp.broadcast_to(row_1W, (blocks.LANES, row_1W.shape[1])).T[:, :1]


def as_row(column_W1: jax.Array) -> jax.Array:
  """Moves [W, 1] along the sublanes to [1, W] along the lanes."""
  return jnp.broadcast_to(column_W1, (column_W1.shape[0], blocks.LANES)).T[:1]


def run_if(
  condition: jax.Array | bool, work: Callable[[], None], otherwise: Callable[[], None] | None = None
) -> None:
  """Runs `work()` where the condition holds; without a branch where it is known to."""
  if condition is True:
    work()
    return
  pl.when(condition)(work)
  if otherwise is not None:
    pl.when(jnp.logical_not(condition))(otherwise)
