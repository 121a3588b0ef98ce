"""Reads what goes into and comes out of every matmul of a forward pass."""

# B batch, T positions, D input width, F output width

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxlm.config import ComputeConfig, ModelConfig
from jaxlm.models import Transformer
from jaxlm.models.linear import Linear

Read = Callable[[str, jax.Array, jax.Array], Any]
"""(name of the matmul, input [B, T, D], output [B, T, F]) -> arrays to keep, traced under jit"""


def capture(
  config: ModelConfig,
  params: Any,
  ids_BT: jax.Array,
  read: Read,
  compute: ComputeConfig | None = None,
) -> dict[str, Any]:
  """Returns by name what `read` makes of every matmul of one forward pass; it is jitted.

  Layers run one after the other, so that each has its own entry.
  """
  compute = dataclasses.replace(compute or ComputeConfig(), scan="never", remat="none")
  model = Transformer(config, compute)

  def run(params: Any, ids_BT: jax.Array) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    calls: collections.Counter[tuple[str, ...]] = collections.Counter()

    def watch(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
      out = call(*args, **kwargs)
      module = context.module
      if isinstance(module, Linear) and context.method_name == "__call__":
        name = module.names[calls[module.names]]
        calls[module.names] += 1
        kept[name] = read(name, args[0], out)
      return out

    with nn.intercept_methods(watch):
      model.apply(params, ids_BT)
    return kept

  return jax.jit(run)(params, ids_BT)
