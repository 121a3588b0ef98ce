"""Holds what Hopper kernels (Pallas Mosaic GPU) share: launch, layouts of shared memory, loads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.shards import vary_together

WARPGROUPS = 2
"""Warpgroups that compute, beside one that copies."""

SWIZZLE_BYTES = 128

SMEM_BYTES = 227 * 1024
"""Shared memory that a program may use."""

ROWS = 64
"""Rows that a warpgroup multiplies at least."""

WIDEST = 256
"""Columns of a product at most."""


def swizzled(dtype: Any) -> tuple[Any, Any]:
  """Returns the transforms of shared memory whose rows TMA and wgmma read in 128-byte pieces."""
  lanes = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(SWIZZLE_BYTES)


def launch(body: Callable[..., None], interpret: Any, **options: Any) -> Callable[..., Any]:
  """Returns a function that runs a kernel, with the options of `plgpu.kernel`.

  `interpret` is False, True or `plgpu.InterpretGPUParams`. Results vary over the mesh axes that one
  of the arguments varies over, which `plgpu.kernel` does not say.
  """
  if interpret:
    default: Any = plgpu.__dict__["InterpretGPUParams"]  # not in jax 0.10
    options["interpret"] = default() if interpret is True else interpret
  kernel = plgpu.kernel(
    body,
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    **options,
  )

  def run(*arrays: Any) -> Any:
    return vary_together(kernel(*arrays), arrays)[0]

  return run


def load(ref: Any, layout: Any) -> jax.Array:
  """Loads a reference, of shared or global memory, into registers in this layout."""
  # jax 0.10 requires an index beside the reference, 0.11 deprecates it, 0.12 has dropped it.
  index = inspect.signature(plgpu.load).parameters.get("idx")
  whole = ((),) if index is not None and index.default is inspect.Parameter.empty else ()
  return plgpu.load(ref, *whole, layout=layout, optimized=False)


load_rows = functools.partial(load, layout=plgpu.Layout.WGMMA.reduce(1))
"""Loads a number for each row of a wgmma accumulator."""

load_columns = functools.partial(load, layout=plgpu.Layout.WGMMA.reduce(0))
"""Loads a number for each column of a wgmma accumulator."""


def load_transposed(ref: Any) -> jax.Array:
  """Loads the transpose of swizzled shared memory [n, m] as a wgmma accumulator holds [m, n]."""
  return plgpu.layout_cast(
    load(ref.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA
  )


def multiply(*pairs: tuple[Any, Any]) -> jax.Array:
  """Returns the sum of the products of pairs of tiles in shared memory, float32."""

  def accumulate(acc: Any) -> jax.Array:
    for a, b in pairs:
      plgpu.wgmma(acc, a, b)
    return acc[...]

  shape = pairs[0][0].shape[0], pairs[0][1].shape[1]
  return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
  """Returns a float32 constant in the layout of an accumulator, or of its rows for one axis."""
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def counted(shape: tuple[int, int], axis: int) -> jax.Array:
  """Returns the row (axis 0) or column (1) of each entry of an accumulator, int32."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def along_rows(value_R: jax.Array, columns: int) -> jax.Array:
  """Repeats a number of each row over columns."""
  return jax.lax.broadcast_in_dim(value_R, (value_R.shape[0], columns), [0])
