"""Packs codes of 1 to 8 bits into bytes along K, low bits first, and unpacks them."""

# K inner, N outer size of a matrix
from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.padding import pad_axis, round_up

FormatName = Literal["int8", "int4", "int3", "int2", "ternary", "trits", "binary"]


class Format(NamedTuple):
  """Describes codes: their range, and how many are packed into how many bytes.

  Their bits follow each other, in two's complement; "trits" are digits to the base 3 instead.
  """

  codes: int
  bytes: int
  smallest: int
  largest: int

  @property
  def bits(self) -> int:
    """Returns the bits of a code; the 1.6 of trits count as 2."""
    return -(-8 * self.bytes // self.codes)

  @property
  def is_digits(self) -> bool:
    """Returns whether codes are digits to the base 3."""
    return self.codes == 5

  def bytes_of(self, K: int) -> int:
    """Returns the bytes of a column of K codes."""
    return -(-K * self.bytes // self.codes)


FORMATS = {
  "int8": Format(1, 1, -128, 127),
  "int4": Format(2, 1, -8, 7),
  "int3": Format(8, 3, -4, 3),
  "int2": Format(4, 1, -2, 1),
  "ternary": Format(4, 1, -1, 1),
  "trits": Format(5, 1, -1, 1),
  "binary": Format(8, 1, -1, 1),
}


def pack(codes_KN: jax.Array, dtype: FormatName) -> jax.Array:
  """Returns codes as uint8 [bytes of K codes, N]; code k has the lower bits for lower k.

  Int4 has two codes a byte, the even k in the low four bits; int3 eight in three bytes; int2 and
  "ternary" (-1, 0, 1) four a byte; "trits" (the same codes) five, as the sum of (code + 1) 3^i;
  "binary" eight, a set bit for +1 and a clear one for -1. What is missing in the last byte is 0, or
  for trits the code 0. Raises UserError for codes that are known to be outside of the format.
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
  K, N = codes_KN.shape
  codes_UFN = pad_axis(codes_KN.astype(jnp.int32), round_up(K, form.codes), 0)
  codes_UFN = codes_UFN.reshape(-1, form.codes, N)
  if form.is_digits:
    values_UN = jnp.sum((codes_UFN + 1) * _POWERS[None, :, None], axis=1)
  else:
    bits = codes_UFN > 0 if form.bits == 1 else codes_UFN & (2**form.bits - 1)
    shifts = jnp.arange(form.codes, dtype=jnp.int32)[None, :, None] * form.bits
    values_UN = jnp.sum(bits.astype(jnp.int32) << shifts, axis=1)
  places = jnp.arange(form.bytes, dtype=jnp.int32)[None, :, None] * 8
  packed = (values_UN[:, None] >> places & 255).astype(jnp.uint8).reshape(-1, N)
  return packed[: form.bytes_of(K)]


_POWERS = np.array([1, 3, 9, 27, 81], np.int32)


def unpack(packed: jax.Array, dtype: FormatName, K: int) -> jax.Array:
  """Returns the first K rows of codes, int8 [K, N]."""
  check_choice("dtype", dtype, tuple(FORMATS))
  form = FORMATS[dtype]
  check_packed(packed, form, K)
  N = packed.shape[1]
  bytes_UBN = pad_axis(packed, round_up(packed.shape[0], form.bytes), 0).astype(jnp.int32)
  bytes_UBN = bytes_UBN.reshape(-1, form.bytes, N)
  places = jnp.arange(form.bytes, dtype=jnp.int32)[None, :, None] * 8
  values_U1N = jnp.sum(bytes_UBN << places, axis=1, keepdims=True)
  if form.is_digits:
    codes = values_U1N // _POWERS[None, :, None] % 3 - 1
  else:
    shifts = jnp.arange(form.codes, dtype=jnp.int32)[None, :, None] * form.bits
    fields = values_U1N >> shifts & (2**form.bits - 1)
    half = 2 ** (form.bits - 1)
    codes = 2 * fields - 1 if form.bits == 1 else (fields ^ half) - half
  return codes.reshape(-1, N)[:K].astype(jnp.int8)


def check_packed(packed: jax.Array, form: Format, K: int) -> None:
  """Checks that an array holds K rows of packed codes."""
  check_dtype("packed", packed, jnp.uint8)
  check_shape("packed", packed, (form.bytes_of(K), None))
