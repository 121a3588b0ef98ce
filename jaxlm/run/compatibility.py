"""Decides which fields of a run's configuration may change when it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxlm.config import ModelConfig, TrainConfig
from jaxlm.config_json import from_dict, to_dict
from jaxlm.quant.scales import learned_scales
from jaxlm.run.environment import differences, starts
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError

FREE_OF_MODEL = ("max_length", "quant")
"""Fields of the model that change no weight; the scales that `quant` learns are compared apart."""
ROWS = ("length", "layout")
"""Fields of the data that decide how text is cut into rows; digests identify the text itself."""


def check_compatible(
  folder: RunFolder,
  config: TrainConfig,
  step: int,
  *,
  other_data: bool = False,
  counts_rows: bool = False,
) -> None:
  """Raises UserError with the fields in which `config` contradicts the run's checkpoint of `step`.

  The model, the update rule and whether an average is kept decide what arrays a checkpoint holds;
  seed, initial weights and the tokenizer's vocabulary are in them. After step 0 its position in the
  data counts rows of text, or batches unless `counts_rows`, so these may not change either, but for
  rows with `other_data`.
  Compares with the last start of the run, or where it never started with its config.json.
  """
  started = [start["config"] for start in starts(folder) if isinstance(start.get("config"), dict)]
  before = started[-1] if started else json.loads(folder.config.read_text())
  _check_scales(folder, before, config)
  saved = _fixed_fields(before, step, other_data, counts_rows)
  now = _fixed_fields(json.loads(json.dumps(to_dict(config))), step, other_data, counts_rows)
  wrong = differences(saved, {name: value for name, value in now.items() if name in saved})
  if wrong:
    rule = "contradicts the checkpoints, which were written with other values (saved -> now)"
    raise UserError(f"{folder.config}: {rule}: {'; '.join(wrong)}")


def _check_scales(folder: RunFolder, before: Mapping[str, Any], config: TrainConfig) -> None:
  """Raises UserError where the rules do without scales that the checkpoints hold, or change one.

  Scales that are new start from the weights and the next batch (`jaxlm.run.restore`).
  """
  quant = before.get("model", {}).get("quant", [])
  rules = from_dict(ModelConfig, {"quant": quant}).quant
  saved = learned_scales(dataclasses.replace(config.model, quant=rules))
  now = learned_scales(config.model)
  wrong = [
    f"{name} ({format} -> {now.get(name, 'none')})"
    for name, format in saved.items()
    if now.get(name) != format
  ]
  if wrong:
    rule = "the checkpoints hold learned scales of other formats (saved -> now)"
    raise UserError(f"{folder.config}: model.quant: {rule}: {', '.join(wrong[:4])}")


def _fixed_fields(
  config: Mapping[str, Any], step: int, other_data: bool, counts_rows: bool
) -> dict[str, Any]:
  """Returns the fields that the checkpoint of `step` fixes, as nested dicts."""
  model, data = config.get("model", {}), config.get("data", {})
  fixed: dict[str, Any] = {
    "model": {name: value for name, value in model.items() if name not in FREE_OF_MODEL},
    "optimizer": {"name": config.get("optimizer", {}).get("name")},
    "ema": "kept" if config.get("ema") else "not kept",
    "seed": config.get("seed"),
    "init": config.get("init"),
    "data": {"tokenizer": data.get("tokenizer")},
  }
  if step > 0 and not counts_rows:
    fixed["batch"] = config.get("batch")
  if step > 0 and not other_data:
    fixed["data"] |= {name: data.get(name) for name in ROWS}
  return fixed
