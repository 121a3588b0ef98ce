"""Finds quantised matmuls that do not train: with a scale of zero, or without any gradient.

Both show in no loss curve for a long time: what is computed stays finite and looks plausible.
"""

# R layers that one module computes, D input width, F output width

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig, QuantSpec
from jaxlm.config.quant import EmulatedProduct, Format, find_spec
from jaxlm.models.parts import Matmul, list_matmuls
from jaxlm.quant.groups import has_zero_group
from pallas_kernels.common.errors import UserError

_REASONS = {
  "zero_gradient": "the gradient of its weight is all zero",
  "zero_scale": "a scale of its weight is zero: all values that share it are zero",
}


def probe(config: ModelConfig, params: Any, grads: Any) -> dict[str, jax.Array]:
  """Returns for each reason whether it holds, bool, one entry per quantised matmul and layer."""
  flags: dict[str, list[jax.Array]] = {reason: [] for reason in _REASONS}
  for matmul, row, spec in _quantized(config):
    dw_DF, w_DF = (_weight(tree, matmul, row) for tree in (grads, params))
    flags["zero_gradient"].append(~jnp.any(dw_DF != 0))
    flags["zero_scale"].append(_has_zero_scale(w_DF, spec))
  return {reason: jnp.stack(values) for reason, values in flags.items() if values}


def check_probes(config: ModelConfig, probes: Mapping[str, Any]) -> None:
  """Raises UserError, naming the matmuls, for what `probe` found."""
  names = [matmul.names[row] for matmul, row, _ in _quantized(config)]
  for reason, message in _REASONS.items():
    bad = [name for name, flag in zip(names, probes.get(reason, ())) if flag]
    if bad:
      raise UserError(f"model.quant: {', '.join(bad)}: {message} at the first step")


def _quantized(config: ModelConfig) -> Iterator[tuple[Matmul, int, QuantSpec]]:
  for matmul in list_matmuls(config) if config.quant else ():
    for row, name in enumerate(matmul.names):
      spec = find_spec(config.quant, name)
      if not spec.is_plain:
        yield matmul, row, spec


def _weight(tree: Any, matmul: Matmul, row: int) -> jax.Array:
  for name in matmul.path:
    tree = tree[name]
  if matmul.path[0] == "stacks":
    return tree["weight"][row]
  return tree["weight"].T if matmul.path == ("embed",) else tree["weight"]


def _has_zero_scale(w_DF: jax.Array, spec: QuantSpec) -> jax.Array:
  format: Format | None = spec.weight
  if isinstance(spec.product, EmulatedProduct):
    format = spec.product.weight
  if format is None:  # blockwise codes have no zero scale
    return jnp.bool_(False)
  return has_zero_group(w_DF.T, format.shared, format.size)
