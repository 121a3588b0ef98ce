"""Packs codes of 1 to 8 bits into bytes along K, low bits first, and unpacks them."""

# K inner, N outer size of a matrix
from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.padding import pad_axis, round_up

FormatName = Literal["int8", "int4", "int2", "ternary", "binary"]


class Format(NamedTuple):
  """Describes codes: their bits and range; a field holds the code in two's complement."""

  bits: int
  smallest: int
  largest: int

  @property
  def per_byte(self) -> int:
    """Returns the number of codes in a byte."""
    return 8 // self.bits


FORMATS = {
  "int8": Format(8, -128, 127),
  "int4": Format(4, -8, 7),
  "int2": Format(2, -2, 1),
  "ternary": Format(2, -1, 1),
  "binary": Format(1, -1, 1),
}


def pack(codes_KN: jax.Array, dtype: FormatName) -> jax.Array:
  """Returns codes as uint8 [ceil(K / codes per byte), N]; code k has the lower bits for lower k.

  Int4 has two codes a byte, the even k in the low four bits; int2 and "ternary" (-1, 0, 1) four;
  "binary" eight, a set bit for +1 and a clear one for -1. What is missing in the last byte is 0.
  Raises UserError for codes that are known to be outside of the format.
  """
  check_choice("dtype", dtype, tuple(FORMATS))
  form = FORMATS[dtype]
  check_shape("codes_KN", codes_KN, (None, None))
  check_dtype("codes_KN", codes_KN, jnp.signedinteger)
  if not isinstance(codes_KN, jax.core.Tracer):
    known = np.asarray(codes_KN).astype(np.int32)
    wrong = known[
      (known < form.smallest) | (known > form.largest) | ((known == 0) & (form.bits == 1))
    ]
    allowed = "-1 or 1" if form.bits == 1 else f"in [{form.smallest}, {form.largest}]"
    check(wrong.size == 0, "codes_KN", wrong[:8].tolist(), f"{dtype} codes are {allowed}")
  fields = codes_KN.astype(jnp.int32)
  fields = (fields > 0).astype(jnp.int32) if form.bits == 1 else fields & (2**form.bits - 1)
  K, N = codes_KN.shape
  fields = pad_axis(fields, round_up(K, form.per_byte), 0).reshape(-1, form.per_byte, N)
  shifts = jnp.arange(form.per_byte, dtype=jnp.int32)[None, :, None] * form.bits
  return jnp.sum(fields << shifts, axis=1).astype(jnp.uint8)


def unpack(packed: jax.Array, dtype: FormatName, K: int) -> jax.Array:
  """Returns the first K rows of codes, int8 [K, N]."""
  check_choice("dtype", dtype, tuple(FORMATS))
  form = FORMATS[dtype]
  check_packed(packed, form, K)
  shifts = jnp.arange(form.per_byte, dtype=jnp.int32)[None, :, None] * form.bits
  fields = (packed.astype(jnp.int32)[:, None] >> shifts) & (2**form.bits - 1)
  if form.bits == 1:
    codes = 2 * fields - 1
  else:
    half = 2 ** (form.bits - 1)
    codes = (fields ^ half) - half
  return codes.reshape(-1, packed.shape[1])[:K].astype(jnp.int8)


def check_packed(packed: jax.Array, form: Format, K: int) -> None:
  """Checks that an array holds K rows of packed codes."""
  check_dtype("packed", packed, jnp.uint8)
  check_shape("packed", packed, (-(-K // form.per_byte), None))
