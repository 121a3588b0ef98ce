"""Defines the commands that train: `jaxlm train` and `jaxlm resume`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from jaxlm.cli.presets import list_presets, load_preset
from jaxlm.config import OnNewSteps, TrainConfig, check
from jaxlm.config.pipeline import PipelineSchedule
from jaxlm.paths import local_path
from jaxlm.recipes import load_rules
from jaxlm.run.output import leave_at_once

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
  config = without_flags(parse_config("train", arguments[0], arguments[1:], TrainFlags))
  from jaxlm.run import train
  from sharding.multihost import joined_processes

  with joined_processes():
    return _exit_status(train(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
  """Train a language model; flags change the preset's configuration."""

  schedule: PipelineSchedule | None = None
  """short for --pipeline.schedule"""
  quantize: str = ""
  """rules for model.quant: a recipe, as in quest:4:4, or a JSON file; `jaxlm --help` lists them"""


_Flags = TypeVar("_Flags", bound=TrainFlags)


def parse_config(command: str, preset: str, flags: list[str], kind: type[_Flags]) -> _Flags:
  """Returns the configuration of a preset, or of a run's config.json, with these flags over it.

  `kind` is TrainFlags, or adds fields, which become flags too.
  """
  if preset.endswith(".json"):
    from jaxlm.run.run_folder import read_config

    default = read_config(local_path(preset, "preset"))
    default = dataclasses.replace(default, run=f"{default.run}-again")
  else:
    default = load_preset(preset)
  if not default.run:
    default = dataclasses.replace(default, run=f"runs/{preset.rpartition(':')[2]}")
  # a layer's mixer stays of its kind: a union of dataclasses gives flags, not subcommands
  options = (tyro.conf.AvoidSubcommands,)
  prog = f"jaxlm {command} {preset}"
  given = tyro.cli(kind, default=kind(**_fields(default)), args=flags, prog=prog, config=options)
  if given.quantize:
    model = dataclasses.replace(given.model, quant=load_rules(given.quantize))
    given = dataclasses.replace(given, model=model)
  if given.schedule is None:
    return given
  pipeline = dataclasses.replace(given.pipeline, schedule=given.schedule)
  return dataclasses.replace(given, pipeline=pipeline)


def without_flags(given: TrainFlags) -> TrainConfig:
  """Returns the configuration alone, without fields that are only flags."""
  own = {field.name for field in dataclasses.fields(TrainConfig)}
  return TrainConfig(**{name: value for name, value in _fields(given).items() if name in own})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ResumeConfig(TrainConfig):
  """Go on with a run from its newest checkpoint that verifies; flags change its configuration."""

  schedule: OnNewSteps | None = None
  """of the learning rate, with other --steps: extend it over them (default), keep it, or decay"""
  other_text: bool = False
  """go on though the text is not the one that the run was trained on"""
  quantize: str = ""
  """rules for model.quant from here on, as for train; scales that they learn start now"""


def resume(arguments: list[str]) -> int:
  """Runs `jaxlm resume DIR [flags]`."""
  if not arguments or arguments[0] in ("-h", "--help"):
    print("usage: jaxlm resume DIR [flags]   (`jaxlm resume DIR --help` lists the flags)\n")
    print("Flags change the run's configuration, as in --steps 1000 to train longer. Those that")
    print("contradict the checkpoint are refused. --other_text goes on with text that has changed.")
    print("With other --steps, --schedule says what the learning rate does: extend, keep or decay.")
    return 0 if arguments else 2
  from jaxlm.run.remote import working_copy
  from jaxlm.run.run_folder import RunFolder

  run = arguments[0]
  with working_copy(run) as path:
    config = dataclasses.replace(RunFolder(path).read_config(), run=run)
  default = _ResumeConfig(**_fields(config))
  options = (tyro.conf.AvoidSubcommands,)
  prog = f"jaxlm resume {run}"
  flags = tyro.cli(_ResumeConfig, default=default, args=arguments[1:], prog=prog, config=options)
  values = _fields(flags)
  other_text, schedule = values.pop("other_text"), values.pop("schedule")
  if recipe := values.pop("quantize"):
    values["model"] = dataclasses.replace(flags.model, quant=load_rules(recipe))
  check(flags.run == run, "run", flags.run, f"a resumed run stays in its folder {run}")
  from jaxlm.run import resume
  from sharding.multihost import joined_processes

  with joined_processes():
    config = TrainConfig(**values)
    return _exit_status(resume(run, config, schedule=schedule, other_text=other_text))


def _fields(config: TrainConfig) -> dict[str, Any]:
  return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _exit_status(result: TrainResult) -> int:
  """Returns the status that tells how the run ended; leaves with it at once after a lost tracker.

  The library of such a tracker may wait for its helper for ever when Python ends.
  """
  if result.saved < result.step:
    status = 1  # the log has said what went wrong
  else:
    status = 0 if result.finished else RESUMABLE
  if result.lost_trackers:
    import jax

    if jax.process_count() > 1:
      jax.distributed.shutdown()  # the others would take this process for dead
    leave_at_once(status)
  return status
