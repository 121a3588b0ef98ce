"""Trains one configuration again: in another process, and on every mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.reliability.comparison import records
from benchmarks.reliability.processes import SMALL, run, write_corpus
from jaxlm.config import MeshConfig
from jaxlm.run.run_folder import RunFolder

MESHES = (
  MeshConfig(data=4),
  MeshConfig(data=1, fsdp=4),
  MeshConfig(data=1, tensor=2),
  MeshConfig(data=1, context_ring=2),
  MeshConfig(data=1, context_ulysses=2),
  MeshConfig(data=1, stage=2),
  MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(data=2, tensor=2, stage=2),
  MeshConfig(data=1, fsdp=2, context_ring=2, context_ulysses=2),
)


@dataclasses.dataclass(frozen=True)
class Repeats:
  """Runs of one configuration in a folder, each a process of its own."""

  folder: Path
  first: RunFolder

  def again(self) -> RunFolder:
    """Repeats the first run from its config.json alone."""
    return _train(self.folder, "first/config.json", "--run", "again")

  def on_mesh(self, mesh: MeshConfig) -> RunFolder:
    """Repeats the first run, which had one device, on so many."""
    return _train(self.folder, "first/config.json", *mesh_flags(mesh), devices="8")


def mesh_flags(mesh: MeshConfig) -> list[str]:
  """Returns the flags of a run on a mesh: `--run`, a name for it, and its axes."""
  axes = [f"--mesh.{axis}={size}" for axis, size in mesh.sizes().items()]
  return ["--run", mesh.describe().replace(" ", "_"), *axes]


def first_run(folder: Path, steps: int, *flags: str) -> Repeats:
  """Trains for so many steps, with checkpoint and evaluation half-way, on one device."""
  write_corpus(folder / "text")
  half = str(steps // 2)
  every = ["--steps", str(steps), "--save_every", half, "--eval_every", half]
  every += ["--batch", "8", "--model.pattern.0.mixer.K", "2", *SMALL, *flags]
  return Repeats(folder, _train(folder, "micro", "--run", "first", *every))


def _train(folder: Path, preset: str, *flags: str, devices: str = "1") -> RunFolder:
  status, printed = run(folder, "train", preset, *flags, JAX_NUM_CPU_DEVICES=devices)
  if status != 0:
    raise RuntimeError(printed)
  return RunFolder(folder / flags[1])


def deviation(folder: RunFolder, other: RunFolder, key: str) -> float:
  """Returns the largest relative difference of one metric over all steps."""
  pairs = zip(records(folder), records(other), strict=True)
  return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs)
