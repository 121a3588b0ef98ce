"""Makes the modules of a decoder that hold matmuls, and lists these matmuls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxlm.config import ComputeConfig, ModelConfig, QuantSpec, check
from jaxlm.config.quant import cache_name, check_cache, check_rules, find_spec
from jaxlm.models.block import Block
from jaxlm.models.linear import Linear
from jaxlm.quant.apply import learned_names


def make_blocks(
  config: ModelConfig, compute: ComputeConfig, index: int, start: int = 0, stop: int | None = None
) -> dict[str, Block]:
  """Returns the blocks of one repeat of stack `index`, in order; each knows its layers.

  These are those of the repeats from `start` to `stop`, by default to the last.
  """
  stacks = config.stacks
  specs, repeats = stacks[index]
  first = sum(len(specs) * repeats for specs, repeats in stacks[:index])
  period = len(specs)
  begin, end = first + period * start, first + period * (repeats if stop is None else stop)
  return {
    str(place): Block(spec, config, compute, tuple(range(begin + place, end, period)), parent=None)
    for place, spec in enumerate(specs)
  }


def make_head(config: ModelConfig, compute: ComputeConfig) -> Linear:
  """Returns the head, which also multiplies by a tied embedding."""
  return Linear(
    (config.D, config.V),
    config.D**-0.5,
    ("embed", "vocab"),
    ("batch", "length", "act_vocab"),
    compute,
    config.quant,
    role="head",
    out_dtype="float32",
    parent=None,
  )


class Matmul(NamedTuple):
  """Describes a contraction with a weight [D, F], of all layers that a stack computes by it."""

  names: tuple[str, ...]
  """one per layer"""
  shape: tuple[int, int]
  role: str
  path: tuple[str, ...]
  """where its parameters are in the tree of all; if stacked, with a leading axis of `names`"""


@functools.cache
def list_matmuls(config: ModelConfig) -> tuple[Matmul, ...]:
  """Returns every contraction with a weight, the head last.

  Raises UserError for a rule of the configuration that decides none of them and nothing cached.
  """
  found: list[Matmul] = []

  def declared(module: nn.Module, path: tuple[str, ...]) -> None:
    def watch(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
      part = context.module
      if isinstance(part, Linear) and context.method_name == "declare":
        found.append(Matmul(part.names, part.shape, part.role, (*path, *part.path)))
      return run(*args, **kwargs)

    with nn.intercept_methods(watch):
      jax.eval_shape(lambda key: module.init(key, method="declare"), jax.random.key(0))

  for index in range(len(config.stacks)):
    for name, block in make_blocks(config, ComputeConfig(), index).items():
      declared(block, ("stacks", str(index), name))
  declared(make_head(config, ComputeConfig()), ("embed",) if config.tied else ("head",))
  learns = learned_names(find_spec(config.quant, "head").weight)
  rule = "the head is the embedding, which is looked up too: its format can learn no scales"
  check(not (config.tied and learns), "model.tied", True, rule)
  for layer, spec in enumerate(config.layer_specs):
    check_cache(config.quant, layer, spec.mixer.cached, spec.mixer.states)
  names = [name for matmul in found for name in matmul.names]
  check_rules(config.quant, [*names, *(cached.name for cached in list_cached(config))])
  return tuple(found)


class Cached(NamedTuple):
  """Describes keys or values that decoding keeps of one layer."""

  name: str
  layer: int
  part: str
  heads: int
  width: int


def list_cached(config: ModelConfig) -> list[Cached]:
  """Returns all keys and values that decoding keeps and that rules can round, by layers."""
  return [
    Cached(cache_name(layer, part), layer, part, *size)
    for layer, spec in enumerate(config.layer_specs)
    for part, size in spec.mixer.cached.items()
  ]


@functools.cache
def formats_of_repeats(config: ModelConfig, index: int) -> tuple[tuple[QuantSpec, ...], ...]:
  """Returns, for each repeat of a stack, the specs of all its matmuls and of what it caches."""
  matmuls = [m for m in list_matmuls(config) if m.path[:2] == ("stacks", str(index))]
  names = [matmul.names for matmul in matmuls]
  for block in make_blocks(config, ComputeConfig(), index).values():
    for part in block.spec.mixer.cached:
      names.append(tuple(cache_name(layer, part) for layer in block.layers))
  specs = [[find_spec(config.quant, name) for name in of_part] for of_part in names]
  return tuple(zip(*specs))
