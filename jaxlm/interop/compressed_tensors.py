"""Writes weights in bytes as compressed-tensors does, in the format "pack-quantized".

Of a linear layer [out, in] (github.com/vllm-project/compressed-tensors, version 0.20):
weight_packed  int32 [out, ceil(in * bits / 32)]: code + 2^(bits-1), bit after bit along `in`
weight_scale   [out, groups]: a weight is its code times its group's scale
weight_shape   int64 [2]: out, in
"""

# F output channels, D contracted axis, G groups of D that share a scale

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config import ModelConfig, check
from jaxlm.config.formats import (
  BitnetFormat,
  Format,
  LsqFormat,
  ParetoqFormat,
  UniformFormat,
)
from jaxlm.config.quant import find_spec
from jaxlm.models.parts import list_cached, list_matmuls
from jaxlm.quant.packed_matmul import levels_of_groups
from jaxlm.quant.packing import CodeRange, code_range, pack, unpack

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


class Tensor(NamedTuple):
  """Describes a tensor of a file, and reads it."""

  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def packed_tensors(
  name: str, packed: Mapping[str, jax.Array], format: Format, D: int
) -> Iterator[tuple[str, Tensor]]:
  """Yields names and tensors of one weight in bytes, whose tensor as floats is called `name`."""
  bits, F = _bits(format), packed["codes"].shape[0]
  group = format.size if format.shared == "group" else D
  kind = packed["scale"].dtype if isinstance(format, UniformFormat) else np.dtype(np.float32)

  def words() -> np.ndarray:
    codes_FD = unpack(packed["codes"], code_range(format), D)
    bytes_FN = np.asarray(pack(codes_FD, CodeRange(-(2 ** (bits - 1)), 2**bits)))
    return np.pad(bytes_FN, ((0, 0), (0, -bytes_FN.shape[1] % 4))).view("<i4")

  def scales() -> np.ndarray:
    step_GF, _ = levels_of_groups(packed, format, D, group)
    return np.asarray(step_GF.T).astype(kind)

  stem = name.removesuffix("weight")
  yield f"{stem}weight_packed", Tensor(np.dtype(np.int32), (F, -(-D * bits // 32)), words)
  yield f"{stem}weight_scale", Tensor(np.dtype(kind), (F, D // group), scales)
  yield f"{stem}weight_shape", Tensor(np.dtype(np.int64), (2,), lambda: np.array([F, D]))


def quantization_config(names: Mapping[str, Format | None]) -> dict[str, Any]:
  """Returns the field of config.json of that name, for the formats of linear layers by tensor."""
  layers = {name.removesuffix(".weight"): format for name, format in names.items()}
  kinds = list(dict.fromkeys(format for format in layers.values() if format is not None))
  groups = {}
  for index, kind in enumerate(kinds):
    targets = ["Linear"] if len(kinds) == 1 else [n for n, f in layers.items() if f == kind]
    groups[f"group_{index}"] = {"targets": targets, "weights": _describe(kind)}
  return {
    "quant_method": METHOD,
    "format": FORMAT,
    "quantization_status": "compressed",
    "config_groups": groups,
    "ignore": [name for name, format in layers.items() if format is None],
  }


def packed_formats(config: ModelConfig) -> dict[tuple[str, ...], Format | None]:
  """Returns the format of each linear layer's weight by the path of its parameters; None: floats.

  Raises UserError for what the layout cannot hold: other parts of rules, and formats whose weights
  are not whole codes from -2^(bits-1) to 2^(bits-1) - 1 times a scale of a row or of a group.
  """
  formats: dict[tuple[str, ...], Format | None] = {}
  for matmul in list_matmuls(config):
    spec = find_spec(config.quant, matmul.names[0])
    rest = dataclasses.replace(spec, weight=None, packed=False, gradient=None)
    rule = f"{METHOD} holds weights in bytes, and no other formats"
    good = rest.is_plain and (spec.packed or spec.weight is None)
    check(good, "model.quant", matmul.names[0], rule)
    formats[matmul.path] = spec.weight
    if spec.weight is not None:
      _bits(spec.weight)
  for cached in list_cached(config):
    check(find_spec(config.quant, cached.name).is_plain, "model.quant", cached.name, rule)
  return formats


def _bits(format: Format) -> int:
  """Returns the bits of a signed code whose value 0 is the weight 0."""
  match format:
    case UniformFormat(grid="symmetric", shared="row" | "group" | "tensor"):
      return format.bits
    case LsqFormat(grid="symmetric"):
      return format.bits
    case ParetoqFormat(bits="3" | "4"):
      return int(format.bits)
    case BitnetFormat() | ParetoqFormat(bits="ternary"):
      return 2
  rule = f"{FORMAT} is for symmetric codes with a level at zero, with scales per row or group"
  check(False, "quant.weight", str(format), rule)
  raise AssertionError(format)


def _describe(format: Format) -> dict[str, Any]:
  size = format.size if format.shared == "group" else None
  strategy = "channel" if size is None else "group"
  values = {"num_bits": _bits(format), "type": "int", "symmetric": True, "dynamic": False}
  return values | {"strategy": strategy, "group_size": size}
