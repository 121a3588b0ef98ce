"""Small decoders on bytes of Python's own sources: what the studies of scaling laws train."""

from __future__ import annotations

import dataclasses
import functools
import math
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import Scale
from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
  check,
  decoder,
)
from jaxlm.data.loader import load_text
from jaxlm.scaling.flops import train_flops_per_token
from jaxlm.scaling.grid import GridRun, with_fields
from jaxlm.scaling.intervals import Interval
from jaxlm.scaling.runs import Run
from jaxlm.scaling.sweep import Executor, MakeTask, Row, sweep

EVALUATED = 65536
"""held-out tokens, the same ones for every run"""
SETTING = (
  "Decoders (RMSNorm, rotary embedding, SwiGLU of width 8/3 D, untied head) on bytes of the "
  "interpreter's own standard library; 6 % of its bytes, as whole files, are held out, and 65,536 "
  "of them evaluated. AdamW, beta2 0.98, weight decay 0.1, clipping at 1, float32."
)


def base(scale: Scale, **optimizer: Any) -> TrainConfig:
  """Returns the run that all runs of a study differ from: warm-up, then 80 % constant, 20 % decay.

  Rows of 128 bytes in batches of 8. On a GPU of 512 bytes in batches of 64, in bfloat16, of the
  Python packages that are installed: the standard library is too small for those runs.
  """
  on_gpu = scale == "gpu"
  batch, length = (64, 512) if on_gpu else (8, 128)
  given = {
    "schedule": "wsd",
    "final": 0.0,
    "warmup": 5 if scale == "smoke" else 20,
    "b2": 0.98,
  } | optimizer
  return TrainConfig(
    batch=batch,
    eval_batches=(4 if scale == "smoke" else EVALUATED // (batch * length)),
    mesh=MeshConfig(data=1),
    model=decoder(D=8, F=24, N=1, K=1, H=8, layers=1),
    compute=ComputeConfig(dtype="bfloat16" if on_gpu else "float32"),
    data=DataConfig(
      source=sysconfig.get_path("purelib") if on_gpu else "stdlib", length=length, holdout=0.06
    ),
    optimizer=OptimizerConfig(**given),
  )


def train(
  config: TrainConfig,
  points: Sequence[Mapping[str, Any]],
  table: Path,
  *,
  make_task: MakeTask | None = None,
  together: bool = True,
  executor: Executor | None = None,
) -> list[Row]:
  """Trains runs of text by `sweep`; raises UserError where one would read text more than once."""
  rows_of_text = count_rows(config.data)
  for point in points:
    run = GridRun.of(config, point).config
    read = run.steps * run.batch
    rule = f"reads {read} rows, the text has {rows_of_text}: repeated text is another study"
    check(read <= rows_of_text, "steps", run.steps, rule)
  return sweep(config, points, table, make_task=make_task, together=together, executor=executor)


@functools.cache
def count_rows(data: DataConfig) -> int:
  """Returns how many rows of training text there are."""
  return len(load_text(data).train)


def shape(D: int, layers: int) -> dict[str, int]:
  """Returns the fields of a model of this width and depth, with heads of 8, or 64 from D = 256."""
  H = 64 if D >= 256 else 8
  while D % H:
    H //= 2
  first = "model.pattern.0."
  F = 8 * round(D / 3)
  sizes = {f"{first}mixer.N": D // H, f"{first}mixer.K": D // H, f"{first}mixer.H": H}
  return {"model.D": D, "model.layers": layers, f"{first}feedforward.F": F, **sizes}


def steps_within(config: TrainConfig, fields: Mapping[str, Any], flops: float) -> int:
  """Returns how many steps of a run with these fields cost so many training FLOPs."""
  config = with_fields(config, fields)
  tokens = config.batch * config.data.length
  per_step = train_flops_per_token(config.model, config.data.length) * tokens
  return max(round(flops / per_step), config.optimizer.warmup + 1)


def two_digits(value: float) -> float:
  """Returns a learning rate rounded to two significant digits."""
  return float(f"{value:.1e}")


def runs_of(rows: Iterable[Row]) -> list[Run]:
  """Returns the records of rows; N, D and exact FLOPs stand in the table."""
  return [
    Run(
      loss=row["heldout_loss"],
      tokens=row["tokens"],
      body=row["body"],
      head=row["head"],
      embedding=row["embedding"],
      flops=row["flops"],
      bits_per_byte=row["bits_per_byte"],
      learning_rate=row["optimizer.learning_rate"],
      seed=row.get("seed") or 0,
      tokenizer="bytes",
    )
    for row in rows
  ]


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
  """Returns the rows with these values; `model_D` stands for "model.D"."""
  fields = {name.replace("_", ".", 1): value for name, value in values.items()}
  return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


@dataclasses.dataclass(frozen=True)
class Minimum:
  """Holds the vertex of a parabola in ln x."""

  x: float
  y: float
  curvature: float
  inside: bool
  """whether the parabola is convex and its vertex lies between the values that were tried"""


def minimum(x_K: Sequence[float], y_K: Sequence[float], window: float = 1.5) -> Minimum:
  """Returns the minimum over ln x from the points at most `window` from the least, in ln x."""
  log_x, y = np.log(x_K), np.asarray(y_K, float)
  near = np.abs(log_x - log_x[y.argmin()]) <= window
  centre = log_x[near].mean()
  if len(np.unique(log_x[near])) < 3:
    return Minimum(float(np.exp(log_x[y.argmin()])), float(y.min()), math.nan, False)
  a, b, c = np.polyfit(log_x[near] - centre, y[near], 2)
  vertex = -b / (2 * a) if a > 0 else math.nan
  inside = bool(a > 0 and log_x.min() < vertex + centre < log_x.max())
  if not inside:
    return Minimum(float(np.exp(log_x[y.argmin()])), float(y.min()), float(2 * a), False)
  return Minimum(math.exp(vertex + centre), float(c - b**2 / (4 * a)), float(2 * a), True)


def signed(value: Interval) -> str:
  """Returns a difference with its interval in words, as in "+0.012 (-0.001 to +0.025)"."""
  return f"{value[0]:+.3f} ({value[1]:+.3f} to {value[2]:+.3f})"
