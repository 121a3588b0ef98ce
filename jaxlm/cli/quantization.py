"""Defines the commands of low precision: `jaxlm quantize`, `describe` and `own_text`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import tyro

from jaxlm.config import ModelConfig, check, check_seed
from jaxlm.paths import local_path
from jaxlm.recipes import Rules, load_rules

if TYPE_CHECKING:
  import jax

  from jaxlm.run import SavedRun


def quantize(
  run: tyro.conf.Positional[str],
  target: tyro.conf.Positional[str],
  recipe: str = "",
  method: Literal["nearest", "gptq", "awq", "omniquant"] = "nearest",
  text: str = "",
) -> int:
  """Write a model with its weights in as few bytes as its formats have, for sample and eval.

  Args:
    run: folder of a run, or of a Hugging Face checkpoint, or hf:owner/name
    target: new folder
    recipe: as in int4:128, or a JSON file of rules; by default the rules that the run trained under
    method: nearest levels, or codes by which outputs stay alike on some text: GPTQ, AWQ's scaled
      channels, OmniQuant's learned clipping
    text: file to calibrate these on; by default a run's held-out text
  """
  from jaxlm.run import SavedRun
  from jaxlm.run.quantize import describe_model, quantize

  rules = load_rules(recipe) if recipe else ()
  rule = "is for --method gptq, awq and omniquant"
  check(not text or method != "nearest", "text", text, rule)
  saved = SavedRun.open(run)
  calibration_BT = None if method == "nearest" else _sample_ids(saved, text)
  rule = "must name a file to calibrate on: the model has no held-out text of its own"
  check(method == "nearest" or calibration_BT is not None, "text", text, rule)
  written = quantize(saved, rules, target, method, calibration_BT)
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


def own_text(
  run: tyro.conf.Positional[str],
  target: tyro.conf.Positional[str],
  documents: int = 1024,
  length: int = 256,
  greedy: int = 4,
  batch: int = 32,
  seed: int = 0,
) -> int:
  """Write text that a model samples from itself, as LLM-QAT does, to train it in few bits on.

  Started again after it was stopped or killed, it goes on where it was. Train from the text with
  --data.source TARGET.

  Args:
    run: folder of a run, or of a Hugging Face checkpoint, or hf:owner/name
    target: new file of JSON lines
    documents: how many
    length: tokens of a document, unless it ends before
    greedy: after a first token that is drawn from the vocabulary, take so many most likely ones
    batch: documents at a time
    seed: of the draws
  """
  check_seed(seed)
  from jaxlm.run import SavedRun
  from jaxlm.run.own_text import write_own_text

  saved = SavedRun.open(run)
  sizes = {"documents": documents, "length": length, "greedy": greedy, "batch": batch}
  print(write_own_text(saved, target, seed=seed, **sizes))
  return 0


def _sample_ids(saved: SavedRun, text: str) -> jax.Array | None:
  """Returns ids of the text in a file, or of a run's held-out text; None where there is none."""
  from jaxlm.run.quantize import encode_text, heldout_ids

  if text:
    return encode_text(saved, local_path(text, "text").read_text())
  return heldout_ids(saved) if saved.config.data.source else None


def _revised(model: ModelConfig, rules: Rules | None) -> ModelConfig:
  return model if rules is None else dataclasses.replace(model, quant=rules)
