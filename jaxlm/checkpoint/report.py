"""Prints whether the checkpoints of a run are sound, and what is in them (`jaxlm checkpoint`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.folder import (
  all_steps,
  checkpoint_path,
  finished_steps,
  hold_newest_sound,
  set_aside,
  size_of,
)
from jaxlm.checkpoint.hold import held
from jaxlm.config import TrainConfig
from jaxlm.config_json import flatten, to_dict
from jaxlm.paths import literal_path


def print_soundness(folder: Path) -> int:
  """Prints a line for each checkpoint of a folder; returns 0 where all are sound, else 1.

  Reads every byte, and needs no jax.
  """
  faults_of: dict[int, list[str]] = {}
  for step in all_steps(folder):
    path = checkpoint_path(folder, step)
    with held(path) as is_there:
      if not is_there:  # the run that is being written has pruned it
        continue
      faults_of[step] = faults = manifest.verify(path)
      size = _size(path)
    print(f"step {step}: does not verify" if faults else f"step {step}: sound, {size}")
    for fault in faults:
      print(f"  {fault}")
  _print_set_aside(folder)
  sound = [step for step, faults in faults_of.items() if not faults]
  if not sound:
    print("no checkpoint verifies")
  elif len(sound) < len(faults_of):
    print(f"`jaxlm resume {folder.parent}` would go on from step {max(sound)}")
  return 0 if sound and len(sound) == len(faults_of) else 1


def show(folder: Path, config: TrainConfig) -> int:
  """Prints steps and sizes, where `config` differs from the defaults, and the newest arrays.

  Raises FileNotFoundError where no checkpoint verifies.
  """
  with hold_newest_sound(folder) as newest:
    return _show(folder, config, newest)


def _show(folder: Path, config: TrainConfig, newest: int) -> int:
  for step in finished_steps(folder):
    path = checkpoint_path(folder, step)
    with held(path) as is_there:
      if is_there:
        print(f"step {step}: {_size(path)}")
  _print_set_aside(folder)
  print("configuration, where it differs from the defaults")
  defaults = flatten(to_dict(TrainConfig()))
  for name, value in flatten(to_dict(config)).items():
    if value != defaults.get(name):
      print(f"  {name} = {value!r}")
  print(f"arrays of step {newest}")
  for name, kind in _arrays(checkpoint_path(folder, newest)):
    print(f"  {kind:<22} {name}")
  return 0


def _print_set_aside(folder: Path) -> None:
  for path in set_aside(folder):
    print(f"{path.name}: set aside by a resumed run, {_size(path)}")


def _size(path: Path) -> str:
  return f"{size_of(path) / 1e6:,.2f} MB"


def _arrays(path: Path) -> Iterator[tuple[str, str]]:
  """Yields (name, dtype and shape) of every array, from the metadata of its items."""
  import jax
  import orbax.checkpoint as ocp

  for item in ("params", "frozen", "model_state", "ema", "opt_state", "hyper"):
    if (path / item).exists():
      tree = ocp.StandardCheckpointHandler().metadata(literal_path(path) / item).tree
      for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        yield f"{item}/{name}", f"{leaf.dtype}{list(leaf.shape)}"
