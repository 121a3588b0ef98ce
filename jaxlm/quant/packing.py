"""Packs codes into bytes, as many bits each as the format has, and unpacks them.

Codes are packed along the contracted axis, the first in the low bits: two of int4 to a byte, eight
of int3 to three bytes, five ternary ones (243 values) to one.
"""

# Z output channels, D contracted axis, N bytes of a row

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config.checks import check
from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  Format,
  Fp8Format,
  LsqFormat,
  MatquantFormat,
  PactFormat,
  ParetoqFormat,
  QuestFormat,
  SparseFormat,
  UniformFormat,
)
from jaxlm.config.quant import QuantSpec
from jaxlm.quant import block_formats, lsq, quest, uniform
from jaxlm.quant.apply import FORMATS, init_scales, learned_names, shares_rotation
from jaxlm.quant.groups import Encoded

Packed = dict[str, jax.Array]
"""codes (uint8), scale, and where the format has them zero, tensor_scale and mask (uint8)."""


class CodeRange(NamedTuple):
  """Says which codes a format has: `levels` of them, from `lowest` on."""

  lowest: int
  levels: int

  @property
  def bits(self) -> int:
    """Returns the bits of a code; ternary ones are packed by fives and take 1.6."""
    return (self.levels - 1).bit_length()


def code_range(format: Format) -> CodeRange:
  """Returns which codes `encode` gives. Raises UserError for a format that has none."""
  match format:
    case UniformFormat():
      low, high = uniform.code_range(format)
      return CodeRange(low, high - low + 1)
    case LsqFormat():
      low, high = lsq.code_range(format)
      return CodeRange(low, high - low + 1)
    case PactFormat():
      return CodeRange(0, 2**format.bits)
    case BitnetFormat():
      return CodeRange(-1, 3)
    case ParetoqFormat():
      count = 3 if format.bits == "ternary" else 2 ** int(format.bits)
      return CodeRange(-(count // 2), count)
    case QuestFormat(levels="ternary"):
      return CodeRange(-1, 3)
    case QuestFormat(levels="fp4"):
      return CodeRange(-8, 16)
    case QuestFormat():
      count = 2 ** int(format.levels.removeprefix("int"))
      return CodeRange(1 - count // 2, count)
    case MatquantFormat():
      return CodeRange(0, 2**format.bits + format.extra)
    case BlockFormat():
      return CodeRange(0, 2 ** block_formats.ELEMENTS[format.elements].bits)
    case Fp8Format():
      return CodeRange(0, 256)
    case SparseFormat():
      check(False, "quant.weight", str(format), "has no codes: its weights stay floats")
  raise AssertionError(format)


def pack(codes_ZD: jax.Array, codes: CodeRange) -> jax.Array:
  """Returns uint8 [Z, N]: rows of codes, each filled up to a whole byte."""
  D = codes_ZD.shape[-1]
  codes_ZD = codes_ZD - codes.lowest
  if codes.levels == 3:
    trits = _fill(codes_ZD, 5).reshape(*codes_ZD.shape[:-1], -1, 5)
    return jnp.sum(trits * _last([1, 3, 9, 27, 81], trits), axis=-1).astype(jnp.uint8)
  bits = (codes_ZD[..., None] >> _last(range(codes.bits), codes_ZD[..., None])) & 1
  flat = bits.reshape(*codes_ZD.shape[:-1], D * codes.bits)
  return jnp.packbits(flat.astype(jnp.uint8), axis=-1, bitorder="little")


def unpack(packed_ZN: jax.Array, codes: CodeRange, D: int) -> jax.Array:
  """Returns the int32 codes [Z, D] that `pack` packed."""
  lead = packed_ZN.shape[:-1]
  if codes.levels == 3:
    bytes_ZN1 = packed_ZN[..., None].astype(jnp.int32)
    trits = bytes_ZN1 // _last([1, 3, 9, 27, 81], bytes_ZN1) % 3
    return trits.reshape(*lead, -1)[..., :D] + codes.lowest
  if 8 % codes.bits == 0:
    bytes_ZN1 = packed_ZN[..., None].astype(jnp.int32)
    fields = bytes_ZN1 >> _last(range(0, 8, codes.bits), bytes_ZN1) & (2**codes.bits - 1)
    return fields.reshape(*lead, -1)[..., :D] + codes.lowest
  flat = jnp.unpackbits(packed_ZN, axis=-1, bitorder="little")[..., : D * codes.bits]
  bits = flat.reshape(*lead, D, codes.bits).astype(jnp.int32)
  return jnp.sum(bits << _last(range(codes.bits), bits), axis=-1) + codes.lowest


def _last(values: Iterable[int], x: jax.Array) -> jax.Array:
  """Returns int32 values along the last axis of an array of x's rank."""
  return jnp.expand_dims(jnp.array(list(values), jnp.int32), range(x.ndim - 1))


def _fill(x_ZD: jax.Array, multiple: int) -> jax.Array:
  """Returns rows filled with zeros up to a multiple."""
  widths = [(0, 0)] * (x_ZD.ndim - 1) + [(0, -x_ZD.shape[-1] % multiple)]
  return jnp.pad(x_ZD, widths)


def pack_weight(
  w_ZD: jax.Array, format: Format, scales: dict[str, jax.Array] | None = None
) -> Packed:
  """Returns a weight's codes and scales in as few bytes as the format allows.

  Scales are float32, or what the format defines: bytes of exponents in mx*, of e4m3 in nvfp4. Of
  pairs that are pruned there is a bit in `mask`, and no code.
  """
  encoded = FORMATS[type(format)].encode(w_ZD.astype(jnp.float32), format, **(scales or {}))
  return pack_encoded(encoded, format)


def pack_encoded(encoded: Encoded, format: Format) -> Packed:
  """Returns what `FORMATS[...].encode`, or a solver such as GPTQ, gave, in bytes."""
  packed: Packed = {}
  codes_ZD, scale = encoded.codes, encoded.scale
  if isinstance(format, QuestFormat) and format.sparse:
    keep_ZD = codes_ZD != quest.PRUNED
    packed["mask"] = jnp.packbits(keep_ZD[:, ::2], axis=-1, bitorder="little")
    order_ZD = jnp.argsort(~keep_ZD, axis=-1, stable=True)
    codes_ZD = jnp.take_along_axis(codes_ZD, order_ZD[:, : order_ZD.shape[1] // 2], axis=-1)
  if isinstance(format, BlockFormat):
    if format.elements == "nvfp4":
      scale = block_formats.to_bits(scale, block_formats.E4M3).astype(jnp.uint8)
    else:
      scale = (jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23).astype(jnp.uint8)
  elif isinstance(format, UniformFormat):
    scale = scale.astype(format.scale_dtype)
  packed |= {"codes": pack(codes_ZD, code_range(format)), "scale": scale}
  others = {"zero": encoded.zero, "tensor_scale": encoded.tensor_scale}
  return packed | {name: value for name, value in others.items() if value is not None}


def unpack_weight(packed: Packed, format: Format, D: int) -> jax.Array:
  """Returns the float32 weight [Z, D] that was packed; one of QuEST is still rotated."""
  scale = packed["scale"]
  if isinstance(format, BlockFormat):
    if format.elements == "nvfp4":
      scale = block_formats.from_bits(scale.astype(jnp.int32), block_formats.E4M3)
    else:
      scale = jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
  if isinstance(format, QuestFormat) and format.sparse:
    codes_ZD = _spread(packed, format, D)
  else:
    codes_ZD = unpack(packed["codes"], code_range(format), D)
  scale = scale.astype(jnp.float32)
  encoded = Encoded(codes_ZD, scale, packed.get("zero"), packed.get("tensor_scale"))
  return FORMATS[type(format)].decode(encoded, format)


def _spread(packed: Packed, format: QuestFormat, D: int) -> jax.Array:
  """Returns codes at their places, and PRUNED between them."""
  pairs = jnp.unpackbits(packed["mask"], axis=-1, bitorder="little")[:, : D // 2]
  keep_ZD = jnp.repeat(pairs, 2, axis=-1).astype(bool)
  kept = unpack(packed["codes"], code_range(format), D // 2)
  place_ZD = jnp.maximum(jnp.cumsum(keep_ZD, axis=-1) - 1, 0)
  return jnp.where(keep_ZD, jnp.take_along_axis(kept, place_ZD, axis=-1), quest.PRUNED)


def unpack_operand(packed: Packed, spec: QuantSpec, D: int) -> jax.Array:
  """Returns the float32 weight [Z, D] that a matmul of this spec multiplies by."""
  assert spec.weight is not None
  unpack = unpack_weight if shares_rotation(spec) else unpack_values
  return unpack(packed, spec.weight, D)


def unpack_values(packed: Packed, format: Format, D: int) -> jax.Array:
  """Returns the float32 values [Z, D] that were packed, those of QuEST rotated back."""
  x_ZD = unpack_weight(packed, format, D)
  return quest.rotate(x_ZD, format) if isinstance(format, QuestFormat) else x_ZD


@functools.cache
def packed_shapes(format: Format, shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of a packed weight whose matmul has shape [D, Z]."""

  def packed(w_ZD: jax.Array) -> Packed:
    learns = learned_names(format)
    return pack_weight(w_ZD, format, init_scales(w_ZD, format) if learns else None)

  return jax.eval_shape(packed, jax.ShapeDtypeStruct(shape[::-1], jnp.float32))
