"""Multiplies by weights that stay in bytes, in the codes that `lowbit_matmul` takes."""

# Z output channels, D contracted axis, G groups of D that share a scale, N bytes of a row

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.formats import (
  BitnetFormat,
  Format,
  LsqFormat,
  MatquantFormat,
  ParetoqFormat,
  QuestFormat,
  UniformFormat,
)
from jaxlm.config.quant import QuantSpec
from jaxlm.quant import quest
from jaxlm.quant.apply import FORMATS, shares_rotation
from jaxlm.quant.groups import Encoded
from jaxlm.quant.packing import Packed, code_range
from pallas_kernels.lowbit_matmul import lowbit_matmul
from pallas_kernels.lowbit_matmul.packing import FormatName

_NAMES: dict[int, FormatName] = {
  2: "binary",
  3: "trits",
  4: "int2",
  8: "int3",
  16: "int4",
  256: "int8",
}
"""of codes in `lowbit_matmul`, by the number of levels"""


def can_multiply_packed(format: Format) -> bool:
  """Returns whether codes have equal steps, and as many levels as `lowbit_matmul` has."""
  if isinstance(format, QuestFormat) and (format.sparse or format.levels == "fp4"):
    return False
  spaced = UniformFormat | LsqFormat | BitnetFormat | ParetoqFormat | QuestFormat | MatquantFormat
  return isinstance(format, spaced) and code_range(format).levels in _NAMES


def packed_matmul(
  x_BTD: jax.Array, packed: Packed, spec: QuantSpec, dtype: str | jnp.dtype
) -> jax.Array:
  """Returns x times the weight that `spec` packs, [B, T, Z] in `dtype`, summed in float32.

  `x_BTD` is what the plain matmul of this spec would multiply.
  """
  format, D = spec.weight, x_BTD.shape[-1]
  assert format is not None
  if isinstance(format, QuestFormat) and not shares_rotation(spec):
    x_BTD = quest.rotate(x_BTD, format)  # the weight is packed as it was rotated
  levels = code_range(format).levels
  group = format.size if format.shared in ("group", "block") else D
  step_GZ, first_GZ = levels_of_groups(packed, format, D, group)
  lowest, codes_NZ = -(levels // 2), packed["codes"].T
  if levels == 2:  # set bits are +1, clear ones -1
    step_GZ = step_GZ / 2
  elif levels != 3:  # codes are in two's complement: their top bits change
    bits = (levels - 1).bit_length()
    top = sum(1 << place for place in range(bits - 1, 24, bits)).to_bytes(3, "little")
    codes_NZ ^= jnp.asarray(np.resize(np.frombuffer(top, np.uint8), len(codes_NZ)))[:, None]
  return lowbit_matmul(
    x_BTD,
    codes_NZ,
    step_GZ,
    dtype=_NAMES[levels],
    group=group,
    zeros_GN=lowest - jnp.where(step_GZ == 0, 0.0, first_GZ / step_GZ),
    out_dtype=dtype,
  )


def levels_of_groups(
  packed: Mapping[str, jax.Array], format: Format, D: int, group: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the step between levels and the lowest level, [G, Z], of each group of entries."""
  codes, Z = code_range(format), packed["codes"].shape[0]

  def decode(code: int) -> jax.Array:
    codes_ZD = jnp.full((Z, D), code, jnp.int32)
    encoded = Encoded(codes_ZD, packed["scale"].astype(jnp.float32), packed.get("zero"))
    return FORMATS[type(format)].decode(encoded, format)[:, ::group].T

  first_GZ = decode(codes.lowest)
  return (decode(codes.lowest + codes.levels - 1) - first_GZ) / (codes.levels - 1), first_GZ
