"""Lists the matmuls of a model with the formats of their operands, and what its cache keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from jaxlm.config import ComputeConfig, ModelConfig
from jaxlm.config.quant import Operands, find_spec
from jaxlm.models import Transformer
from jaxlm.models.parts import list_cached, list_matmuls
from jaxlm.quant.cache import empty

_HEADINGS = ("matmul", "D x F", "y = x w", "dx = dy w^T", "dw = x^T dy")


def describe(config: ModelConfig, dtype: str) -> list[str]:
  """Returns a table with a line for each kind of matmul and the layers that compute it alike.

  Lines of keys and values follow where a rule decides any. `dtype` is the compute type, of operands
  that are not quantised. Raises UserError for a rule that decides nothing.
  """
  rows: dict[tuple[str, str, Operands], list[int]] = {}
  for matmul in list_matmuls(config):
    size = f"{matmul.shape[0]} x {matmul.shape[1]}"
    for name in matmul.names:
      layer, part = _split_name(name)
      key = part, size, find_spec(config.quant, name).operands(dtype)
      rows.setdefault(key, []).append(layer)
  order = sorted(rows.items(), key=lambda row: row[1][0] < 0)  # the head, -1, comes last
  cells = [_HEADINGS, *(_cells(key, sorted(layers)) for key, layers in order)]
  return [*_align(cells), *_align(_cached(config, dtype))]


def describe_cache(config: ModelConfig, compute: ComputeConfig, positions: int = 1024) -> list[str]:
  """Returns a line with the bytes of a whole decode cache of one row, where a rule rounds any.

  All layers count, also with what they keep as it is: states, and inputs of convolutions.
  """
  if not _cached(config, compute.dtype):
    return []
  length = config.max_length or positions

  def count(config: ModelConfig) -> int:
    model = Transformer(config, compute)
    return _count_bytes(jax.eval_shape(lambda: model.init_cache(1, length)))

  size, plain = count(config), count(dataclasses.replace(config, quant=()))
  words = f"{size:,} bytes, of {plain:,} in {compute.dtype} ({size / plain:.1%})"
  return [f"cache of a row of {length:,} positions: {words}"]


def _count_bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cached(config: ModelConfig, dtype: str) -> list[tuple[str, ...]]:
  """Returns the cells of a heading and a line for each kind of what decoding keeps, if ruled.

  Bytes are of one position, or of one block of compressed ones.
  """
  rows: dict[tuple[str, str, str, str], list[int]] = {}
  specs = {cached.name: find_spec(config.quant, cached.name) for cached in list_cached(config)}
  if all(spec.is_plain for spec in specs.values()):
    return []
  for cached in list_cached(config):
    spec, shape = specs[cached.name], (1, 1, cached.heads, cached.width)
    (kept, _), *_ = spec.operands(dtype)
    held = jax.eval_shape(lambda shape=shape, spec=spec: empty(shape, spec, dtype))
    key = (cached.part, f"{cached.heads} x {cached.width}", kept, f"{_count_bytes(held):,}")
    rows.setdefault(key, []).append(cached.layer)
  cells = [(f"cache.{_ranges(rows[key])}.{key[0]}", *key[1:]) for key in sorted(rows)]
  return [("cache", "K x H", "kept", "bytes"), *cells]


def _align(cells: list[tuple[str, ...]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*cells)]
  return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _split_name(name: str) -> tuple[int, str]:
  """Returns the layer, or -1 for none, and the rest of a matmul's name."""
  if not name.startswith("layers."):
    return -1, name
  _, layer, part = name.split(".", 2)
  return int(layer), part


def _cells(key: tuple[str, str, Operands], layers: list[int]) -> tuple[str, ...]:
  part, size, operands = key
  name = part if layers[0] < 0 else f"layers.{_ranges(layers)}.{part}"
  return name, size, *(" * ".join(pair) for pair in operands)


def _ranges(numbers: Iterable[int]) -> str:
  """Returns sorted numbers as in "0,2-5"."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][-1] + 1:
      runs[-1].append(number)
    else:
      runs.append([number])
  return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
