"""Runs become folders of the Hub and runs again: which weights and texts are then others."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.reliability.processes import write_corpus
from benchmarks.table import table
from jaxlm import presets
from jaxlm.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig, revise
from jaxlm.decode import Sampler
from jaxlm.run import SavedRun, train
from jaxlm.run.convert import convert, tuning_config

PROMPTS = ("def f1(x):\n", "  return x + 3", "f", " x", "def", "\n", "return", "(x):")
LENGTH = 24  # tokens of each text, always the likeliest
KINDS = {
  "bytes": {},
  "bytes, tied, norms of queries and keys": {"tied": True, "qk_norm": True},
  "bpe:300": {},
  "bpe:300, biases": {"qkv_bias": True},
}


@dataclasses.dataclass(frozen=True)
class Case:
  """Says what became of one run."""

  tensors: int
  """of the run"""
  changed: int
  """tensors that are not what they were, bit for bit"""
  exported: int
  """texts of the exported folder that are the run's"""
  again: int
  """texts of the run made of that folder that are the run's"""
  elsewhere: int | None
  """texts of transformers that are the run's; None where it is not installed"""


def campaign(folder: Path) -> dict[str, Case]:
  """Trains a run of each kind, exports it, and makes a run of the export."""
  write_corpus(folder / "text")
  return {
    name: _case(folder / f"kind{index}", folder / "text", name.partition(",")[0], changes)
    for index, (name, changes) in enumerate(KINDS.items())
  }


def _case(folder: Path, text: Path, tokenizer: str, changes: dict[str, Any]) -> Case:
  micro = presets.micro()
  config: TrainConfig = replace(
    micro,
    run=str(folder / "run"),
    steps=30,
    mesh=MeshConfig(data=1),
    model=revise(micro.model, **changes),
    data=DataConfig(source=str(text), length=32, tokenizer=tokenizer),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=1),
  )
  train(config)
  convert(folder / "run", folder / "export")
  tuning = tuning_config(folder / "export", folder / "again")
  convert(folder / "export", folder / "again", config=replace(tuning, compute=config.compute))
  run, exported, again = (SavedRun.open(folder / name) for name in ("run", "export", "again"))
  written = dict(jax.tree_util.tree_leaves_with_path(again.params))
  pairs = [(w, written[path]) for path, w in jax.tree_util.tree_leaves_with_path(run.params)]
  texts = _texts(run)
  elsewhere = None
  if importlib.util.find_spec("transformers"):
    elsewhere = _equal(texts, _texts_of_transformers(folder / "export"))
  return Case(
    tensors=len(pairs),
    changed=sum(not np.array_equal(*pair) for pair in pairs),
    exported=_equal(texts, _texts(exported)),
    again=_equal(texts, _texts(again)),
    elsewhere=elsewhere,
  )


def _texts(run: SavedRun) -> list[str]:
  sampler = Sampler(temperature=0)
  return [run.sample(prompt, sampler=sampler, max_new=LENGTH) for prompt in PROMPTS]


def _texts_of_transformers(folder: Path) -> list[str]:
  from transformers import AutoModelForCausalLM, AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(folder)
  model = AutoModelForCausalLM.from_pretrained(folder)
  texts = []
  for prompt in PROMPTS:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    texts.append(whole.removeprefix(prompt))
  return texts


def _equal(texts: list[str], others: list[str]) -> int:
  return sum(text == other for text, other in zip(texts, others, strict=True))


def section(folder: Path) -> str:
  """Exports runs and imports them again; returns the section on it."""
  rows = []
  for name, case in campaign(folder).items():
    elsewhere = "not installed" if case.elsewhere is None else case.elsewhere
    rows.append([name, case.tensors, case.changed, case.exported, case.again, elsewhere])
  columns = ("run", "tensors", "changed", "of the export", "of a run made of it", "of transformers")
  return f"""\
Small runs, exported by `jaxlm convert` and made runs again. Of {len(PROMPTS)} prompts, each
continued by the {LENGTH} likeliest tokens: the texts that are those of the run itself.

{table(columns, rows)}
"""
