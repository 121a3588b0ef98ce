"""`lowbit_matmul`: a product with weights of 1 to 8 bits that stay packed in memory.

Here: the public function, what it refuses, the choice of implementation, and the gradient.
"""

# M rows, K inner, N outer size of a matrix, G groups of K
from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.common import shards
from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import choose_implementation
from pallas_kernels.lowbit_matmul.packing import FORMATS, FormatName, check_packed

Implementation = Literal["reference", "xla", "pallas_tpu"]
KERNELS = {"tpu": "pallas_tpu"}


class Setting(NamedTuple):
  """Holds what is static in a call."""

  name: str
  group: int
  dtype: FormatName
  out_dtype: Any
  interpret: Any


def lowbit_matmul(
  x: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  *,
  dtype: FormatName,
  group: int | None = None,
  zeros_GN: jax.Array | None = None,
  out_dtype: Any = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Returns x W with W[k, n] = s[k / group, n] (q[k, n] - z[k / group, n]), without W in memory.

  Sums are float32 (float64 for float64 inputs). Only x has a gradient; one of scales or zeros
  raises: train the weights that are packed later with a fake quantiser, whose rounding passes
  gradients on (`jaxlm.quant`).

  Args:
    x: floating [..., K].
    packed: uint8 codes of `pack`, [K / codes per byte, N].
    scales_GN: floating [ceil(K / group), N]; 0 makes its weights 0.
    dtype: "int8", "int4", "int2", "ternary" (-1, 0, 1) or "binary" (-1, 1).
    group: consecutive k that share a scale; by default all of K.
    zeros_GN: floating, of the scales' shape: the code, not necessarily whole, that stands for 0.
    out_dtype: by default x's.
    implementation: None takes "pallas_tpu" on TPU where it can run the call, else "xla". A named
      one runs or raises. "xla" dequantises about 256 k at a time, and makes the gradient of x for
      "pallas_tpu" too. "pallas_tpu" takes float32 and bfloat16, with groups that divide 128 (256
      for "binary") or are multiples of it; a K that is no such multiple costs a padded copy.
    interpret: True, or `pltpu.InterpretParams(...)`, runs a named "pallas_tpu" on CPU.

  Returns:
    [..., N].

  Raises:
    UserError: shapes, dtypes, options.
    UnsupportedError: what the named implementation cannot do, a gradient of scales or zeros, and a
      K that is spread over a mesh axis.
  """
  check_choice("dtype", dtype, tuple(FORMATS))
  check(x.ndim > 0, "x.shape", tuple(x.shape), "must have at least one axis")
  check_dtype("x", x, jnp.floating)
  K = x.shape[-1]
  check(K > 0, "x.shape", tuple(x.shape), "K must be at least 1")
  check_packed(packed, FORMATS[dtype], K)
  N = packed.shape[1]
  group = K if group is None else group
  good = isinstance(group, int) and not isinstance(group, bool) and group > 0
  check(good, "group", group, "must be a positive integer or None")
  group = min(group, K)
  check_shape("scales_GN", scales_GN, (-(-K // group), N))
  check_dtype("scales_GN", scales_GN, jnp.floating)
  if zeros_GN is not None:
    check_shape("zeros_GN", zeros_GN, scales_GN.shape)
    check_dtype("zeros_GN", zeros_GN, jnp.floating)
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  check(jnp.issubdtype(out_dtype, jnp.floating), "out_dtype", str(out_dtype), "must be floating")
  name = choose(implementation, x, N, group, dtype, interpret)
  setting = Setting(name, group, dtype, out_dtype, interpret)
  return on_shards(x, packed, scales_GN, zeros_GN, setting)


def on_shards(
  x: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  setting: Setting,
) -> jax.Array:
  """Multiplies every device's rows with its columns."""
  weights = dict(packed_KN=packed, scales_GN=scales_GN, zeros_GN=zeros_GN)
  for label, array in weights.items():
    if array is not None:
      shards.check_not_sharded(label, array, 0)
  if axes := shards.sharded_axes(x, x.ndim - 1):
    raise UnsupportedError(
      f"x={jax.typeof(x)}: its K is spread over {axes}, and each device needs all of it: gather it"
    )
  leading = tuple(shards.sharded_axes(x, i) for i in range(x.ndim - 1))
  columns = shards.sharded_axes(packed, 1)

  def local(
    x: jax.Array, packed: jax.Array, scales_GN: jax.Array, zeros_GN: jax.Array | None
  ) -> jax.Array:
    N = packed.shape[1]
    if 0 in (*x.shape, N):
      return jnp.zeros((*x.shape[:-1], N), setting.out_dtype)
    arrays = shards.vary_together(x.reshape(-1, x.shape[-1]), packed, scales_GN, zeros_GN)
    return product(*arrays, setting).reshape(*x.shape[:-1], N)

  arrays = (x, packed, scales_GN, zeros_GN)
  if not any((*leading, columns)):
    return local(*arrays)
  layouts = ((*leading, ()), ((), columns), ((), columns), ((), columns))
  out_specs = P(*(axes or None for axes in (*leading, columns)))
  return shards.run_on_shards(local, arrays, layouts, out_specs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def product(
  x_MK: jax.Array,
  packed: jax.Array,
  scales_GN: jax.Array,
  zeros_GN: jax.Array | None,
  setting: Setting,
) -> jax.Array:
  """Returns X W [M, N]."""
  options = dict(interpret=setting.interpret) if setting.name == "pallas_tpu" else {}
  arrays = (x_MK, packed, scales_GN, zeros_GN)
  y_MN = load(setting.name).multiply(*arrays, setting.group, setting.dtype, **options)
  return y_MN.astype(setting.out_dtype)


def forward(
  x_MK: Any, packed: Any, scales_GN: Any, zeros_GN: Any, setting: Setting
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Returns X W and what X's gradient needs; raises where another gradient is asked for."""
  for name, array in (("scales_GN", scales_GN), ("zeros_GN", zeros_GN)):
    if array is not None and array.perturbed:
      raise UnsupportedError(
        f"{name}: packed weights are not trained, only x has a gradient; train with a fake "
        "quantiser (jaxlm.quant) and pack its codes, or stop the gradient"
      )
  arrays = jax.tree.map(
    lambda primal: primal.value,
    (x_MK, packed, scales_GN, zeros_GN),
    is_leaf=lambda leaf: hasattr(leaf, "perturbed"),
  )
  return product(*arrays, setting), (
    *arrays[1:],
    jnp.zeros((0, arrays[0].shape[1]), arrays[0].dtype),
  )


def backward(setting: Setting, saved: tuple[Any, ...], dy_MN: Any) -> tuple[jax.Array | None, ...]:
  """Returns the gradient of X."""
  packed, scales_GN, zeros_GN, like_x = saved
  module = load("reference" if setting.name == "reference" else "xla")
  if isinstance(dy_MN, jax.custom_derivatives.SymbolicZero):
    dy_MN = jnp.zeros(dy_MN.shape, dy_MN.dtype)
  weights = (packed, scales_GN, zeros_GN, like_x.shape[1], setting.group, setting.dtype)
  return module.multiply_transposed(dy_MN, *weights).astype(like_x.dtype), None, None, None


product.defvjp(forward, backward, symbolic_zeros=True)


def choose(
  implementation: Implementation | None,
  x: jax.Array,
  N: int,
  group: int,
  dtype: FormatName,
  interpret: Any,
) -> str:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""
  rows = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)

  def unsupported(name: str) -> str | None:
    return load(name).unsupported(rows, N, group, dtype, interpret)

  return choose_implementation("lowbit_matmul", implementation, KERNELS, unsupported, interpret)


def load(name: str) -> ModuleType:
  """Returns the module of an implementation, imported when it is first chosen."""
  return importlib.import_module(f"{__package__}.{name}")
