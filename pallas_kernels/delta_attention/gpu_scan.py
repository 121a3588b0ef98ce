"""Goes from chunk to chunk on Hopper (Pallas Mosaic GPU), forward and, for gradients, back.

A program has 64 columns of one head's state in registers, float32, and a copy that products read.
TMA copies the operands of chunks ahead of their use. Columns of the state do not need each other.
"""

# M rows and heads, T positions, J chunks, C positions of a chunk, K width of keys, V width of
# values, all padded to tiles; W columns of a program
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper import (
  along_rows,
  launch,
  load,
  load_rows,
  multiply,
  swizzled,
)

CHUNK = 64
COLUMNS = 64


def stages_of(K: int) -> int:
  """Returns the number of chunks whose operands fit into shared memory together."""
  return 2 if K <= 128 else 1


class Operands(NamedTuple):
  """Holds what a pass reads: arrays [M, T, ..] outside, references or tiles of chunks inside."""

  q: Any  # [M, T, K], decayed from the chunk's start
  k: Any  # [M, T, K], decayed to its end
  visible: Any  # [M, T, C]
  erased: Any | None  # [M, T, K]; negative in the backward pass
  values: Any  # [M, T, V]: what the tokens add, float32; backward the output's gradient


class Scratch(NamedTuple):
  """Holds shared memory: operands of some chunks, and what a step writes."""

  operands: Operands
  copied: Any
  state_KW: Any
  added_CW: Any
  o_CW: Any


def scan_forward(
  operands: Operands, decay_MJK: jax.Array, first_MKV: jax.Array, interpret: Any, *, save: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns the output [M, T, V], the last state and, to be saved, the states [M, J, K, V].

  The first and last state are float32, the others have the operands' dtype.
  """
  (M, T, V), (_, J, K) = operands.values.shape, decay_MJK.shape
  dtype = operands.q.dtype
  outputs = [jax.ShapeDtypeStruct((M, T, V), dtype), jax.ShapeDtypeStruct((M, K, V), jnp.float32)]
  outputs += [jax.ShapeDtypeStruct((M, J, K, V), dtype)] if save else []
  o_MTV, last_MKV, *states = launch(
    functools.partial(forward_kernel, save=save),
    interpret,
    out_type=outputs,
    scratch_types=[make_scratch(operands, K)],
    grid=(M * (V // COLUMNS),),
    grid_names=("columns",),
  )(operands, decay_MJK, first_MKV)
  return o_MTV, last_MKV, states[0] if save else None


def forward_kernel(
  operands: Operands, decay_MJK: Any, first_MKV: Any, o_MTV: Any, last_MKV: Any, *rest, save: bool
) -> None:
  """Goes through the chunks of some columns of a head, from the first on."""
  *states, scratch = rest
  m, columns = head_and_columns(first_MKV)
  J, stages = decay_MJK.shape[1], stages_of(decay_MJK.shape[2])
  copy = functools.partial(copy_chunk, operands, m, columns, scratch)
  for j in range(min(stages, J)):
    copy(j, j)

  def step(j, state_KW):
    slot = jax.lax.rem(j, jnp.int32(stages))
    tiles = chunk_tiles(scratch, slot)
    scratch.state_KW[...] = state_KW.astype(scratch.state_KW.dtype)
    plgpu.commit_smem()
    if save:
      plgpu.copy_smem_to_gmem(scratch.state_KW, states[0].at[m, j, :, columns])
    plgpu.barrier_wait(scratch.copied.at[slot])
    added_CW = load(tiles.values, layout=plgpu.Layout.WGMMA)
    if tiles.erased is not None:
      added_CW = added_CW - multiply((tiles.erased, scratch.state_KW))
    scratch.added_CW[...] = added_CW.astype(scratch.added_CW.dtype)
    plgpu.commit_smem()
    o_CW = multiply((tiles.q, scratch.state_KW), (tiles.visible, scratch.added_CW))
    scratch.o_CW[...] = o_CW.astype(scratch.o_CW.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.o_CW, o_MTV.at[m, pl.ds(j * CHUNK, CHUNK), columns])
    new_KW = multiply((tiles.k.transpose((1, 0)), scratch.added_CW))
    pl.when(j + stages < J)(lambda: copy(j + stages, slot))
    plgpu.wait_smem_to_gmem(0)
    return state_KW * along_rows(load_rows(decay_MJK.at[m, j]), COLUMNS) + new_KW

  first_KW = load_state(first_MKV.at[m, :, columns])
  last_MKV.at[m, :, columns][...] = jax.lax.fori_loop(0, J, step, first_KW)


def scan_backward(
  operands: Operands, decay_MJK: jax.Array, dlast_MKV: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of what tokens add [M, T, V], of each chunk's next and the first state.

  The first state's is float32, the others have the operands' dtype.
  """
  (M, T, V), (_, J, K) = operands.values.shape, decay_MJK.shape
  dtype = operands.q.dtype
  return launch(
    backward_kernel,
    interpret,
    out_type=[
      jax.ShapeDtypeStruct((M, T, V), dtype),
      jax.ShapeDtypeStruct((M, J, K, V), dtype),
      jax.ShapeDtypeStruct((M, K, V), jnp.float32),
    ],
    scratch_types=[make_scratch(operands, K)],
    grid=(M * (V // COLUMNS),),
    grid_names=("columns",),
  )(operands, decay_MJK, dlast_MKV)


def backward_kernel(
  operands: Operands,
  decay_MJK: Any,
  dlast_MKV: Any,
  dadded_MTV: Any,
  dnext_MJKV: Any,
  dfirst_MKV: Any,
  scratch: Scratch,
) -> None:
  """Goes through the chunks of some columns of a head, from the last back."""
  m, columns = head_and_columns(dlast_MKV)
  J, stages = decay_MJK.shape[1], stages_of(decay_MJK.shape[2])
  copy = functools.partial(copy_chunk, operands, m, columns, scratch)
  for i in range(min(stages, J)):
    copy(J - 1 - i, i)

  def step(i, dstate_KW):
    j, slot = J - 1 - i, jax.lax.rem(i, jnp.int32(stages))
    tiles = chunk_tiles(scratch, slot)
    scratch.state_KW[...] = dstate_KW.astype(scratch.state_KW.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.state_KW, dnext_MJKV.at[m, j, :, columns])
    plgpu.barrier_wait(scratch.copied.at[slot])
    dadded_CW = multiply(
      (tiles.visible.transpose((1, 0)), tiles.values), (tiles.k, scratch.state_KW)
    )
    scratch.added_CW[...] = dadded_CW.astype(scratch.added_CW.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.added_CW, dadded_MTV.at[m, pl.ds(j * CHUNK, CHUNK), columns])
    pairs = [(tiles.q.transpose((1, 0)), tiles.values)]
    if tiles.erased is not None:
      pairs.append((tiles.erased.transpose((1, 0)), scratch.added_CW))
    new_KW = multiply(*pairs)
    pl.when(i + stages < J)(lambda: copy(j - stages, slot))
    plgpu.wait_smem_to_gmem(0)
    return dstate_KW * along_rows(load_rows(decay_MJK.at[m, j]), COLUMNS) + new_KW

  dlast_KW = load_state(dlast_MKV.at[m, :, columns])
  dfirst_MKV.at[m, :, columns][...] = jax.lax.fori_loop(0, J, step, dlast_KW)


def head_and_columns(state_MKV: Any) -> tuple[Any, Any]:
  """Returns the head of a program and the slice of its columns."""
  program, blocks = jax.lax.axis_index("columns"), jnp.int32(state_MKV.shape[2] // COLUMNS)
  return jax.lax.div(program, blocks), pl.ds(jax.lax.rem(program, blocks) * COLUMNS, COLUMNS)


def load_state(ref_KW: Any) -> jax.Array:
  """Loads the columns of a state from global memory.

  On a mesh what is loaded varies over its axes, what is computed in a kernel does not, and a loop
  needs both alike: so 0 is added.
  """
  return load(ref_KW, layout=plgpu.Layout.WGMMA) + 0.0


def make_scratch(operands: Operands, K: int) -> Scratch:
  """Returns the shared memory of a program."""
  dtype, stages = operands.q.dtype, stages_of(K)

  def tile(*shape: int, dtype: Any = dtype) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

  staged = functools.partial(tile, stages, CHUNK)
  return Scratch(
    operands=Operands(
      q=staged(K),
      k=staged(K),
      visible=staged(CHUNK),
      erased=None if operands.erased is None else staged(K),
      values=staged(COLUMNS, dtype=operands.values.dtype),
    ),
    copied=plgpu.Barrier(num_arrivals=sum(x is not None for x in operands), num_barriers=stages),
    state_KW=tile(K, COLUMNS),
    added_CW=tile(CHUNK, COLUMNS),
    o_CW=tile(CHUNK, COLUMNS),
  )


def copy_chunk(
  operands: Operands, m: Any, columns: Any, scratch: Scratch, j: Any, slot: Any
) -> None:
  """Begins to copy the operands of a chunk."""
  rows = pl.ds(j * CHUNK, CHUNK)
  for source, tile in zip(operands[:4], scratch.operands[:4]):
    if source is not None:
      plgpu.copy_gmem_to_smem(source.at[m, rows], tile.at[slot], scratch.copied.at[slot])
  values = operands.values.at[m, rows, columns]
  plgpu.copy_gmem_to_smem(values, scratch.operands.values.at[slot], scratch.copied.at[slot])


def chunk_tiles(scratch: Scratch, slot: Any) -> Operands:
  """Returns the tiles of one stage."""
  return Operands(*(None if tile is None else tile.at[slot] for tile in scratch.operands))
