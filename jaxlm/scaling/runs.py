"""One record per finished run: what it cost, what it reached, and how that was counted."""

# N parameters, D training tokens, U unique tokens, C training FLOPs

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.config import TrainConfig, check
from jaxlm.scaling.flops import parameter_count, train_flops_per_token
from jaxlm.scaling.laws import Counts
from pallas_kernels.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Holds a finished run. What a table does not say stays None, and laws that need it refuse.

  Raises UserError for a loss, count or token number that no run can have.
  """

  loss: float
  """nats per token, on the text that `split` names"""
  tokens: float
  """processed, repetitions included"""
  body: float | None = None
  """parameters of the layers"""
  head: float | None = None
  """parameters of the output matrix, which cost FLOPs when it is tied too"""
  embedding: float | None = None
  """parameters of the embedding, 0 where it is tied to the head"""
  total: float | None = None
  """where the parts are not known"""
  flops: float | None = None
  """of training, counted from the configuration or by the source; `six_n_d` stands beside it"""
  unique_tokens: float | None = None
  length: int | None = None
  batch_tokens: float | None = None
  precision: str = "16"
  ended: bool = True
  """whether the learning rate's schedule ended at `tokens`"""
  split: Literal["heldout", "train"] = "heldout"
  tokenizer: str = ""
  bits_per_byte: float | None = None
  learning_rate: float | None = None
  seed: int = 0
  group: str = ""
  """runs of one group share a configuration and are resampled together; by default the size"""

  def __post_init__(self) -> None:
    for field in ("loss", "tokens"):
      value = getattr(self, field)
      check(math.isfinite(value) and value > 0, field, value, "must be a positive, finite number")
    for field in ("body", "head", "embedding", "total", "flops", "unique_tokens"):
      value = getattr(self, field)
      good = value is None or math.isfinite(value) and value >= 0
      check(good, field, value, "must be a finite number, not negative")
    unique = self.unique_tokens
    check(unique is None or unique > 0, "unique_tokens", unique, "must be positive")
    check(
      unique is None or unique <= self.tokens,
      "unique_tokens",
      unique,
      f"must not exceed tokens={self.tokens:.6g}",
    )

  def parameters(self, counts: Counts) -> float:
    """Returns N as a law counts it; raises UserError where the record does not say."""
    if counts == "effective":
      check(self.flops is not None, "flops", None, "must be known where N is FLOPs per token / 6")
      assert self.flops is not None
      return self.flops / (6 * self.tokens)
    parts = {
      "body": (self.body,),
      "body+head": (self.body, self.head),
      "total": (self.body, self.head, self.embedding),
    }[counts]
    if counts == "total" and self.total is not None:
      return self.total
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
      raise UserError(
        f"counts={counts!r}: this table of runs has {self._counted()}; "
        "a law fitted to another count of parameters is another law"
      )
    return sum(known)

  def _counted(self) -> str:
    names = ("body", "head", "embedding", "total")
    return ", ".join(n for n in names if getattr(self, n) is not None) or "no parameter counts"

  def six_n_d(self, counts: Counts) -> float:
    """Returns 6 N D, which leaves attention out and may leave the head out."""
    return 6 * self.parameters(counts) * self.tokens


def run_of(config: TrainConfig, *, loss: float, tokens: float, **rest: Any) -> Run:
  """Returns the record of a run of ours; parameters and FLOPs are counted from its configuration.

  `rest` are further fields of `Run`, such as unique_tokens, bits_per_byte and seed.
  """
  model = config.model
  parts = parameter_count(model)
  output = model.D * model.V
  return Run(
    loss=loss,
    tokens=tokens,
    body=float(parts.blocks + model.D),
    head=float(output),
    embedding=0.0 if model.tied else float(parts.embedding),
    flops=train_flops_per_token(model, config.data.length) * tokens,
    length=config.data.length,
    batch_tokens=float(config.batch * config.data.length),
    learning_rate=config.optimizer.learning_rate,
    **rest,
  )


def read_runs(table: str | Path, columns: Mapping[str, str], **same: Any) -> list[Run]:
  """Returns the runs of a CSV file, one per row.

  Args:
    columns: field of `Run` -> column of the file, such as {"loss": "val_loss", "body": "params"}.
    same: fields that are the same for every run, such as tokenizer or split.

  Raises UserError for a missing file, column or field, and names the line of a bad cell.
  """
  path = Path(table)
  check(path.is_file(), "table", str(table), "there is no such file")
  fields = {field.name: str(field.type) for field in dataclasses.fields(Run)}
  for field in (*columns, *same):
    check(field in fields, "columns", field, f"must be one of {', '.join(fields)}")
  runs = []
  with path.open(newline="") as file:
    reader = csv.DictReader(file)
    missing = [column for column in columns.values() if column not in (reader.fieldnames or ())]
    have = ", ".join(reader.fieldnames or ())
    check(not missing, "columns", ", ".join(missing), f"{path.name} has {have}")
    for row in reader:
      cells = {field: row[column] for field, column in columns.items()}
      try:
        runs.append(Run(**{f: _parse(fields[f], cell) for f, cell in cells.items()}, **same))
      except ValueError as error:
        raise UserError(f"{path.name}, line {reader.line_num}: {error}") from error
  check(len(runs) > 0, "table", str(table), "has no rows")
  return runs


def _parse(kind: str, cell: str) -> Any:
  """Returns a cell as a field's kind; an empty cell is None where the field may be."""
  if "None" in kind and not cell:
    return None
  if kind.startswith(("float", "int")):
    return int(cell) if kind.startswith("int") else float(cell)
  return cell.lower() in ("1", "true") if kind == "bool" else cell


def column(runs: Iterable[Run], name: str) -> np.ndarray:
  """Returns one field of all runs as float64; raises UserError where one does not have it."""
  values = [getattr(run, name) for run in runs]
  missing = sum(value is None for value in values)
  check(missing == 0, name, None, f"is not known of {missing} of {len(values)} runs")
  return np.array(values, np.float64)


def check_comparable(runs: Sequence[Run], counts: Counts) -> list[str]:
  """Returns warnings about a table; raises UserError for runs whose losses do not compare."""
  for name in ("tokenizer", "split", "precision"):
    values = sorted({getattr(run, name) for run in runs})
    rule = "losses of runs that differ in it do not compare; fit them apart"
    check(len(values) == 1, name, ", ".join(values), rule)
  repeated = [run for run in runs if (run.unique_tokens or run.tokens) < run.tokens]
  seen = sum(run.split == "train" for run in repeated)
  rule = f"{seen} runs repeat their text: their training loss is on text they have seen"
  check(seen == 0, "split", "train", rule)
  warnings = []
  unended = sum(not run.ended for run in runs)
  if unended:
    warnings.append(
      f"{unended} losses are read before the schedule ended: E comes out too high, beta differs"
    )
  if repeated:
    warnings.append(f"{len(repeated)} runs repeat their text; the law knows no repetition")
  sizes_X = [run.parameters(counts) for run in runs]
  apart = max(sizes_X) / max(min(sizes_X), 1)
  if len({run.learning_rate for run in runs}) == 1 and runs[0].learning_rate and apart > 4:
    warnings.append(
      f"one learning rate for sizes {apart:.0f} times apart: those that it does not suit lose, "
      "which moves a"
    )
  left_out = [run.head / (run.body + run.head) for run in runs if run.head and run.body]
  if counts == "body" and max(left_out, default=0) > 0.1:
    warnings.append(
      f"N leaves out the head, up to {max(left_out):.0%} of what costs FLOPs: a comes out too high"
    )
  return warnings
