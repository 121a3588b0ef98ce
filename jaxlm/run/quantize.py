"""Quantises a run or a checkpoint after training, and describes what that does to its bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, ModelConfig, check
from jaxlm.config.quant import find_spec
from jaxlm.data.loader import heldout_batches, load_text
from jaxlm.data.packing import Batch
from jaxlm.models.parts import list_matmuls
from jaxlm.paths import local_path
from jaxlm.quant.describe import describe, describe_cache
from jaxlm.quant.kurtosis import kurtosis_of_inputs
from jaxlm.quant.pack_model import count_bytes, pack_model, packed_config
from jaxlm.quant.scales import learned_scales, start_scales
from jaxlm.recipes import Rules
from jaxlm.run import packed
from jaxlm.run.calibration import Method, solve_on_text
from jaxlm.run.saved_run import SavedRun
from pallas_kernels.common.errors import UserError


def quantize(
  saved: SavedRun,
  rules: Rules,
  target: str | Path,
  method: Method = "nearest",
  calibration_BT: jax.Array | None = None,
) -> list[str]:
  """Writes a folder with the model's weights in bytes; returns lines that say what it holds.

  `rules`, if there are any, take the place of those that the model was trained under; scales that
  it has not learned start as for training. Each weight is rounded to its nearest level, or other
  methods find its code on ids for calibration.
  """
  folder = local_path(target, "target")
  config, params = with_rules(saved, rules)
  solve = None
  if method != "nearest":
    rule = "needs ids to calibrate on"
    check(calibration_BT is not None, "method", method, rule)
    params, solve = solve_on_text(saved, config, params, method, cast(jax.Array, calibration_BT))
  packed_config, packed_params = pack_model(config, params, solve)
  train = dataclasses.replace(saved.config, model=packed_config, run=str(folder))
  model = packed.PackedModel(
    train, saved.tokenizer, packed_params, saved.step, saved.start_ids, saved.end_ids
  )
  size = packed.save(folder, model)
  before = sum(leaf.nbytes for leaf in jax.tree.leaves(saved.params))
  return [f"{folder}: weights in {size:,} bytes, of {before:,} before ({size / before:.1%})"]


def with_rules(
  saved: SavedRun, rules: Rules, ids_BT: jax.Array | None = None
) -> tuple[ModelConfig, Any]:
  """Returns the model under other rules, with the scales that these learn at their first values.

  Without rules it is the model itself, which must have some.
  """
  model = saved.config.model
  if not rules:
    if not model.quant:
      raise UserError("recipe: must name one, as the model was trained without rules")
    return model, saved.params
  config = dataclasses.replace(model, quant=rules)
  own = set(learned_scales(model))
  plain = jax.tree_util.tree_map_with_path(
    lambda path, w: None if _name(path) in own else w, saved.params
  )
  return config, start_scales(config, _without_none(plain), ids_BT, saved.config.compute)


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _without_none(tree: Any) -> Any:
  if not isinstance(tree, dict):
    return tree
  return {name: _without_none(part) for name, part in tree.items() if part is not None}


def describe_model(model: ModelConfig, compute: ComputeConfig) -> list[str]:
  """Returns the table of matmuls, and the bytes of caches and of weights that could be packed."""
  lines = [*describe(model, compute.dtype), *describe_cache(model, compute)]
  if not any(rule.spec.weight for rule in model.quant):
    return lines
  sizes = count_bytes(model)
  inner = sum(
    matmul.shape[0] * matmul.shape[1]
    for matmul in list_matmuls(packed_config(model))
    for name in matmul.names
    if find_spec(packed_config(model).quant, name).packed
  )
  bits = 8 * sizes["packed"] / max(inner, 1)
  return [
    *lines,
    f"packed weights: {inner:,} in {sizes['packed']:,} bytes, {bits:.3f} bits each with scales",
    f"all other weights in 16 bits: {sizes['others']:,} bytes",
    f"whole model: {sizes['total']:,} bytes, of {sizes['plain']:,} in 16 bits "
    f"({sizes['total'] / sizes['plain']:.1%})",
  ]


def describe_tails(saved: SavedRun, ids_BT: jax.Array) -> list[str]:
  """Returns the kurtosis of the inputs of each layer's matmuls, and its largest and mean."""
  values = kurtosis_of_inputs(saved.config.model, saved.params, ids_BT)
  layers: dict[str, list[str]] = {}
  for name, value in values.items():
    layer, _, part = name.rpartition(".")
    place = ".".join(layer.split(".")[:2]) or "head"
    layers.setdefault(place, []).append(f"{part} {value:.2f}")
  lines = [f"  {place:<12}{'  '.join(parts)}" for place, parts in layers.items()]
  mean = sum(values.values()) / len(values)
  largest = f"largest {max(values.values()):.2f}, mean {mean:.2f}; normal values have 3"
  return ["kurtosis of inputs, per token over features", *lines, f"  {largest}"]


def encode_text(saved: SavedRun, text: str) -> jax.Array:
  """Returns the ids [1, T] of a text; the first `data.length` of them."""
  ids = saved.tokenizer.encode(text)[: saved.config.data.length]
  check(len(ids) > 0, "text", text, "must not be empty")
  return jnp.asarray(ids, jnp.int32)[None]


def heldout_ids(saved: SavedRun) -> jax.Array:
  """Returns the rows [B, T] of the first batch of a run's held-out text."""
  text = load_text(saved.config.data, saved.tokenizer)
  rows = slice(0, saved.config.batch)
  batch: Batch = next(iter(heldout_batches(text, batch=saved.config.batch, rows=rows, limit=1)))
  return jnp.asarray(batch.inputs_BT)
