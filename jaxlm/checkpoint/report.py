"""`jaxlm checkpoint verify` and `show`: what a run's checkpoints are worth, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.folder import (
  all_steps,
  checkpoint_path,
  finished_steps,
  newest_sound,
  set_aside,
  size_of,
)
from jaxlm.config import TrainConfig
from jaxlm.config_json import flatten, to_dict
from jaxlm.run.run_folder import RunFolder


def verify(run: Path) -> int:
  """Prints a line for each checkpoint; 0 where all are sound, else 1. Reads every byte, and needs no jax.

  Raises ValueError where the folder is no run.
  """
  folder = RunFolder(run)
  folder.read_config()
  sound = {}
  for step in all_steps(folder.checkpoints):
    path = checkpoint_path(folder.checkpoints, step)
    faults = manifest.verify(path)
    sound[step] = not faults
    print(f"step {step}: sound, {_size(path)}" if not faults else f"step {step}: does not verify")
    for fault in faults:
      print(f"  {fault}")
  _print_set_aside(folder)
  if not any(sound.values()):
    print("no checkpoint verifies")
    return 1
  if not all(sound.values()):
    print(
      f"`jaxlm resume {run}` would go on from step {max(step for step, good in sound.items() if good)}"
    )
  return 0 if all(sound.values()) else 1


def show(run: Path) -> int:
  """Prints steps and sizes, the configuration where it is not the default, and the newest arrays.

  Raises ValueError where the folder is no run, FileNotFoundError where it has no checkpoint that verifies.
  """
  folder = RunFolder(run)
  config = folder.read_config()
  newest = newest_sound(folder.checkpoints)
  for step in finished_steps(folder.checkpoints):
    print(f"step {step}: {_size(checkpoint_path(folder.checkpoints, step))}")
  _print_set_aside(folder)
  print("configuration, where it differs from the defaults")
  defaults = flatten(to_dict(TrainConfig()))
  for name, value in flatten(to_dict(config)).items():
    if value != defaults.get(name):
      print(f"  {name} = {value!r}")
  print(f"arrays of step {newest}")
  for name, kind in _arrays(checkpoint_path(folder.checkpoints, newest)):
    print(f"  {kind:<22} {name}")
  return 0


def _print_set_aside(folder: RunFolder) -> None:
  for path in set_aside(folder.checkpoints):
    print(f"{path.name}: set aside by a resumed run, {_size(path)}")


def _size(path: Path) -> str:
  return f"{size_of(path) / 1e6:,.2f} MB"


def _arrays(path: Path) -> Iterator[tuple[str, str]]:
  """(name, dtype and shape) of every array, from the metadata of its items."""
  import jax
  import orbax.checkpoint as ocp

  for item in ("params", "ema", "optimizer"):
    if (path / item).exists():
      tree = ocp.StandardCheckpointHandler().metadata((path / item).absolute()).tree
      for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        yield f"{item}/{name}", f"{leaf.dtype}{list(leaf.shape)}"
