"""Defines the commands of low precision: `jaxlm quantize` and `jaxlm describe`."""

from __future__ import annotations

import dataclasses

import tyro

from jaxlm.config import ModelConfig, check
from jaxlm.paths import local_path
from jaxlm.recipes import Rules, load_rules


def quantize(
  run: tyro.conf.Positional[str],
  target: tyro.conf.Positional[str],
  recipe: str = "",
) -> int:
  """Write a model with its weights in as few bytes as its formats have, for sample and eval.

  Args:
    run: folder of a run, or of a Hugging Face checkpoint, or hf:owner/name
    target: new folder
    recipe: as in int4:128, or a JSON file of rules; by default the rules that the run trained under
  """
  from jaxlm.run import SavedRun
  from jaxlm.run.quantize import describe_model, quantize

  rules = load_rules(recipe) if recipe else ()
  saved = SavedRun.open(run)
  written = quantize(saved, rules, target)
  model = dataclasses.replace(saved.config.model, quant=rules or saved.config.model.quant)
  for line in [*describe_model(model, saved.config.compute.dtype), *written]:
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
    for line in describe_model(_revised(config.model, rules), config.compute.dtype):
      print(line)
    return 0
  from jaxlm.run import SavedRun
  from jaxlm.run.quantize import describe_tails, encode_text, heldout_ids

  saved = SavedRun.open(source)
  for line in describe_model(_revised(saved.config.model, rules), saved.config.compute.dtype):
    print(line)
  if text:
    ids_BT = encode_text(saved, local_path(text, "text").read_text())
  elif saved.config.data.source:
    ids_BT = heldout_ids(saved)
  else:
    return 0
  for line in describe_tails(saved, ids_BT):
    print(line)
  return 0


def _revised(model: ModelConfig, rules: Rules | None) -> ModelConfig:
  return model if rules is None else dataclasses.replace(model, quant=rules)
