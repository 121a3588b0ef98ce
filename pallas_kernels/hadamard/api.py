"""`hadamard` and `hadamard_quantize`: Hadamard rotations, and their codes in the same pass.

Here: the public functions, what they refuse, and the choice of implementation; gradients are in
`autodiff`.
"""

# R rows, W width of the rotated axis
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import shards
from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import choose_implementation
from pallas_kernels.hadamard import autodiff, codes
from pallas_kernels.hadamard.autodiff import Rotated, Setting
from pallas_kernels.hadamard.codes import FORMATS, QUEST_BITS, Quantizer
from pallas_kernels.hadamard.matrices import Rotation, plan_rotation

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def hadamard(
  x: jax.Array,
  *,
  signs: jax.Array | None = None,
  block: int | None = None,
  base: int = 1,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns y = (x . signs) H_n / sqrt(n) along the last axis, in x's dtype.

  H_n is Sylvester's matrix in natural order, symmetric with H H = n I, so that the function is
  its own inverse without signs. Sums are float32 (float64 for float64 inputs).

  Args:
    x: floating [..., W].
    signs: +1 or -1, [W]. They are constants: no gradient flows to them.
    block: rotates each `block` consecutive elements alone; by default n = W.
    base: 1, 12, 20, 28 or 40; n must be base times a power of two, and the matrix is
      H_base (x) H_{n / base}, symmetric too. Other sizes raise: nothing is padded.
    implementation: None takes "pallas_tpu" on a TPU and "pallas_gpu" on Hopper where they can run,
      else "xla". A named one runs or raises. Both take float32 and bfloat16, "pallas_gpu" float16,
      too, and W a multiple of 128; "pallas_gpu" takes orders up to 8192.
    interpret: True, or the parameters of a simulator of its chip, runs a named kernel on CPU.

  Raises:
    UserError: shapes, dtypes, orders, and signs that are known not to be +-1.
    UnsupportedError: what the named implementation cannot do; a rotated axis that is spread over a
      mesh axis.
  """
  rotation = plan_rotation(check_array(x), block, base)
  signs = check_signs(signs, rotation.width)
  module = choose(implementation, x, rotation, None, interpret)
  setting = Setting(module, rotation, None, interpret)
  return on_rows(functools.partial(autodiff.rotate, setting=setting), x, signs, None)


def hadamard_quantize(
  x: jax.Array,
  *,
  group: int,
  dtype: codes.FormatName,
  scale: codes.ScaleRule = "absmax",
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  signs: jax.Array | None = None,
  block: int | None = None,
  base: int = 1,
  values: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> Any:
  """Returns the codes of `hadamard(x)`, without writing the rotated array to memory.

  Args:
    x, signs, block, base, implementation, interpret: as of `hadamard`. Kernels take groups that are
      multiples of 128, and not "mxfp4"; "pallas_gpu" takes "quest" from jax 0.12 on.
    group: consecutive elements that share a scale; divides the last axis.
    dtype: "int8", "int4", "e4m3fn", "e5m2" or "mxfp4" (e2m1 with a power of two for scale; its
      groups are usually 32).
    scale: "absmax" puts a group's largest |y| on the largest code (127, 7, 448, 57344, 6); a zero
      group has scale 1. "quest", for int8 and int4, is the mid-rise grid whose clip is optimal for
      a normal distribution of the group's RMS (arXiv 2502.05003); code c stands for c + 1/2.
    rounding: "nearest" (half to even) or "stochastic", which needs `key` and is unbiased; only with
      "absmax". The noise is made outside of the kernel and read by it, 4 bytes an element.
    values: return the dequantised values in x's dtype in place of the codes. They have a gradient,
      the straight-through one: dx = ((dy . trust_mask) H) . signs / sqrt(n).

  Returns:
    `Rotated`, whose gradient raises; or, with `values`, an array of x's shape and dtype.

  Raises:
    As `hadamard`, and UserError for groups, formats and roundings that do not fit.
  """
  rotation = plan_rotation(check_array(x), block, base)
  signs = check_signs(signs, rotation.width)
  quantizer = plan_quantizer(rotation.width, group, dtype, scale, rounding, key)
  module = choose(implementation, x, rotation, quantizer, interpret)
  setting = Setting(module, rotation, quantizer, interpret)
  noise = None if key is None else jax.random.uniform(key, x.shape)
  run = autodiff.rotate_to_values if values else autodiff.rotate_to_codes
  return on_rows(functools.partial(run, setting=setting), x, signs, noise)


def dequantize(rotated: Rotated) -> jax.Array:
  """Returns the float32 numbers, still rotated, that codes and scales stand for."""
  scale = "absmax" if rotated.trust_mask is None else "quest"
  return codes.decode(rotated.codes, rotated.scales, scale)


def on_rows(
  run: Callable[..., Any], x: jax.Array, signs: jax.Array | None, noise: jax.Array | None
) -> Any:
  """Calls `run(x_RW, signs_W, noise_RW)` on every device's rows and restores the leading axes."""
  last = "..."[: x.ndim - 1] + "W"
  if axes := shards.sharded_axes(x, x.ndim - 1):
    raise UnsupportedError(
      f"x={jax.typeof(x)}: its last axis is spread over {axes}, and each device needs all of it "
      f"({last}): gather it first"
    )
  leading = tuple(shards.sharded_axes(x, i) for i in range(x.ndim - 1))

  def local(x: jax.Array, signs: jax.Array | None, noise: jax.Array | None) -> Any:
    def as_rows(array: jax.Array | None) -> jax.Array | None:
      return None if array is None else array.reshape(-1, x.shape[-1])

    result = run(as_rows(x), signs, as_rows(noise))
    return jax.tree.map(lambda array: array.reshape(*x.shape[:-1], array.shape[-1]), result)

  if not any(leading):
    return local(x, signs, noise)
  layout = (*leading, ())
  out_specs = P(*(axes or None for axes in leading))
  layouts = (layout, ((),), layout)
  return shards.run_on_shards(local, (x, signs, noise), layouts, out_specs, check_vma=False)


def choose(
  implementation: Implementation | None,
  x: jax.Array,
  rotation: Rotation,
  quantizer: Quantizer | None,
  interpret: Any,
) -> ModuleType:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""
  rows = jax.ShapeDtypeStruct((x.size // rotation.width, rotation.width), x.dtype)

  def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")

  def unsupported(name: str) -> str | None:
    return load(name).unsupported(rows, rotation, quantizer, interpret)

  return load(choose_implementation("hadamard", implementation, KERNELS, unsupported, interpret))


def check_array(x: jax.Array) -> int:
  """Checks x and returns the size of its last axis."""
  check(x.ndim > 0, "x.shape", tuple(x.shape), "must have at least one axis")
  check_dtype("x", x, jnp.floating)
  return x.shape[-1]


def check_signs(signs: jax.Array | None, width: int) -> jax.Array | None:
  """Checks shape and dtype and, where they are known, values; returns float32 constants."""
  if signs is None:
    return None
  signs = jnp.asarray(signs)
  check_shape("signs", signs, (width,))
  good = jnp.issubdtype(signs.dtype, jnp.floating) or jnp.issubdtype(signs.dtype, jnp.signedinteger)
  check(good, "signs.dtype", str(signs.dtype), "must be floating or a signed integer")
  if not isinstance(signs, jax.core.Tracer) and signs.is_fully_addressable:
    wrong = np.asarray(signs)[np.abs(np.asarray(signs, np.float64)) != 1]
    check(wrong.size == 0, "signs", wrong[:8].tolist(), "must be +1 or -1")
  return jax.lax.stop_gradient(signs.astype(jnp.float32))


def plan_quantizer(
  width: int, group: Any, dtype: str, scale: str, rounding: str, key: jax.Array | None
) -> Quantizer:
  """Checks and returns the quantiser."""
  check_choice("dtype", dtype, tuple(FORMATS))
  check_choice("scale", scale, ("absmax", "quest"))
  check_choice("rounding", rounding, ("nearest", "stochastic"))
  good = isinstance(group, int) and not isinstance(group, bool) and group > 0
  check(good, "group", group, "must be a positive integer")
  check(width % group == 0, "group", group, f"must divide the last axis of x, {width}")
  stochastic = rounding == "stochastic"
  check(stochastic == (key is not None), "key", key, "goes with rounding='stochastic'")
  if scale == "quest":
    rule = f"scale='quest' takes {' or '.join(QUEST_BITS)} and rounding='nearest'"
    check(dtype in QUEST_BITS and not stochastic, "dtype, rounding", (dtype, rounding), rule)
  return Quantizer(group, dtype, scale, stochastic)
