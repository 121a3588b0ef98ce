"""Gives products of 8-bit codes and quantisers in several libraries, as functions to be timed."""

# P, Q rows of the operands and sides of the product, C contracted: both operands lie along C
from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import FORMATS, Quantized, quantize_blocks, quantize_tiles
from pallas_kernels.fp8_matmul import scaled_matmul as multiply_codes
from pallas_kernels.hadamard import hadamard_quantize

BLOCK = 128
Run = Callable[[], Any]
"""Returns its library's array when all is done; where it is a quantiser, codes and scales."""
Maker = Callable[[], Run]
"""Prepares a run; raises where its library is missing or cannot run here."""
Arms = Iterator[tuple[str, float, Maker]]
"""Names, tolerances against the reference, and makers."""
SAME_CODES = 1e-4
"""Fraction of codes that may differ: sums in another order decide ties otherwise."""


class Problem(NamedTuple):
  """Holds one product of the recipe: operands in bfloat16 and in codes, and its results' dtype."""

  name: str
  a_PC: jax.Array
  b_QC: jax.Array
  a: Quantized
  """codes [P, C], scales [P, C / 128]"""
  b: Quantized
  """codes [Q, C], scales [Q, C / 128] or [Q / 128, C / 128]"""
  dtype: Any

  @property
  def flops(self) -> float:
    """Returns the operations of the product."""
    return 2.0 * self.a_PC.size * self.b_QC.shape[0]


def problems(M: int, K: int, N: int) -> Iterator[Problem]:
  """Yields the three products of Y = X W, with normal numbers."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((M, K), (K, N), (M, N))
  x_MK, w_KN, dy_MN = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes))

  @jax.jit
  def quantize(array: jax.Array) -> Quantized:
    return quantize_tiles(array, 1)

  squares = jax.jit(quantize_blocks)
  y_dtype = jnp.bfloat16
  yield Problem("forward", x_MK, w_KN.T, quantize(x_MK), squares(w_KN.T), y_dtype)
  yield Problem("input gradient", dy_MN, w_KN, quantize(dy_MN), squares(w_KN), y_dtype)
  x_KM, dy_NM = x_MK.T, dy_MN.T
  yield Problem("weight gradient", x_KM, dy_NM, quantize(x_KM), quantize(dy_NM), jnp.float32)


def reference(problem: Problem) -> jax.Array:
  """Returns the float32 product of the dequantised operands."""
  multiply = jax.jit(lambda a, b: _ours(a, b, jnp.float32, "reference"))
  return multiply(problem.a, problem.b)


def product_arms(problem: Problem, platform: str) -> Arms:
  """Yields the arms of a product, the yardstick first.

  The yardstick multiplies what was not quantised. Comparators get this project's codes.
  """
  yield "bfloat16, XLA", 6e-2, lambda: _bfloat16(problem)
  for name in implementations(platform):
    yield f"fp8_matmul, {name}", 4e-3, lambda name=name: _jax_product(problem, name)
  yield "qwix, 2-D tiles", 4e-3, lambda: _qwix(problem)
  if platform == "gpu":
    yield "torch scaled_mm, by block", 4e-3, lambda: _torch_scaled_mm(problem)
    yield "torchao (Triton)", 4e-3, lambda: _torchao(problem)


def implementations(platform: str) -> tuple[str, ...]:
  """Returns the implementations that run on a platform, but for the reference."""
  kernels = {"gpu": ("pallas_gpu",), "tpu": ("pallas_tpu",)}
  return ("xla", *kernels.get(platform, ()))


def _ours(a: Quantized, b: Quantized, dtype: Any, implementation: Any) -> jax.Array:
  return multiply_codes(
    a, b, axes=(1, 1), out_dtype=dtype, allow_emulation=True, implementation=implementation
  )


def _compiled(fn: Callable[..., Any], *args: Any) -> Run:
  program: Any = jax.jit(fn).lower(*args).compile()
  return lambda: jax.block_until_ready(program(*args))


def _bfloat16(problem: Problem) -> Run:
  def multiply(a_PC: jax.Array, b_QC: jax.Array) -> jax.Array:
    product = jnp.einsum("pc,qc->pq", a_PC, b_QC, preferred_element_type=jnp.float32)
    return product.astype(problem.dtype)

  return _compiled(multiply, problem.a_PC, problem.b_QC)


def _jax_product(problem: Problem, implementation: str) -> Run:
  return _compiled(lambda a, b: _ours(a, b, problem.dtype, implementation), problem.a, problem.b)


def _qwix(problem: Problem) -> Run:
  qwix = importlib.import_module("qwix")

  def multiply(a: Quantized, b: Quantized) -> jax.Array:
    operands = (qwix.QArray(qvalue=codes, scale=scales) for codes, scales in (a, b))
    contracted = (((1,), (1,)), ((), ()))
    product = qwix.dot_general(*operands, contracted, preferred_element_type=jnp.float32)
    return product.astype(problem.dtype)

  return _compiled(multiply, problem.a, problem.b)


def _torch_dtype(dtype: Any) -> Any:
  return getattr(importlib.import_module("torch"), jnp.dtype(dtype).name)


def _to_torch(array: jax.Array) -> Any:
  """Returns a tensor in the array's memory; 8-bit floats cross as bytes."""
  torch = importlib.import_module("torch")
  if array.dtype == jnp.float8_e4m3fn:
    codes = jax.lax.bitcast_convert_type(array, jnp.uint8)
    return torch.from_dlpack(codes).view(torch.float8_e4m3fn)
  return torch.from_dlpack(array)


def as_jax(results: Any) -> Any:
  """Returns what a run returned as an array, or as codes and scales."""
  if isinstance(results, jax.Array | Quantized):
    return results
  if isinstance(results, tuple):
    return Quantized(*map(as_jax, results))
  torch = importlib.import_module("torch")
  results = results.contiguous()
  if results.dtype == torch.float8_e4m3fn:
    codes = jnp.from_dlpack(results.view(torch.uint8))
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
  return jnp.from_dlpack(results)


def _on_torch(call: Callable[..., Any], *arrays: Any, **options: Any) -> Run:
  torch = importlib.import_module("torch")

  def run() -> Any:
    results = call(*arrays, **options)
    torch.cuda.synchronize()
    return results

  return run


def _along_rows(scales: Any) -> Any:
  """Returns a tensor of the same values whose first axis is the dense one."""
  return scales.t().contiguous().t()


def _torch_scaled_mm(problem: Problem) -> Run:
  """Multiplies by cuBLAS.

  It reads scales of tiles with dense rows, those of squares along C, padded to 4.
  """
  functional = importlib.import_module("torch.nn.functional")
  a, b = _to_torch(problem.a.codes), _to_torch(problem.b.codes)
  tiles = functional.ScalingType.BlockWise1x128
  b_scales, b_recipe = _to_torch(problem.b.scales), tiles
  if problem.b.scales.shape[0] == b.shape[0]:
    b_scales = _along_rows(b_scales)
  else:
    b_recipe = functional.ScalingType.BlockWise128x128
    b_scales = functional.pad(b_scales, (0, -b_scales.shape[1] % 4)).t()
  return _on_torch(
    functional.scaled_mm,
    a,
    b.t(),
    scale_a=_along_rows(_to_torch(problem.a.scales)),
    scale_recipe_a=tiles,
    scale_b=b_scales,
    scale_recipe_b=b_recipe,
    output_dtype=_torch_dtype(problem.dtype),
  )


def _torchao_kernels() -> Any:
  return importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")


def _torchao(problem: Problem) -> Run:
  kernels = _torchao_kernels()
  a, b = _to_torch(problem.a.codes), _to_torch(problem.b.codes)
  b_scales = _to_torch(problem.b.scales)
  if problem.b.scales.shape[0] == b.shape[0]:
    kernel, b_scales = kernels.triton_fp8_gemm_1x128_128x1, b_scales.t().contiguous()
  else:
    kernel, b_scales = kernels.triton_fp8_gemm_1x128_128x128, b_scales.t()
  a_scales = _along_rows(_to_torch(problem.a.scales))
  return _on_torch(kernel, a, b.t(), a_scales, b_scales, out_dtype=_torch_dtype(problem.dtype))


# -------------------------------------------------------------------------------------- quantisers


class Input(NamedTuple):
  """Holds what a quantiser reads, and the block that a scale covers."""

  name: str
  x: jax.Array
  block: tuple[int, int]


def inputs(M: int, K: int, N: int) -> Iterator[Input]:
  """Yields activations for the forward pass and for W's gradient, and weights in float32."""
  x_MK = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)
  yield Input("activations, 1x128", x_MK, (1, BLOCK))
  yield Input("activations, 128x1", x_MK, (BLOCK, 1))
  yield Input("weights, 128x128", jax.random.normal(jax.random.key(2), (K, N)), (BLOCK, BLOCK))


def reference_codes(given: Input) -> Quantized:
  """Returns the recipe's codes and scales."""
  return _our_quantizer("reference", given)()


def quantizer_arms(given: Input, platform: str) -> Arms:
  """Yields the quantisers of the recipe; torchao's multiplies by reciprocals."""
  for name in implementations(platform):
    yield f"quantiser, {name}", SAME_CODES, lambda name=name: _our_quantizer(name, given)
  if platform == "gpu":
    yield "torchao (Triton), quantiser", 2e-2, lambda: _torchao_quantizer(given)


def _our_quantizer(implementation: str, given: Input) -> Run:
  module = importlib.import_module(f"pallas_kernels.fp8_matmul.{implementation}")
  return _compiled(lambda x: module.quantize(x, given.block, FORMATS["e4m3fn"], "f32"), given.x)


def _torchao_quantizer(given: Input) -> Run:
  kernels = _torchao_kernels()
  call = {
    (1, BLOCK): kernels.triton_fp8_blockwise_act_quant_lhs,
    (BLOCK, 1): kernels.triton_fp8_blockwise_act_quant_rhs,
    (BLOCK, BLOCK): kernels.triton_fp8_blockwise_weight_quant_rhs,
  }[given.block]
  return _on_torch(call, _to_torch(given.x))


def rotation_arms(x_MK: jax.Array, platform: str) -> Arms:
  """Yields each rotation fused with a quantiser, in groups of 128."""
  for name in implementations(platform):
    yield (
      f"hadamard_quantize, {name}",
      SAME_CODES,
      lambda name=name: _compiled(_rotation(name), x_MK),
    )


def rotated_reference(x_MK: jax.Array) -> Quantized:
  """Returns the codes and scales of the rotation's reference."""
  return jax.jit(_rotation("reference"))(x_MK)


def _rotation(implementation: Any) -> Callable[[jax.Array], Quantized]:
  def rotate(x_MK: jax.Array) -> Quantized:
    codes, scales, _ = hadamard_quantize(
      x_MK, group=BLOCK, dtype="e4m3fn", block=BLOCK, implementation=implementation
    )
    return Quantized(codes, scales)

  return rotate


def copy_arm(x: jax.Array) -> Run:
  """Returns what the bandwidth of copies is measured by: reads and writes each number once."""
  return _compiled(jnp.negative, x)


def moved_bytes(*arrays: jax.Array) -> float:
  """Returns the bytes of all arrays, each once."""
  return float(sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arrays)))
