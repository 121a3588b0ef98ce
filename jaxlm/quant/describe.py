"""Lists the matmuls of a model with the formats of their operands, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable

from jaxlm.config import ModelConfig
from jaxlm.config.quant import Operands, find_spec
from jaxlm.models.parts import list_matmuls

_HEADINGS = ("matmul", "D x F", "y = x w", "dx = dy w^T", "dw = x^T dy")


def describe(config: ModelConfig, dtype: str) -> list[str]:
  """Returns a table with a line for each kind of matmul and the layers that compute it alike.

  `dtype` is the compute type, of operands that are not quantised. Raises UserError for a rule that
  decides no matmul.
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
