"""Adds a published checkpoint to the study's table, and writes its pages again.

`python -m experiments.super_weight.natural FOLDER`, or with `--gpu` to the table of GPU runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.outliers import calibration_batches
from experiments.small_quantized import quantized
from experiments.small_text import base
from experiments.study import HERE, Scale, main, measure_points
from experiments.super_weight.measuring import Measurements
from experiments.super_weight.run import CALIBRATED, STUDY
from jaxlm.config import MeshConfig
from jaxlm.run.text import TextTask
from sharding import make_mesh


def measure_checkpoint(checkpoint: str, scale: Scale) -> dict[str, float]:
  """Returns what is measured of the checkpoint in a folder, on text of its own tokenizer."""
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    _, task = quantized(dataclasses.replace(base(scale), init=checkpoint), ())
    assert isinstance(task, TextTask)
    start = task.pretrained()
    assert start is not None  # there is a checkpoint
    rows = slice(0, task.config.batch)
    batches = calibration_batches(task, CALIBRATED, rows)
    ids_BT = jnp.asarray(batches[0].inputs_BT)
    return Measurements(task).of(start.params, ids_BT, batches, rows)


def add_checkpoint(arguments: Sequence[str] | None = None) -> None:
  """Measures the checkpoint that the command line names; a row that is there stays as it is."""
  parser = argparse.ArgumentParser(prog="python -m experiments.super_weight.natural")
  parser.add_argument("checkpoint", help="folder in the Hub's layout")
  parser.add_argument("--gpu", action="store_true", help="rows of 512 tokens, in bfloat16")
  parser.add_argument("--out", type=Path, default=HERE / STUDY.name, help="the study's folder")
  flags = parser.parse_args(arguments)
  scale: Scale = "gpu" if flags.gpu else "cpu"
  table = flags.out / ("table_gpu.csv" if flags.gpu else "table.csv")
  points = [{"task.checkpoint": flags.checkpoint, "task.scale": scale}]
  measure_points(points, table, measure_checkpoint)
  main(STUDY, ["--plot", "--out", str(flags.out)])


if __name__ == "__main__":
  add_checkpoint()
