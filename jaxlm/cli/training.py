"""Commands that train: `jaxlm train` and `jaxlm resume`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from jaxlm.cli.presets import list_presets, load_preset
from jaxlm.config import TrainConfig

if TYPE_CHECKING:
  from jaxlm.run import TrainResult

RESUMABLE = 130
"""Exit status after Ctrl-C, SIGTERM and --stop_after: saved before the last step, to be resumed."""


def train(arguments: list[str]) -> int:
  """Runs `jaxlm train PRESET [flags]`."""
  if not arguments or arguments[0] in ("-h", "--help"):
    print("usage: jaxlm train PRESET [flags]   (`jaxlm train PRESET --help` lists the flags)")
    print(f"\npresets\n{list_presets()}")
    return 0 if arguments else 2
  config = _parse_train(arguments[0], arguments[1:])
  from jaxlm.run import train
  from sharding.multihost import join_processes

  join_processes()
  return _exit_status(train(config))


def _parse_train(preset: str, flags: list[str]) -> TrainConfig:
  """Returns the configuration of a preset, or of a run's config.json, with these flags over it."""
  if preset.endswith(".json"):
    from jaxlm.run.run_folder import read_config

    default = read_config(Path(preset))
    default = dataclasses.replace(default, run=f"{default.run}-again")
  else:
    default = load_preset(preset)
  if not default.run:
    default = dataclasses.replace(default, run=f"runs/{preset.rpartition(':')[2]}")
  # a layer's mixer stays of its kind: a union of dataclasses gives flags, not subcommands
  options = (tyro.conf.AvoidSubcommands,)
  prog = f"jaxlm train {preset}"
  return tyro.cli(TrainConfig, default=default, args=flags, prog=prog, config=options)


def resume(run: tyro.conf.Positional[Path], steps: int | None = None) -> int:
  """Go on with a run from its newest checkpoint that verifies.

  Args:
    run: folder of the run
    steps: new number of steps, above the old one to train longer
  """
  from jaxlm.run import resume
  from sharding.multihost import join_processes

  join_processes()
  return _exit_status(resume(run, steps))


def _exit_status(result: TrainResult) -> int:
  if result.saved < result.step:
    return 1  # the log has said what went wrong
  return 0 if result.finished else RESUMABLE
