"""`fp8_matmul`: a differentiable product in 8-bit codes with a scale for each block of 128.

Here: the product, what it refuses, the choice of implementation, and meshes. The arithmetic of
codes is in `codes`, the gradient in `autodiff`, the products in `xla`, `pallas_tpu` and
`pallas_gpu`, and what multiplies codes that stand alone in `steps`.
"""

# Y[M, N] = X[M, K] W[K, N]; an X with more axes keeps them in place of M
from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import shards
from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import choose_implementation, device_kind
from pallas_kernels.fp8_matmul import autodiff
from pallas_kernels.fp8_matmul.codes import (
  SCALE_MODES,
  FormatName,
  ScaleMode,
  check_block,
  check_format,
  check_native,
  multiplies,
)

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def fp8_matmul(
  x_MK: jax.Array,
  w_KN: jax.Array,
  *,
  dtype: FormatName = "e4m3fn",
  bwd_dtype: FormatName | None = None,
  scale: ScaleMode = "f32",
  block: int = 128,
  save: Literal["bf16", "fp8"] = "bf16",
  out_dtype: Any = None,
  allow_emulation: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns X W, computed and differentiated in 8-bit codes (DeepSeek-V3, section 3.3).

  X and the gradient of Y have a scale for each tile of 128 numbers along the contracted axis, in
  both passes: they are quantised once along rows and once along columns. W has one for each block
  of 128 x 128, and the backward pass multiplies with the same codes of it. Each product over 128
  contracted numbers is scaled and added in float32. Rounding has the gradient of the identity. A
  block that holds NaN or infinity dequantises to NaN, in the products over that block alone.

  Args:
    x_MK: floating [..., K]. The tiles of the weight's gradient run along all axes but the last,
      flattened; on a mesh along those of a device's shard.
    w_KN: floating [K, N].
    dtype: the codes of X and W: "e4m3fn", "e5m2" or "int8".
    bwd_dtype: the codes of Y's gradient; None: as `dtype`. "int8" goes with itself alone.
    scale: "f32", or "pow2" for scales rounded up to powers of two.
    block: what a scale covers. 128 for the recipe; a TPU whose matrix unit is 256 deep is half
      empty then, and filled with 256.
    save: "bf16" keeps X for the backward pass as it came; "fp8" its codes, which "pow2" scales
      alone can requantise along the other axis without a second error.
    out_dtype: of Y; by default X's. X's gradient has X's dtype; W's is summed in float32 and has
      W's dtype.
    allow_emulation: multiplies codes for which the chip has no matrix unit as wider floats,
      exactly but not faster, where they are otherwise refused.
    implementation: None takes "pallas_tpu" on TPU and "pallas_gpu" on Hopper where they can run
      the call, else "xla", and logs its choice once; a named one runs or raises. "reference"
      multiplies dequantised matrices.
    interpret: runs a named Pallas implementation on CPU. True, or the parameters of a simulator of
      its chip.

  Returns:
    [..., N].

  Raises:
    UserError: shapes, dtypes, options.
    UnsupportedError: codes that the chip only emulates, what a named implementation cannot do, and
      mesh axes that cut a block of the contracted axis.
  """
  check_dtype("x_MK", x_MK, jnp.floating)
  check_dtype("w_KN", w_KN, jnp.floating)
  check_shape("w_KN", w_KN, (None, None))
  check(x_MK.ndim >= 2, "x_MK.shape", x_MK.shape, "must have at least 2 axes")
  check_shape("x_MK", x_MK, (*x_MK.shape[:-1], w_KN.shape[0]))
  options = check_options(
    dtype=dtype,
    bwd_dtype=bwd_dtype,
    scale=scale,
    block=block,
    save=save,
    out_dtype=x_MK.dtype if out_dtype is None else out_dtype,
    allow_emulation=allow_emulation,
    implementation=implementation,
    interpret=interpret,
  )
  return _on_shards(x_MK, w_KN, options)


def _on_shards(x_MK: jax.Array, w_KN: jax.Array, options: autodiff.Options) -> jax.Array:
  """Multiplies every device's shards, and sums over the devices that share the contracted axis."""
  *free, summed = (shards.sharded_axes(x_MK, axis) for axis in range(x_MK.ndim))
  w_summed, columns = (shards.sharded_axes(w_KN, axis) for axis in range(2))
  if not any((*free, summed, w_summed, columns)):
    return _local(x_MK, w_KN, options=options)
  kind = jax.typeof(w_KN)
  check(w_summed == summed, "w_KN", kind, f"its K must be spread like X's, over {summed}")
  used = {axis for axes in (*free, summed) for axis in axes}
  both = used & set(columns)
  check(not both, "w_KN", kind, f"its N and an axis of X are both spread over {sorted(both)}")
  for axis, axes in ((0, summed), (1, columns)):
    devices = math.prod(kind.sharding.mesh.shape[name] for name in axes)
    if devices > 1 and w_KN.shape[axis] // devices % options.block:
      raise UnsupportedError(
        f"w_KN={kind}: each of {devices} devices would have {w_KN.shape[axis] // devices} of its "
        f"axis {axis}, which cuts blocks of {options.block}"
      )
  layouts = ((*free, summed), (summed, columns))
  out_specs = P(*(axes or None for axes in (*free, columns)))
  local = functools.partial(_local, options=options, summed=summed)
  return shards.run_on_shards(local, (x_MK, w_KN), layouts, out_specs)


def _local(
  x_MK: jax.Array, w_KN: jax.Array, *, options: autodiff.Options, summed: shards.Axes = ()
) -> jax.Array:
  """Multiplies on one device; empty matrices have the product 0."""
  *free, K = x_MK.shape
  N = w_KN.shape[1]
  if 0 in (*free, K, N):
    return jnp.zeros((*free, N), options.out_dtype)
  x_MK, w_KN = shards.vary_together(x_MK, w_KN)
  y_MN = autodiff.product(x_MK.reshape(-1, K), w_KN, options).reshape(*free, N)
  return jax.lax.psum(y_MN, summed) if summed else y_MN


def check_options(
  *,
  dtype: str,
  bwd_dtype: str | None,
  scale: str,
  block: int,
  save: str,
  out_dtype: Any,
  allow_emulation: bool,
  implementation: str | None,
  interpret: Any,
) -> autodiff.Options:
  """Checks the options of a differentiable product and chooses its implementation."""
  bwd_dtype = dtype if bwd_dtype is None else bwd_dtype
  forms = check_format("dtype", dtype), check_format("bwd_dtype", bwd_dtype)
  rule = f"goes only with itself, dtype={dtype!r}"
  check((forms[0].dtype == jnp.int8) == (forms[1].dtype == jnp.int8), "bwd_dtype", bwd_dtype, rule)
  check_choice("scale", scale, SCALE_MODES)
  check_choice("save", save, ("bf16", "fp8"))
  rule = 'needs scale="pow2": codes with float32 scales cannot be requantised without more error'
  check(save == "bf16" or scale == "pow2", "save", save, rule)
  check_block(block)
  out_dtype = jnp.dtype(out_dtype)
  check(jnp.issubdtype(out_dtype, jnp.floating), "out_dtype", str(out_dtype), "must be floating")
  if not interpret:
    check_native("dtype", dtype, dtype, allow_emulation)
    check_native("bwd_dtype", bwd_dtype, dtype, allow_emulation)
  native = bool(interpret) or (multiplies(dtype, dtype) and multiplies(bwd_dtype, dtype))
  return autodiff.Options(
    dtype=dtype,
    bwd_dtype=bwd_dtype,
    scale=scale,
    block=block,
    save=save,
    out_dtype=out_dtype,
    implementation=choose(implementation, block, (dtype, bwd_dtype), interpret),
    native=native,
    interpret=interpret,
  )


def choose(
  implementation: str | None, block: int, formats: tuple[str, str], interpret: Any
) -> ModuleType:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""

  def unsupported(name: str) -> str | None:
    return _load(name).unsupported(block, formats, interpret)

  name = choose_implementation("fp8_matmul", implementation, KERNELS, unsupported, interpret)
  return _load(name)


def _load(name: str) -> ModuleType:
  """Imports the module of an implementation when it is first chosen."""
  return importlib.import_module(f"{__package__}.{name}")


def describe(**options: Any) -> dict[str, str]:
  """Returns in words what `fp8_matmul` does with these options here, for each of its products.

  The keys are "forward", "input gradient" and "weight gradient". Raises what the call would.
  """
  defaults: dict[str, Any] = dict(
    dtype="e4m3fn",
    bwd_dtype=None,
    scale="f32",
    block=128,
    save="bf16",
    out_dtype=jnp.bfloat16,
    allow_emulation=False,
    implementation=None,
    interpret=False,
  )
  chosen = check_options(**(defaults | options))
  b, scale = chosen.block, chosen.scale
  where = f"{chosen.implementation.__name__.rpartition('.')[2]} on {device_kind()}"
  how = where if chosen.native else f"{where}, emulated"

  def in_words(left: str, left_tile: str, right: str, right_tile: str) -> str:
    return f"{left} {left_tile} x {right} {right_tile}, {scale} scales, {how}"

  flat, tall, square = f"1x{b}", f"{b}x1", f"{b}x{b}"
  return {
    "forward": in_words(chosen.dtype, flat, chosen.dtype, square),
    "input gradient": in_words(chosen.bwd_dtype, flat, chosen.dtype, square),
    "weight gradient": in_words(chosen.dtype, tall, chosen.bwd_dtype, tall),
  }
