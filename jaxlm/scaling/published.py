"""Tables of runs that others published: five come with this package, two must be brought along."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

from jaxlm.config import check
from jaxlm.scaling.runs import Run
from pallas_kernels.common.checks import check_choice

STAGES = ("1", "1t", "2", "2a", "3", "3a", "4", "4a", "5", "5a")
CHINCHILLA_SHA256 = "193478df4e90f040016431996c45682659306840ecdadf83cfb9cd5ca0aa1b30"
STEP_LAW_SHA256 = "9e46181076c04d450294d75dfe6f72adc416e231e154a07b337e378f9410002c"


def rows(table: str) -> Iterator[dict[str, str]]:
  """Yields the rows of a table in jaxlm/scaling/tables as text; its README explains the columns."""
  file = resources.files("jaxlm.scaling") / "tables" / f"{table}.csv"
  yield from csv.DictReader(file.read_text().splitlines())


def gadre(dataset: Literal["c4_original", "rpj"] = "c4_original") -> list[Run]:
  """Returns the over-trained runs of arXiv:2403.08540 with their loss on C4's validation text."""
  check_choice("dataset", dataset, ("c4_original", "rpj"))
  return [
    Run(
      loss=float(row["loss_c4_val"]),
      tokens=float(row["tokens"]),
      body=float(row["params_no_embed"]),
      total=float(row["params"]),
      learning_rate=float(row["lr"]),
      tokenizer="gpt-neox",
    )
    for row in rows("gadre_overtrain_runs")
    if row["dataset"] == dataset
  ]


def gemstones(*, cooled: bool = True) -> list[Run]:
  """Returns the runs of arXiv:2502.06857 at the end of a cooldown, or where each began."""
  when = "after" if cooled else "before"
  return [
    Run(
      loss=float(row[f"loss_{when}_cooldown"]),
      tokens=float(row[f"tokens_{when}_cooldown"]),
      total=float(row["params"]),
      ended=cooled,
      group=row["run"],
      tokenizer="pythia",
    )
    for row in rows("gemstones_cooldown_pairs")
  ]


def porian(stage: str) -> list[Run]:
  """Returns the RefinedWeb runs of one stage of arXiv:2406.19146, from "1" (Kaplan) to "5".

  What N and the FLOPs count changes with the stage: the layers in 1, the head too from 2 on,
  attention too in those with an "a".
  """
  check_choice("stage", stage, STAGES)
  return [
    Run(
      loss=float(row["loss"]),
      tokens=float(row["tokens"]),
      body=float(row["params"]) if row["param_count"] == "kaplan" else None,
      total=None if row["param_count"] == "kaplan" else float(row["params"]),
      flops=float(row["flops"]),
      ended=row["decay"] == "chinchilla",
      tokenizer="gpt-neox",
    )
    for row in rows("porian_isoflop_refinedweb")
    if row["stage"].split("_")[0] == stage
  ]


def datablations() -> list[Run]:
  """Returns the 182 runs with repeated C4 that arXiv:2305.16264 fitted its law to."""
  return [
    Run(
      loss=float(row["val_loss"]),
      tokens=float(row["tokens"]),
      total=float(row["params"]),
      unique_tokens=float(row["unique_tokens"]),
      seed=int(row["seed"]),
      tokenizer="gpt2",
    )
    for row in rows("datablations_runs")
    if row["in_paper_fit"] == "1"
  ]


def quest() -> list[Run]:
  """Returns the runs of arXiv:2502.05003 on C4, in 1 to 16 bits; `precision` names the format."""
  return [
    Run(
      loss=float(row["val_loss"]),
      tokens=float(row["tokens"]),
      body=float(row["params_no_embed"]),
      precision=row["precision"],
      learning_rate=float(row["lr"]),
      group=row["w_quant"],
      tokenizer="gpt2",
    )
    for row in rows("quest_precision_runs")
  ]


def chinchilla(path: str | Path) -> list[Run]:
  """Returns the 245 points that arXiv:2404.10102 took from a figure of arXiv:2203.15556.

  The file has no licence: get data/svg_extracted_data.csv of epoch-research/analyzing-chinchilla
  (commit 92258837) yourself. Raises UserError for any other file.
  """
  return [
    Run(
      loss=float(row["loss"]),
      tokens=float(row["Training FLOP"]) / 6 / float(row["Model Size"]),
      total=float(row["Model Size"]),
      tokenizer="chinchilla",
    )
    for row in csv.DictReader(_checked(path, CHINCHILLA_SHA256).splitlines())
  ]


def step_law(path: str | Path) -> list[Run]:
  """Returns the 1,911 dense runs of arXiv:2503.04715 over learning rate and batch.

  The file has no licence: get data/dense_lr_bs_loss.csv of step-law/steplaw (commit 32a8f4cc)
  yourself. Raises UserError for any other file.
  """
  return [
    Run(
      loss=float(row["smooth loss"]),
      tokens=float(row["D"]),
      body=float(row["N"]),
      length=2048,
      batch_tokens=2048 * float(row["bs"]),
      learning_rate=float(row["lr"]),
      split="train",
      tokenizer="step",
    )
    for row in csv.DictReader(_checked(path, STEP_LAW_SHA256).splitlines())
  ]


def _checked(path: str | Path, sha256: str) -> str:
  """Returns the text of a file whose digest is this."""
  check(Path(path).is_file(), "path", str(path), "there is no such file")
  content = Path(path).read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  check(digest == sha256, "path", str(path), f"has SHA-256 {digest}, not {sha256}")
  return content.decode()
