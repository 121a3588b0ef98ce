"""Computes linear cross-entropy on Hopper (Pallas Mosaic GPU).

One kernel computes tiles of the logits on the tensor cores, TMA and two consumer warpgroups as in a
matrix product, and ends each tile either with its part of the row statistics or with the gradient
of its logits, in the inputs' dtype. The forward pass combines the parts of a run of tiles; the
backward pass writes the gradient of a block of logits to HBM (8 MiB in bfloat16) and leaves the two
products with E and C to XLA. 8NVD FLOPs together. The classifier is [V, D]: `api` transposes
another before it comes here.

Values and gradients are tested in the simulator of a GPU (shared memory, TMA, barriers, warpgroups,
races; jax 0.11 and later) and on one H100; it lowers for Hopper on jax 0.10 to 0.12.
"""

# N tokens, D model, V vocabulary; R rows and W entries of a tile; S tiles of a run
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import hopper
from pallas_kernels.common.platform import why_no_hopper
from pallas_kernels.common.shards import zeros_varying_like
from pallas_kernels.linear_cross_entropy import terms, xla
from pallas_kernels.linear_cross_entropy.terms import (
  Gradients,
  Inputs,
  Options,
  RowFactors,
  Statistics,
  TileSize,
)

# Rows of a warpgroup, and entries: a wgmma accumulator of 128 float32 registers a thread.
TILE = 128
WARPGROUPS = 2
DEPTH = 64  # of D in one pipeline step: 128 bytes, the widest swizzle
STAGES = 3  # 48 KiB each; the gradient of a tile takes 64 of the 227 KiB that a block may use
RUN = 2048  # entries whose tiles one launch computes, and rows of the backward pass
SWIZZLE = hopper.swizzled(jnp.bfloat16)  # and float16


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """Returns why these inputs cannot run here, or None if they can."""
  dtype = inputs.embeddings_ND.dtype
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"embeddings_ND.dtype={dtype}, the tensor cores take bfloat16 and float16"
  V, (N, D) = options.entries(inputs), inputs.embeddings_ND.shape
  if N % (TILE * WARPGROUPS) or V % TILE or D % DEPTH:
    return f"N={N}, V={V}, D={D} must be multiples of {TILE * WARPGROUPS}, {TILE} and {DEPTH}"
  if options.threshold_e is not None or options.threshold_c is not None:
    return "filter_e and filter_c are not written"
  return why_no_hopper(options.interpret)


def backward_tile(inputs: Inputs, options: Options) -> TileSize:
  """Returns the rows and entries of one tile of the kernel."""
  return TileSize(TILE * WARPGROUPS, TILE)


# ------------------------------------------------------------------------------------------ kernel


class KernelInputs(NamedTuple):
  """Holds what the kernel reads; arrays outside of it, references inside."""

  first_tile: Any  # [2]: row and entry at which the grid of tiles begins
  e_ND: Any
  c_VD: Any
  labels_N: Any
  bias_V: Any | None
  factors: RowFactors | None  # of the backward pass; without unit_N and active_N


class LogitTile(NamedTuple):
  """Holds one warpgroup's logits: rows of the launch's outputs, entries of the vocabulary."""

  x_RW: jax.Array
  hit_RW: jax.Array  # where an entry is the label of its row
  row: Any  # first row, among those of the launch
  index: Any  # of the tile, among those of the launch


class RunStatistics(NamedTuple):
  """Holds statistics of the rows of a launch, for each tile of entries: [S, N]."""

  top: Any
  mass: Any
  target: Any
  total: Any


def launch(
  finish_tile: Callable[..., None],
  inputs: KernelInputs,
  tiles: tuple[int, int],
  out_type: Any,
  scratch: Any,
  options: Options,
) -> Any:
  """Runs the kernel for a grid of (rows, entries) tiles; `finish_tile` writes what is returned."""

  def body(inputs: KernelInputs, out: Any) -> None:
    def with_scratch(scratch: Any) -> None:
      compute_tile(inputs, functools.partial(finish_tile, out=out, scratch=scratch), options)

    pl.run_scoped(with_scratch, scratch, collective_axes="wg")

  (out,) = hopper.launch(
    body,
    options.interpret,
    out_type=(out_type,),
    grid=tiles,
    grid_names=("rows", "entries"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
  )(inputs)
  return out


def compute_tile(inputs: KernelInputs, finish_tile: Callable[..., None], options: Options) -> None:
  """Multiplies one tile of the grid, then calls `finish_tile(tile, factors)` in each warpgroup."""
  group = jax.lax.axis_index("wg")
  entry_tile = jax.lax.axis_index("entries")
  launch_row = jax.lax.axis_index("rows") * (TILE * WARPGROUPS)
  first_row = inputs.first_tile[0] + launch_row
  first_entry = inputs.first_tile[1] + entry_tile * TILE

  def with_accumulator(run_pipeline: Callable[[Any], None]) -> None:
    @functools.partial(pl.run_scoped, acc=plgpu.ACC((TILE, TILE), jnp.float32))
    def scope(acc: Any) -> None:
      run_pipeline(acc)
      x_RW = acc[...]
      row = first_row + group * TILE
      bias_RW = None
      if inputs.bias_V is not None:
        bias_W = load_vector(inputs.bias_V, first_entry, axis=1)
        bias_RW = jax.lax.broadcast_in_dim(bias_W, (TILE, TILE), [1])
      x_RW = terms.logits(x_RW, bias_RW, options)
      ids_RW = first_entry + plgpu.broadcasted_iota(
        jnp.int32, (TILE, TILE), 1, layout=plgpu.Layout.WGMMA
      )
      hit_RW = ids_RW == along_rows(load_vector(inputs.labels_N, row, axis=0))
      factors = jax.tree.map(
        lambda factor_N: along_rows(load_vector(factor_N, row, axis=0)), inputs.factors
      )
      finish_tile(LogitTile(x_RW, hit_RW, launch_row + group * TILE, entry_tile), factors, group)

  def multiply(_: Any, e_tile: Any, c_tile: Any, acc: Any) -> Any:
    plgpu.wgmma(acc, e_tile.at[pl.ds(group * TILE, TILE)], c_tile.transpose((1, 0)))
    plgpu.wgmma_wait(0)
    return acc

  pipeline = plgpu.emit_pipeline_warp_specialized(
    multiply,
    grid=(inputs.e_ND.shape[1] // DEPTH,),
    memory_registers=40,
    in_specs=[
      plgpu.BlockSpec((TILE * WARPGROUPS, DEPTH), lambda k: (0, k), transforms=SWIZZLE),
      plgpu.BlockSpec((TILE, DEPTH), lambda k: (0, k), transforms=SWIZZLE),
    ],
    wg_axis="wg",
    num_compute_wgs=WARPGROUPS,
    max_concurrent_steps=STAGES,
    compute_context=with_accumulator,
  )
  pipeline(
    inputs.e_ND.at[pl.ds(first_row, TILE * WARPGROUPS), :],
    inputs.c_VD.at[pl.ds(first_entry, TILE), :],
  )


def load_vector(ref: Any, start: Any, axis: int) -> jax.Array:
  """Loads 128 numbers in the layout of the rows (axis 0) or the entries (1) of an accumulator."""
  return (hopper.load_columns if axis else hopper.load_rows)(ref.at[pl.ds(start, TILE)])


def along_rows(value_R: jax.Array) -> jax.Array:
  """Repeats a number of each row over the entries of a tile."""
  return jax.lax.broadcast_in_dim(value_R, (TILE, TILE), [0])


def write_statistics(
  tile: LogitTile, factors: None, group: Any, *, out: RunStatistics, scratch: Any
) -> None:
  """Writes largest logit, sum of exponentials, target's logit and total of the tile's rows."""
  x_RW = tile.x_RW
  top_R = x_RW.max(axis=1)
  stats = RunStatistics(
    top=top_R,
    mass=jnp.exp(x_RW - along_rows(terms.anchor(top_R))).sum(axis=1),
    target=jnp.where(tile.hit_RW, x_RW, 0.0).sum(axis=1),
    total=x_RW.sum(axis=1),
  )
  shared = scratch.at[group]
  for i, value_R in enumerate(stats):
    shared[i] = value_R
  plgpu.commit_smem()
  for i, ref in enumerate(out):
    plgpu.copy_smem_to_gmem(shared.at[i], ref.at[tile.index, pl.ds(tile.row, TILE)])
  plgpu.wait_smem_to_gmem(0)


def write_gradient(
  tile: LogitTile, factors: RowFactors, group: Any, *, out: Any, scratch: Any, options: Options
) -> None:
  """Writes d loss / d product of the tile, rounded to the inputs' dtype."""
  g_RW = terms.logit_gradient(tile.x_RW, tile.hit_RW, factors, options)
  g_RW = g_RW * terms.logit_slope(tile.x_RW, options)
  shared = scratch.at[group]
  shared[...] = g_RW.astype(shared.dtype)
  plgpu.commit_smem()
  entries = pl.ds(tile.index * TILE, TILE)
  plgpu.copy_smem_to_gmem(shared, out.at[pl.ds(tile.row, TILE), entries])
  plgpu.wait_smem_to_gmem(0)


# ------------------------------------------------------------------------------------------ passes


def run_length(size: int, step: int) -> int:
  """Returns the largest divisor of `size` that is a multiple of `step` and at most RUN."""
  return max(length for length in range(step, min(size, RUN) + 1, step) if size % length == 0)


def kernel_inputs(
  inputs: Inputs, row: Any, entry: Any, factors: RowFactors | None = None
) -> KernelInputs:
  """Returns what a launch reads, for a grid of tiles that begins at this row and entry."""
  embeddings_ND, classifier_VD, labels_N, bias_V = inputs
  return KernelInputs(
    first_tile=jnp.stack([jnp.int32(row), jnp.int32(entry)]),
    e_ND=embeddings_ND,
    c_VD=classifier_VD,
    labels_N=labels_N,
    bias_V=None if bias_V is None else bias_V.astype(jnp.float32),
    factors=None if factors is None else factors._replace(unit_N=None, active_N=None),
  )


def statistics(inputs: Inputs, options: Options) -> Statistics:
  """Returns row statistics; holds the parts of one run of tiles, 16 bytes a row and tile."""
  N, V = inputs.labels_N.size, options.entries(inputs)
  run = run_length(V, TILE)
  tiles = (N // (TILE * WARPGROUPS), run // TILE)
  per_tile = jax.ShapeDtypeStruct((run // TILE, N), jnp.float32)
  out_type = RunStatistics(per_tile, per_tile, per_tile, per_tile)
  scratch = plgpu.SMEM((WARPGROUPS, 4, TILE), jnp.float32)

  def add_run(running: xla.Running, index: jax.Array) -> tuple[xla.Running, None]:
    new = launch(
      write_statistics, kernel_inputs(inputs, 0, index * run), tiles, out_type, scratch, options
    )
    top_N = jnp.maximum(running.top_R, jnp.max(new.top, axis=0))
    shift_N = terms.anchor(top_N)
    new_mass_N = jnp.sum(new.mass * jnp.exp(terms.anchor(new.top) - shift_N[None]), axis=0)
    return xla.Running(
      top_R=top_N,
      mass_R=running.mass_R * jnp.exp(running.top_R - shift_N) + new_mass_N,
      target_R=running.target_R + new.target.sum(axis=0),
      total_R=running.total_R + new.total.sum(axis=0),
    ), None

  runs = jnp.arange(V // run, dtype=jnp.int32)
  running, _ = jax.lax.scan(add_run, xla.no_statistics(inputs), runs)
  stats = running.finish()
  if options.needs_total:
    return stats
  return stats._replace(total_N=zeros_varying_like((N,), jnp.float32, inputs))


def gradients(inputs: Inputs, factors: RowFactors, options: Options) -> Gradients:
  """Returns gradients in float32, block of logits by block of logits."""
  N, V = inputs.labels_N.size, options.entries(inputs)
  rows, run = run_length(N, TILE * WARPGROUPS), run_length(V, TILE)
  tiles = (rows // (TILE * WARPGROUPS), run // TILE)
  dtype = inputs.embeddings_ND.dtype
  out_type = jax.ShapeDtypeStruct((rows, run), dtype)
  scratch = plgpu.SMEM((WARPGROUPS, TILE, TILE), dtype, transforms=SWIZZLE)
  # NaN of an inactive row must not reach the classifier's gradient.
  active_ND = jnp.where(factors.active_N[:, None], inputs.embeddings_ND, 0.0)
  inputs = inputs._replace(embeddings_ND=active_ND)
  finish_tile = functools.partial(write_gradient, options=options)

  def add_block(sums: Gradients, index: jax.Array) -> tuple[Gradients, None]:
    row, entry = index // (V // run) * rows, index % (V // run) * run
    launched = kernel_inputs(inputs, row, entry, factors)
    g_RW = launch(finish_tile, launched, tiles, out_type, scratch, options)
    e_RD = jax.lax.dynamic_slice_in_dim(active_ND, row, rows)
    c_WD = jax.lax.dynamic_slice_in_dim(inputs.classifier, entry, run)
    db_V = sums.bias_V
    if db_V is not None:
      db_V = add_slice(db_V, jnp.sum(g_RW, axis=0, dtype=jnp.float32), entry)
    return Gradients(
      embeddings_ND=add_slice(sums.embeddings_ND, xla.product("rv,vd->rd", g_RW, c_WD), row),
      classifier=add_slice(sums.classifier, xla.product("rv,rd->vd", g_RW, e_RD), entry),
      bias_V=db_V,
    ), None

  blocks_of_logits = jnp.arange((N // rows) * (V // run), dtype=jnp.int32)
  return jax.lax.scan(add_block, xla.no_gradients(inputs, factors), blocks_of_logits)[0]


def add_slice(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
  """Adds a run of rows to the rows of `total` from `start` on."""
  old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[0])
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 0)
