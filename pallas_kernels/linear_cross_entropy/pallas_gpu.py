"""Linear cross-entropy on Hopper (Pallas Mosaic GPU). Lowered by tests, never run: no GPU was there yet.

One kernel computes tiles of the logits on the tensor cores, TMA and two consumer warpgroups as in a matrix product, and
ends each tile either with its part of the row statistics or with the gradient of its logits, in the inputs' dtype.
The forward pass combines the parts of a run of tiles; the backward pass writes the gradient of a block of logits to
HBM (8 MiB in bfloat16) and leaves the two products with E and C to XLA. 8NVD FLOPs together.
"""

# N tokens, D model, V vocabulary; R rows and W entries of a tile; S tiles of a run
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_cross_entropy import blocks, terms, tiling
from pallas_kernels.linear_cross_entropy.blocks import Blocks
from pallas_kernels.linear_cross_entropy.terms import Options, Rows, Statistics

TILE = (
  128  # rows of one warpgroup, and entries: a wgmma accumulator of 128 float32 registers a thread
)
WARPGROUPS = 2
DEPTH = 64  # of D in one pipeline step: 128 bytes, the widest swizzle
STAGES = 3  # 48 KiB each; the gradient of a tile takes 64 of the 227 KiB that a block may use
RUN = 2048  # entries whose tiles one launch computes, and rows of the backward pass


def unsupported(embeddings_ND: jax.Array, classifier: jax.Array, options: Options) -> str | None:
  """Why these inputs cannot run here; None if they can."""
  if embeddings_ND.dtype not in (jnp.bfloat16, jnp.float16):
    return f"embeddings_ND.dtype={embeddings_ND.dtype}, the tensor cores take bfloat16 and float16"
  V, (N, D) = classifier.shape[options.vocabulary_axis], embeddings_ND.shape
  if N % (TILE * WARPGROUPS) or V % TILE or D % DEPTH:
    return f"N={N}, V={V}, D={D} must be multiples of {TILE * WARPGROUPS}, {TILE} and {DEPTH}"
  if options.layout != "vd":
    return "classifier_layout='dv' is not written"
  if options.threshold_e is not None or options.threshold_c is not None:
    return "filter_e and filter_c are not written"
  if options.interpret:
    return "interpret=True is not written"
  kind = blocks.device_kind()
  if not any(hopper in kind for hopper in ("H100", "H200", "GH200")):
    return f"the device is {kind!r}, not a Hopper GPU"
  return None


def backward_tile(embeddings_ND: jax.Array, classifier: jax.Array, options: Options) -> Blocks:
  return Blocks(TILE * WARPGROUPS, TILE)


def vector(ref: Any, start: Any, axis: int) -> jax.Array:
  """128 numbers along the rows (0) or the entries (1) of an accumulator."""
  whole = (
    ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
  )  # an argument that jax 0.12 dropped
  layout = plgpu.Layout.WGMMA.reduce(1 - axis)
  return plgpu.load(ref.at[pl.ds(start, TILE)], *whole, layout=layout, optimized=False)


def along_rows(value_R: jax.Array) -> jax.Array:
  return jax.lax.broadcast_in_dim(value_R, (TILE, TILE), [0])


def tile_kernel(
  *refs: Any, options: Options, inputs: int, biased: bool, end: Callable[..., None]
) -> None:
  """Logits of the tile at (rows, entries) of the grid, then `end(x, hit, row vectors, outputs, scratch)`."""
  first, e_ND, c_VD, labels_N, *rest = refs
  vectors, outputs, scratch = rest[:inputs], rest[inputs:-1], rest[-1]
  bias_V = vectors.pop() if biased else None
  group = jax.lax.axis_index("wg")
  row_tile, entry_tile = jax.lax.axis_index("rows"), jax.lax.axis_index("entries")
  first_row, first_entry = first[0], first[1] + entry_tile * TILE
  start = row_tile * (TILE * WARPGROUPS)
  swizzle = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))

  def with_accumulator(run: Callable[[Any], None]) -> None:
    @functools.partial(pl.run_scoped, acc=plgpu.ACC((TILE, TILE), jnp.float32))
    def scope(acc: Any) -> None:
      run(acc)
      x_RW = acc[...]
      row = first_row + start + group * TILE
      bias_W = None
      if bias_V is not None:
        bias_W = vector(bias_V, first_entry, 1)
        bias_W = jax.lax.broadcast_in_dim(bias_W, (TILE, TILE), [1])
      x_RW = terms.logits(x_RW, bias_W, options)
      ids_RW = first_entry + plgpu.broadcasted_iota(
        jnp.int32, (TILE, TILE), 1, layout=plgpu.Layout.WGMMA
      )
      hit_RW = ids_RW == along_rows(vector(labels_N, row, 0))
      end(
        x_RW,
        hit_RW,
        [vector(ref, row, 0) for ref in vectors],
        outputs,
        scratch.at[group],
        start + group * TILE,
        entry_tile,
      )

  def multiply(_: Any, e_tile: Any, c_tile: Any, acc: Any) -> Any:
    plgpu.wgmma(acc, e_tile.at[pl.ds(group * TILE, TILE)], plgpu.transpose_ref(c_tile, (1, 0)))
    plgpu.wgmma_wait(0)
    return acc

  pipeline = plgpu.emit_pipeline_warp_specialized(
    multiply,
    grid=(e_ND.shape[1] // DEPTH,),
    memory_registers=40,
    in_specs=[
      plgpu.BlockSpec((TILE * WARPGROUPS, DEPTH), lambda k: (0, k), transforms=swizzle),
      plgpu.BlockSpec((TILE, DEPTH), lambda k: (0, k), transforms=swizzle),
    ],
    wg_axis="wg",
    num_compute_wgs=WARPGROUPS,
    max_concurrent_steps=STAGES,
    compute_context=with_accumulator,
  )
  pipeline(
    e_ND.at[pl.ds(first_row + start, TILE * WARPGROUPS), :], c_VD.at[pl.ds(first_entry, TILE), :]
  )


def launch(
  end: Callable[..., None],
  first: jax.Array,
  arrays: tuple[jax.Array, ...],
  vectors: tuple[jax.Array, ...],
  bias_V: jax.Array | None,
  tiles: tuple[int, int],
  out: list[jax.ShapeDtypeStruct],
  scratch: Any,
  options: Options,
) -> Any:
  """Runs `tile_kernel` for a grid of (rows, entries) tiles that starts at (row, entry) `first`."""
  extra = vectors if bias_V is None else (*vectors, bias_V.astype(jnp.float32))
  kernel = functools.partial(
    tile_kernel, options=options, inputs=len(extra), biased=bias_V is not None, end=end
  )

  def body(*refs: Any) -> None:
    pl.run_scoped(lambda shared: kernel(*refs, shared), scratch, collective_axes="wg")

  return plgpu.kernel(
    body,
    out_type=out,
    grid=tiles,
    grid_names=("rows", "entries"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
  )(first, *arrays, *extra)


def end_with_statistics(
  x_RW: jax.Array,
  hit_RW: jax.Array,
  vectors: list[jax.Array],
  outputs: list[Any],
  scratch: Any,
  row: Any,
  tile: Any,
) -> None:
  """Largest logit, sum of exponentials, target's logit and total of the tile's rows."""
  top_R = x_RW.max(axis=1)
  mass_R = jnp.exp(x_RW - along_rows(terms.anchor(top_R))).sum(axis=1)
  values = (top_R, mass_R, jnp.where(hit_RW, x_RW, 0.0).sum(axis=1), x_RW.sum(axis=1))
  for i, value_R in enumerate(values):
    scratch[i] = value_R
  plgpu.commit_smem()
  for i, out in enumerate(outputs):
    plgpu.copy_smem_to_gmem(scratch.at[i], out.at[tile, pl.ds(row, TILE)])
  plgpu.wait_smem_to_gmem(0)


def end_with_gradient(
  x_RW: jax.Array,
  hit_RW: jax.Array,
  vectors: list[jax.Array],
  outputs: list[Any],
  scratch: Any,
  row: Any,
  tile: Any,
  *,
  options: Options,
) -> None:
  lse_RW, scale_RW, at_target_RW, offset_RW = map(along_rows, vectors)
  rows = Rows(lse_RW, scale_RW, at_target_RW, offset_RW, unit_N=scale_RW, active_N=scale_RW)
  g_RW = terms.logit_gradient(x_RW, hit_RW, rows, options) * terms.slope(x_RW, options)
  scratch[...] = g_RW.astype(scratch.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(scratch, outputs[0].at[pl.ds(row, TILE), pl.ds(tile * TILE, TILE)])
  plgpu.wait_smem_to_gmem(0)


def run_length(size: int, step: int) -> int:
  """The largest divisor of `size`, in steps, that is at most RUN."""
  return max(length for length in range(step, min(size, RUN) + 1, step) if size % length == 0)


def statistics(
  embeddings_ND: jax.Array,
  classifier_VD: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  options: Options,
) -> Statistics:
  """Row statistics; the parts of one run of tiles are in memory at a time, 16 bytes a row and tile."""
  N, V = labels_N.size, classifier_VD.shape[0]
  run = run_length(V, TILE)
  out = [jax.ShapeDtypeStruct((run // TILE, N), jnp.float32)] * 4
  scratch = plgpu.SMEM((WARPGROUPS, 4, TILE), jnp.float32)
  arrays = (embeddings_ND, classifier_VD, labels_N)
  tiles = (N // (TILE * WARPGROUPS), run // TILE)

  def body(running: Any, index: jax.Array) -> tuple[Any, None]:
    first = jnp.stack([jnp.zeros((), jnp.int32), index * run])
    top_SN, mass_SN, target_SN, total_SN = launch(
      end_with_statistics, first, arrays, (), bias_V, tiles, out, scratch, options
    )
    top_N, mass_N, target_N, total_N = running
    new_N = jnp.maximum(top_N, jnp.max(top_SN, axis=0))
    shift_N = terms.anchor(new_N)
    mass_N = mass_N * jnp.exp(top_N - shift_N) + jnp.sum(
      mass_SN * jnp.exp(terms.anchor(top_SN) - shift_N[None]), axis=0
    )
    return (new_N, mass_N, target_N + target_SN.sum(axis=0), total_N + total_SN.sum(axis=0)), None

  zero_N = terms.zeros((N,), jnp.float32, embeddings_ND)
  start = (zero_N - jnp.inf, zero_N, zero_N, zero_N)
  (top_N, mass_N, target_N, total_N), _ = jax.lax.scan(
    body, start, jnp.arange(V // run, dtype=jnp.int32)
  )
  return Statistics(
    terms.finish_exponentials(top_N, mass_N), target_N, total_N if options.total else zero_N
  )


def gradients(
  embeddings_ND: jax.Array,
  classifier_VD: jax.Array,
  labels_N: jax.Array,
  bias_V: jax.Array | None,
  rows: Rows,
  options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Gradients of E, C and b in float32, block of logits by block of logits."""
  N, V = labels_N.size, classifier_VD.shape[0]
  size, run = run_length(N, TILE * WARPGROUPS), run_length(V, TILE)
  shown_ND = jnp.where(
    rows.active_N[:, None], embeddings_ND, 0.0
  )  # NaN of an inactive row must not reach dC
  out = [jax.ShapeDtypeStruct((size, run), embeddings_ND.dtype)]
  scratch = plgpu.SMEM(
    (WARPGROUPS, TILE, TILE),
    embeddings_ND.dtype,
    transforms=(plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128)),
  )
  vectors = (rows.lse_N, rows.scale_N, rows.at_target_N, rows.offset_N)
  end = functools.partial(end_with_gradient, options=options)
  weights = tiling.Weights(classifier_VD, bias_V, None, options)

  def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
    sums, de_ND = carry
    row, entry = index // (V // run) * size, index % (V // run) * run
    tiles = (size // (TILE * WARPGROUPS), run // TILE)
    arrays = (shown_ND, classifier_VD, labels_N)
    (g_RW,) = launch(
      end, jnp.stack([row, entry]), arrays, vectors, bias_V, tiles, out, scratch, options
    )
    e_RD = jax.lax.dynamic_slice_in_dim(shown_ND, row, size)
    tile = tiling.cut(weights, index % (V // run), run)
    de_ND = tiling.add_rows(de_ND, tiling.product("rv,vd->rd", g_RW, tile.classifier), row)
    db_W = jnp.sum(g_RW, axis=0, dtype=jnp.float32)
    return (
      tiling.add_tile(sums, tiling.product("rv,rd->vd", g_RW, e_RD), db_W, tile, weights),
      de_ND,
    ), None

  start = (
    tiling.no_gradients(weights, jnp.float32, embeddings_ND),
    terms.zeros(embeddings_ND.shape, jnp.float32, embeddings_ND),
  )
  blocks_of_logits = jnp.arange((N // size) * (V // run), dtype=jnp.int32)
  (sums, de_ND), _ = jax.lax.scan(body, start, blocks_of_logits)
  return de_ND, sums.classifier, sums.bias_V
