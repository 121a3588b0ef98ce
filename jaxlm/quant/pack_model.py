"""Turns a model into one whose quantised weights are held in bytes, and counts bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig, QuantSpec
from jaxlm.config.formats import Format, SparseFormat
from jaxlm.config.quant import find_spec
from jaxlm.models import Transformer
from jaxlm.models.parts import Matmul, list_matmuls
from jaxlm.quant.apply import learned_names, turn
from jaxlm.quant.groups import Encoded
from jaxlm.quant.packing import pack_encoded, pack_weight
from pallas_kernels.common.errors import UnsupportedError, UserError

Solve = Callable[[str, jax.Array, Format], Encoded]
"""(name of a matmul, weight [F, D], format) -> codes, in place of rounding to the nearest"""


def packed_config(config: ModelConfig) -> ModelConfig:
  """Returns the configuration in which every weight that has a format is packed."""
  rules = tuple(
    dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, packed=_can_pack(rule.spec)))
    for rule in config.quant
  )
  return dataclasses.replace(config, quant=rules)


def _can_pack(spec: QuantSpec) -> bool:
  return spec.weight is not None and not isinstance(spec.weight, SparseFormat)


def pack_model(
  config: ModelConfig, params: Any, solve: Solve | None = None
) -> tuple[ModelConfig, Any]:
  """Returns (configuration, parameters) of the same model with its weights in bytes.

  Codes are those of the rules in `config.quant`, or what `solve` finds for them. Raises UserError
  where no rule has a weight to pack, UnsupportedError where the layers of one stack would be packed
  differently, or the head is the embedding.
  """
  packed = packed_config(config)
  if not any(rule.spec.packed for rule in packed.quant):
    raise UserError("model.quant: no rule has a format of weights that can be packed")
  if config.tied and find_spec(packed.quant, "head").packed:
    raise UnsupportedError("model.quant: 'head' is the embedding, which is looked up unpacked")
  list_matmuls(packed)  # raises where the layers of a stack differ
  params = jax.tree.map(lambda w: w, params)  # new dicts, the same arrays
  for matmul in list_matmuls(config):
    _pack_matmul(params, matmul, packed, solve)
  return packed, params


def _pack_matmul(params: Any, matmul: Matmul, config: ModelConfig, solve: Solve | None) -> None:
  """Replaces the weight of one matmul, and the scales that it learned, in the tree."""
  spec = find_spec(config.quant, matmul.names[0])
  if not spec.packed or spec.weight is None:
    return
  part = functools.reduce(lambda tree, name: tree[name], matmul.path, params)
  weight = part.pop("weight")
  scales = {name: part.pop(f"weight_{name}") for name in learned_names(spec.weight)}
  if matmul.path[0] != "stacks":
    weight, scales = weight[None], {name: value[None] for name, value in scales.items()}
  rows = []
  for row, name in enumerate(matmul.names):
    w_FD, own = (
      turn(weight[row].T, spec.hadamard),
      {name: value[row] for name, value in scales.items()},
    )
    if solve is None:
      rows.append(pack_weight(w_FD, spec.weight, own))
    else:
      rows.append(pack_encoded(solve(name, w_FD, spec.weight), spec.weight))
  stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *rows)
  if matmul.path[0] != "stacks":
    stacked = jax.tree.map(lambda array: array[0], stacked)
  part |= {f"packed_{name}": array for name, array in stacked.items()}


def count_bytes(config: ModelConfig, *, bits: int = 16) -> dict[str, int]:
  """Returns the bytes of the weights that are packed, and of all others, if these have `bits`.

  "plain" are the same weights unpacked. Embedding and norms, and the head unless a rule packs it,
  are among the others.
  """
  shapes = jax.eval_shape(Transformer(packed_config(config)).init, jax.random.key(0))
  plain = jax.eval_shape(Transformer(dataclasses.replace(config, quant=())).init, jax.random.key(0))
  sizes = {"packed": 0, "others": 0}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    size = int(np.prod(leaf.shape))
    is_packed = path[-1].key.startswith("packed_")
    sizes["packed" if is_packed else "others"] += (
      size * leaf.dtype.itemsize if is_packed else size * bits // 8
    )
  total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(plain))
  return sizes | {"total": sizes["packed"] + sizes["others"], "plain": total * bits // 8}
