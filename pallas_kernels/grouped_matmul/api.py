"""`grouped_matmul`: rows sorted by group, each times its group's matrix (mixtures of experts).

Here: the public function, what it refuses and the choice of implementation. Layouts of rows are in
`segments`, gradients in `autodiff`, products in `xla` and `pallas_tpu`.
"""

# T rows, K inner, N outer size of a matrix, E groups
from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import shards
from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.platform import choose_implementation
from pallas_kernels.fp8_matmul.codes import (
  SCALE_MODES,
  FormatName,
  ScaleMode,
  check_block,
  check_format,
  check_native,
  multiplies,
)
from pallas_kernels.grouped_matmul import autodiff
from pallas_kernels.grouped_matmul.segments import clip_sizes

Implementation = Literal["reference", "xla", "pallas_tpu"]
KERNELS = {"tpu": "pallas_tpu"}


def grouped_matmul(
  x_TK: jax.Array,
  w_EKN: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: Any = None,
  dtype: FormatName | None = None,
  bwd_dtype: FormatName | None = None,
  scale: ScaleMode = "f32",
  block: int = 128,
  allow_emulation: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns Y [T, N]: the first group_sizes[0] rows times w[0], the next times w[1], and so on.

  Rows past the sum of the sizes are 0. The gradient of a group's matrix is summed in float32, and
  exactly 0 for an empty group. NaN in a row reaches that row and the gradient of its group's
  matrix, and nothing else.

  Args:
    x_TK: floating [T, K], sorted by group.
    w_EKN: floating [E, K, N]; with `dtype` None of x's dtype.
    group_sizes_E: int32 [E], each at least 0, together at most T. Under jit negative sizes count as
      0 and rows past T do not exist.
    out_dtype: of Y; by default x's.
    dtype: None multiplies the numbers themselves. "e4m3fn", "e5m2" or "int8" multiplies in codes
      with a scale for each 128 numbers, as `fp8_matmul` does, for each group: rows in tiles of
      1 x 128, matrices in blocks of 128 x 128, and for the gradient of a matrix its group's rows,
      padded with zeros to whole blocks, in tiles of 128 x 1.
    bwd_dtype, scale, block, allow_emulation: as of `fp8_matmul`.
    implementation: None takes "pallas_tpu" on TPU where it can run the call, else "xla". A named
      one runs or raises. "xla" multiplies 128 rows at a time. "pallas_tpu" multiplies float32 and
      bfloat16 with JAX's megablox kernels, and codes, for which the chip needs a matrix unit, with
      its own: K and N multiples of 128, block 128.
    interpret: True, or `pltpu.InterpretParams(...)`, runs a named "pallas_tpu" on CPU.

  Raises:
    UserError: shapes, dtypes, options, and sizes that are known to be wrong.
    UnsupportedError: what the named implementation or the chip cannot do, and arrays that are
      spread over a mesh: call it inside shard_map, where group sizes are a device's own.
  """
  check_shape("x_TK", x_TK, (None, None))
  check_dtype("x_TK", x_TK, jnp.floating)
  T, K = x_TK.shape
  check_shape("w_EKN", w_EKN, (None, K, None))
  check_dtype("w_EKN", w_EKN, jnp.floating if dtype else x_TK.dtype)
  E, _, N = w_EKN.shape
  check(E > 0, "w_EKN.shape", w_EKN.shape, "must have at least one group")
  check_shape("group_sizes_E", group_sizes_E, (E,))
  check_dtype("group_sizes_E", group_sizes_E, jnp.integer)
  check_sizes(group_sizes_E, T)
  out_dtype = jnp.dtype(x_TK.dtype if out_dtype is None else out_dtype)
  check(jnp.issubdtype(out_dtype, jnp.floating), "out_dtype", str(out_dtype), "must be floating")
  native = check_formats(dtype, bwd_dtype, scale, block, allow_emulation, interpret)
  for name, array in (("x_TK", x_TK), ("w_EKN", w_EKN), ("group_sizes_E", group_sizes_E)):
    for dimension in range(array.ndim):
      shards.check_not_sharded(name, array, dimension)
  module = choose(implementation, x_TK, w_EKN, dtype, block, native, interpret)
  if 0 in (T, K, N):
    return jnp.zeros((T, N), out_dtype)
  options = autodiff.Options(
    dtype=dtype,
    bwd_dtype=bwd_dtype or dtype,
    scale=scale,
    block=block,
    out_dtype=out_dtype,
    native=native,
    implementation=module,
    interpret=interpret,
  )
  x_TK, w_EKN, sizes_E = shards.vary_together(x_TK, w_EKN, clip_sizes(group_sizes_E, T))
  return autodiff.product(x_TK, w_EKN, sizes_E, options)


def check_sizes(group_sizes_E: jax.Array, T: int) -> None:
  """Checks the sizes of groups where they are known."""
  if isinstance(group_sizes_E, jax.core.Tracer):
    return
  known_E = np.asarray(group_sizes_E)
  check(bool(np.all(known_E >= 0)), "group_sizes_E", known_E.tolist(), "must not be negative")
  rule = f"must add up to at most the {T} rows of x_TK"
  check(int(known_E.sum()) <= T, "group_sizes_E", known_E.tolist(), rule)


def check_formats(
  dtype: str | None,
  bwd_dtype: str | None,
  scale: str,
  block: int,
  allow_emulation: bool,
  interpret: Any,
) -> bool:
  """Checks the options of codes; returns whether the chip multiplies them as they are."""
  check_choice("scale", scale, SCALE_MODES)
  check_block(block)
  if dtype is None:
    check(bwd_dtype is None, "bwd_dtype", bwd_dtype, "goes with dtype=")
    return True
  bwd_dtype = bwd_dtype or dtype
  integers = [
    check_format(name, value).dtype == jnp.int8
    for name, value in (("dtype", dtype), ("bwd_dtype", bwd_dtype))
  ]
  rule = f"goes only with itself, dtype={dtype!r}"
  check(integers[0] == integers[1], "bwd_dtype", bwd_dtype, rule)
  if interpret:
    return True
  check_native("dtype", dtype, dtype, allow_emulation)
  check_native("bwd_dtype", bwd_dtype, dtype, allow_emulation)
  return multiplies(dtype, dtype) and multiplies(bwd_dtype, dtype)


def choose(
  implementation: str | None,
  x_TK: jax.Array,
  w_EKN: jax.Array,
  dtype: str | None,
  block: int,
  native: bool,
  interpret: Any,
) -> ModuleType:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""

  def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")

  def unsupported(name: str) -> str | None:
    return load(name).unsupported(x_TK, w_EKN, dtype, block, native, interpret)

  name = choose_implementation("grouped_matmul", implementation, KERNELS, unsupported, interpret)
  return load(name)
