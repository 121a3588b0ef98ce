"""Configures number formats, one for each way to round and to pass a gradient.

Scales lie along the contracted axis. Every format says in words what it is (`str`), what shares one
of its scales (`shared`, `size`), and how many bits it stores (`bits_of_code`, `bits_of_scale`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxlm.config.checks import check, check_finite

Shared = Literal["tensor", "row", "group", "block"]
"""What shares one scale: the tensor; a row, along the contracted axis (an output channel of a
weight, a token of activations); `size` neighbours along that axis; a square of `size` x `size`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformFormat:
  """Configures equally spaced levels (`jaxlm.quant.uniform`)."""

  bits: int = 4
  """of a code, from 1 (midrise), 2 (others) to 8"""
  grid: Literal["symmetric", "affine", "midrise"] = "symmetric"
  """symmetric: with a level at 0 and one more below than above it; affine: from the smallest value
  to the largest; midrise: no level at 0, as many below as above"""
  shared: Shared = "row"
  """what shares one scale: tensor, row, group or block"""
  size: int = 128
  """entries along the contracted axis of a group, or along both of a block"""
  ratio: float = 1.0
  """the largest level is this times the largest magnitude (the whole range, if affine)"""
  clips_gradient: bool = False
  """no gradient where a value lies beyond the levels; otherwise all of it everywhere"""
  scale_dtype: Literal["float32", "bfloat16"] = "float32"
  """to which scales are rounded, in training too, and in which they are stored"""
  avoids_ties: bool = False
  """symmetric: divide the largest magnitude by half a step more, as qwix does"""

  def __post_init__(self) -> None:
    check_finite(self, "format.")
    _check_bits(self.bits, 1 if self.grid == "midrise" else 2)
    check(self.size >= 1, "format.size", self.size, "must be at least 1")
    check(0 < self.ratio <= 1, "format.ratio", self.ratio, "must lie in (0, 1]")
    symmetric = self.grid == "symmetric" or not self.avoids_ties
    check(symmetric, "format.avoids_ties", self.avoids_ties, "is for the symmetric grid")

  def __str__(self) -> str:
    return f"int{self.bits} {self.grid} {_describe_sharing(self.shared, self.size)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LsqFormat:
  """Configures learned steps (`jaxlm.quant.lsq`; Esser et al. 2020, arXiv 1902.08153)."""

  bits: int = 4
  grid: Literal["symmetric", "unsigned", "midrise"] = "symmetric"
  """symmetric: with a level at 0; unsigned: from 0 up; midrise: no level at 0 (QuEST's baseline)"""
  shared: Literal["tensor", "row"] = "tensor"
  """what shares one step; activations can only share one by tensor"""
  start: Literal["mean", "gaussian"] = "mean"
  """the first step: 2 mean|x| / sqrt(Qp), or the best one for normal numbers of x's mean square"""
  decays: bool = False
  """the optimizer's weight decay acts on the step"""
  size: ClassVar[int] = 0

  def __post_init__(self) -> None:
    _check_bits(self.bits, 1 if self.grid == "midrise" else 2)

  def __str__(self) -> str:
    return f"LSQ int{self.bits} {self.grid} per {self.shared}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PactFormat:
  """Configures a learned upper clip, for inputs that are not negative (`jaxlm.quant.pact`).

  Choi et al. 2018, arXiv 1805.06085. Smaller values become 0.
  """

  bits: int = 4
  start: float = 6.0
  """the first clip"""
  decays: bool = True
  """the optimizer's weight decay acts on the clip, which is the paper's penalty"""
  shared: ClassVar[Shared] = "tensor"
  size: ClassVar[int] = 0

  def __post_init__(self) -> None:
    check_finite(self, "format.")
    _check_bits(self.bits, 1)
    check(self.start > 0, "format.start", self.start, "must be above 0")

  def __str__(self) -> str:
    return f"PACT uint{self.bits} per tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitnetFormat:
  """Configures ternary weights with one scale (`jaxlm.quant.bitnet`; arXiv 2402.17764).

  Its activations are `UniformFormat(bits=8)`.
  """

  shared: ClassVar[Shared] = "tensor"
  size: ClassVar[int] = 0

  def __str__(self) -> str:
    return "BitNet ternary per tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParetoqFormat:
  """Configures weights with a learned scale per row (`jaxlm.quant.paretoq`; arXiv 2502.02631).

  1 bit: elastic binary; ternary and 2: SEQ; 3 and 4: LSQ.
  """

  bits: Literal["1", "ternary", "2", "3", "4"] = "4"
  repo_compat: bool = False
  """ternary: the gradient that the published code has at the ends, for levels of 1 and not 2/3"""
  shared: ClassVar[Shared] = "row"
  size: ClassVar[int] = 0

  def __str__(self) -> str:
    return f"ParetoQ {self.bits if self.bits == 'ternary' else f'int{self.bits}'} per row"


QuestLevels = Literal[
  "int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "ternary", "fp4"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestFormat:
  """Configures a rotated, clipped grid with trust gradients (`jaxlm.quant.quest`; 2502.05003)."""

  levels: QuestLevels = "int4"
  """as many bits without a level at 0; three levels; or the 15 of FP4"""
  hadamard: int = 128
  """rotate blocks of so many entries along the contracted axis, a power of two; 0: no rotation"""
  sparse: bool = False
  """zero two of every four pairs of neighbours, those of smallest norm (weights alone)"""
  repo_compat: bool = False
  """the constants of the published code where they differ from the optimum or from the paper"""
  shared: ClassVar[Shared] = "row"
  size: ClassVar[int] = 0

  def __post_init__(self) -> None:
    n = self.hadamard
    check(n == 0 or (n > 1 and n & (n - 1) == 0), "format.hadamard", n, "must be 0 or 2, 4, 8, ...")

  def __str__(self) -> str:
    rotation = f" Hadamard-{self.hadamard}" if self.hadamard else ""
    return f"QuEST{rotation} {self.levels}{' 4:8 in pairs' if self.sparse else ''} per row"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatquantFormat:
  """Configures weights that are the top bits of int8 codes (`jaxlm.quant.matquant`; 2502.06786)."""

  bits: int = 8
  """the most significant ones that are used"""
  extra: bool = False
  """one level more above, where rounding ends there, in place of clipping it"""
  shared: Shared = "row"
  size: int = 128

  def __post_init__(self) -> None:
    _check_bits(self.bits, 1)

  def __str__(self) -> str:
    extra = " extra" if self.extra else ""
    return f"MatQuant int{self.bits}{extra} of int8 {_describe_sharing(self.shared, self.size)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
  """Configures narrow floats with shared scales (`jaxlm.quant.block_formats`).

  mx*: powers of two for 32 neighbours (OCP Microscaling v1.0). nvfp4: e4m3 for 16 neighbours, and
  one float32 for the tensor.
  """

  elements: Literal["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"] = (
    "mxfp4"
  )
  shared: Literal["group", "block"] = "group"
  """neighbours along the contracted axis, or squares, the same along either axis"""
  ceil_scale: bool = False
  """mx: round the power of two up, so that nothing is clipped, where the standard rounds down"""
  stochastic: bool = False
  """round up or down at random, without bias: mx values are first scaled by 3/4, so that none is
  clipped. Needs the key of a training step, so it is for gradients"""

  def __str__(self) -> str:
    how = " stochastic" if self.stochastic else ""
    return f"{self.elements}{how} {_describe_sharing(self.shared, self.size)}"

  @property
  def size(self) -> int:
    """Returns the neighbours that share one scale."""
    return 16 if self.elements == "nvfp4" else 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Format:
  """Configures 8-bit floats with float32 scales (`jaxlm.quant.fp8`; DeepSeek-V3, 2412.19437)."""

  elements: Literal["e4m3fn", "e5m2"] = "e4m3fn"
  shared: Shared = "group"
  """what shares one scale; the paper has groups of inputs and gradients and blocks of weights"""
  size: int = 128
  """entries along the contracted axis of a group, or along both of a block"""

  def __post_init__(self) -> None:
    check(self.size >= 1, "format.size", self.size, "must be at least 1")

  def __str__(self) -> str:
    return f"{self.elements} {_describe_sharing(self.shared, self.size)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFormat:
  """Configures 2:4 sparsity (`jaxlm.quant.sparse`): of 4 neighbours the 2 largest are kept."""

  masks_gradient: bool = False
  """no gradient to entries that are zeroed; otherwise straight through to all"""
  shared: ClassVar[Shared] = "group"
  size: ClassVar[int] = 4

  def __str__(self) -> str:
    return "2:4 sparse"


Format = (
  UniformFormat
  | LsqFormat
  | PactFormat
  | BitnetFormat
  | ParetoqFormat
  | QuestFormat
  | MatquantFormat
  | BlockFormat
  | Fp8Format
  | SparseFormat
)
"""A number format, with the gradient of its paper."""


def _check_bits(bits: int, least: int) -> None:
  check(least <= bits <= 8, "format.bits", bits, f"must lie from {least} to 8")


def _describe_sharing(shared: Shared, size: int) -> str:
  return {"group": f"per 1x{size}", "block": f"per {size}x{size}"}.get(shared, f"per {shared}")
