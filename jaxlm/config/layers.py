"""Makes model configurations from fewer words: of layers that are alike, or that come as a list."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jaxlm.config.mixers import AttentionConfig
from jaxlm.config.model import LayerSpec, ModelConfig

_LONGEST_PATTERN = 64


def decoder(
  *, layers: int = 4, windows: Sequence[int | None] = (None,), **fields: Any
) -> ModelConfig:
  """Returns a model whose layers are alike but for their attention windows, which repeat in turn.

  Takes the fields of ModelConfig, AttentionConfig and MlpConfig by their plain names, as in
  `decoder(D=128, F=352, N=4, K=4, H=32, layers=4)`.
  """
  pattern = tuple(LayerSpec(mixer=AttentionConfig(window=window)) for window in windows)
  return revise(ModelConfig(pattern=pattern, layers=layers), **fields)


def revise(model: ModelConfig, **fields: Any) -> ModelConfig:
  """Returns the model with these fields replaced, each in every part of it that has the field.

  `D` is a field of the model itself, `H` of every layer's mixer, `F` of every feed-forward.
  """
  taken: set[str] = set()

  def replace(part: Any) -> Any:
    own = {field.name for field in dataclasses.fields(part)} & fields.keys()
    taken.update(own)
    return dataclasses.replace(part, **{name: fields[name] for name in own})

  def replace_all(specs: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    return tuple(
      LayerSpec(mixer=replace(spec.mixer), feedforward=replace(spec.feedforward)) for spec in specs
    )

  layers = {name: replace_all(getattr(model, name)) for name in ("prefix", "pattern", "remainder")}
  rest = {name: value for name, value in fields.items() if name not in taken}
  return dataclasses.replace(model, **(layers | rest))


def rearrange(model: ModelConfig) -> ModelConfig:
  """Returns the same layers, as the prefix, pattern and remainder that compile as fewest blocks.

  What compiles is the pattern once, and each run of equal layers in prefix and remainder once.
  """
  specs, L = model.layer_specs, model.layers
  changes = [a != b for a, b in itertools.pairwise(specs)]
  before = [0, *itertools.accumulate([1, *changes])]  # runs of equal layers in specs[:i]

  def rank(start: int, length: int, stop: int) -> tuple[int, int, int, int, int]:
    after = 0 if stop == L else before[L] - before[stop] + (not changes[stop - 1])
    return before[start] + length + after, start + L - stop, start, length, stop

  best = rank(0, L, L)
  for length in range(1, min(L, _LONGEST_PATTERN) + 1):
    if length > best[0]:
      break
    end = L  # of the longest stretch from `start` on that repeats every `length` layers
    for start in range(L - length, -1, -1):
      if start + length < L and specs[start] != specs[start + length]:
        end = start + length
      repeats = (end - start) // length
      best = min(best, rank(start, length, start + repeats * length))
  start, length, stop = best[2:]
  return dataclasses.replace(
    model, prefix=specs[:start], pattern=specs[start : start + length], remainder=specs[stop:]
  )
