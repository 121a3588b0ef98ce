"""Defines the commands of low precision: `jaxlm quantize` and `jaxlm describe`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import tyro

from jaxlm.config import ModelConfig, check
from jaxlm.paths import local_path
from jaxlm.recipes import Rules, load_rules

if TYPE_CHECKING:
  import jax

  from jaxlm.run import SavedRun


def quantize(
  run: tyro.conf.Positional[str],
  target: tyro.conf.Positional[str],
  recipe: str = "",
  method: Literal["nearest", "gptq"] = "nearest",
  text: str = "",
) -> int:
  """Write a model with its weights in as few bytes as its formats have, for sample and eval.

  Args:
    run: folder of a run, or of a Hugging Face checkpoint, or hf:owner/name
    target: new folder
    recipe: as in int4:128, or a JSON file of rules; by default the rules that the run trained under
    method: how codes are found: nearest levels, or GPTQ, which makes outputs alike on some text
    text: file to calibrate gptq on; by default a run's held-out text
  """
  from jaxlm.run import SavedRun
  from jaxlm.run.quantize import describe_model, quantize

  rules = load_rules(recipe) if recipe else ()
  check(not text or method == "gptq", "text", text, "is for --method gptq")
  saved = SavedRun.open(run)
  calibration_BT = _sample_ids(saved, text) if method == "gptq" else None
  rule = "must name a file to calibrate gptq on: the model has no held-out text of its own"
  check(method == "nearest" or calibration_BT is not None, "text", text, rule)
  written = quantize(saved, rules, target, calibration_BT)
  model = dataclasses.replace(saved.config.model, quant=rules or saved.config.model.quant)
  for line in [*describe_model(model, saved.config.compute), *written]:
    print(line)
  return 0


def describe(
  source: tyro.conf.Positional[str],
  recipe: str = "",
  text: str = "",
) -> int:
  """List every matmul with its formats, what the weights take in bytes, and the inputs' tails.

  Args:
    source: a preset, a config.json, the folder of a run or of a Hugging Face checkpoint
    recipe: as in quest:4:4, or a JSON file of rules, in place of the model's own
    text: file to measure the inputs on; by default a run's held-out text, and nothing of the others
  """
  from jaxlm.run.quantize import describe_model

  rules = load_rules(recipe) if recipe else None
  if source.endswith(".json") or not local_path(source, "source").exists():
    from jaxlm.cli.training import TrainFlags, parse_config

    config = parse_config("describe", source, [], TrainFlags)
    check(not text, "text", text, "needs weights to measure: a run or a checkpoint")
    for line in describe_model(_revised(config.model, rules), config.compute):
      print(line)
    return 0
  from jaxlm.run import SavedRun
  from jaxlm.run.quantize import describe_tails

  saved = SavedRun.open(source)
  for line in describe_model(_revised(saved.config.model, rules), saved.config.compute):
    print(line)
  ids_BT = _sample_ids(saved, text)
  for line in [] if ids_BT is None else describe_tails(saved, ids_BT):
    print(line)
  return 0


def _sample_ids(saved: SavedRun, text: str) -> jax.Array | None:
  """Returns ids of the text in a file, or of a run's held-out text; None where there is none."""
  from jaxlm.run.quantize import encode_text, heldout_ids

  if text:
    return encode_text(saved, local_path(text, "text").read_text())
  return heldout_ids(saved) if saved.config.data.source else None


def _revised(model: ModelConfig, rules: Rules | None) -> ModelConfig:
  return model if rules is None else dataclasses.replace(model, quant=rules)
