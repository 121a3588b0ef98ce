"""The command line: `jaxlm COMMAND`, also `python -m jaxlm`. jax is imported by the command that needs it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm import presets
from jaxlm.config import TrainConfig

USAGE = """\
usage: jaxlm COMMAND ...

  train PRESET [flags]   train a model; `jaxlm train PRESET --help` lists every flag
  resume DIR             go on with a run from its newest checkpoint (--steps raises the number of steps)
  sample DIR             continue a prompt with the weights of a run or of a Hugging Face checkpoint
  eval DIR               loss on all held-out text, beside what compression reaches
  plot RUN [RUN...]      draw the curves of runs side by side into a picture
  replay RUN --step N    run a step again and name the first module whose numbers are not finite
  convert FROM TO        a run to a Hugging Face checkpoint, or a checkpoint to a run
  checkpoint verify DIR  whether every file of a run's checkpoints is as it was written; show lists what they hold
  kernels report         what the TPU compiler made of the kernels: cycles, MXU use, bytes; no TPU needed

presets, or your own function as module:function, or the config.json of a run to repeat it
{presets}

`jaxlm COMMAND --help` says more. First try: jaxlm train micro --run runs/first
"""
RESUMABLE = 130  # exit status after Ctrl-C, SIGTERM and --stop_after: saved before the last step, to be resumed


def main(arguments: list[str] | None = None) -> int:
  """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped but resumable."""
  arguments = sys.argv[1:] if arguments is None else arguments
  if not arguments or arguments[0] in ("-h", "--help"):
    print(USAGE.format(presets=_preset_list()), end="")
    return 0 if arguments else 2
  command, rest = arguments[0], arguments[1:]
  try:
    if command not in COMMANDS:
      raise ValueError(
        f"command {command!r} does not exist; nearest: {_nearest(command, COMMANDS)}"
      )
    return COMMANDS[command](rest)
  except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
    print(f"jaxlm: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1
  except KeyboardInterrupt:
    print("jaxlm: left at once, without saving", file=sys.stderr, flush=True)
    os._exit(1)  # threads that still write would hold up an orderly exit


def _train(arguments: list[str]) -> int:
  if not arguments or arguments[0] in ("-h", "--help"):
    print(
      "usage: jaxlm train PRESET [flags]   (`jaxlm train PRESET --help` lists the flags)\n\npresets"
    )
    print(_preset_list())
    return 0 if arguments else 2
  config = parse_train(arguments[0], arguments[1:])
  from jaxlm.run import train
  from sharding.multihost import join_processes

  join_processes()
  return _finish(train(config))


def parse_train(preset: str, flags: list[str]) -> TrainConfig:
  """The configuration of a preset, or of a run's config.json, with these flags over it."""
  if preset.endswith(".json"):
    from jaxlm.run.run_folder import read_config

    default = read_config(Path(preset))
    default = dataclasses.replace(default, run=f"{default.run}-again")
  else:
    default = find_preset(preset)()
    if not isinstance(default, TrainConfig):
      raise ValueError(
        f"preset {preset!r}: returned {type(default).__name__}, must return a TrainConfig"
      )
  if not default.run:
    default = dataclasses.replace(default, run=f"runs/{preset.rpartition(':')[2]}")
  return tyro.cli(TrainConfig, default=default, args=flags, prog=f"jaxlm train {preset}")


def find_preset(name: str) -> Callable[[], TrainConfig]:
  """A function of `jaxlm.presets`, or `module:function` of the user's; ValueError where there is none."""
  module_name, colon, function = name.rpartition(":")
  if not colon:
    if name not in _presets():
      raise ValueError(f"preset {name!r} does not exist; nearest: {_nearest(name, _presets())}")
    return _presets()[name]
  sys.path.insert(0, os.getcwd())
  try:
    found = getattr(importlib.import_module(module_name), function, None)
  except ModuleNotFoundError as error:
    raise ValueError(f"preset {name!r}: {error}") from error
  if not callable(found):
    raise ValueError(f"preset {name!r}: module {module_name} has no function {function}")
  return found


def _resume(arguments: list[str]) -> int:
  def resume(run: tyro.conf.Positional[Path], steps: int | None = None) -> int:
    """Go on with a run from its newest checkpoint that verifies.

    Args:
      run: folder of the run
      steps: new number of steps, above the old one to train longer
    """
    from jaxlm.run import resume
    from sharding.multihost import join_processes

    join_processes()
    return _finish(resume(run, steps))

  return tyro.cli(resume, args=arguments, prog="jaxlm resume")


def _sample(arguments: list[str]) -> int:
  def sample(
    run: tyro.conf.Positional[str],
    prompt: str = "def ",
    max_new: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.05,
    seed: int = 0,
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1,
  ) -> int:
    """Continue a prompt with a run's newest weights, or those of a Hugging Face checkpoint.

    Args:
      run: folder of the run or checkpoint, or hf:owner/name on the Hub (extra hf)
      prompt: text to continue
      max_new: most tokens to add
      temperature: divides the logits; 0 always takes the likeliest token
      top_k: keep only the k likeliest tokens; 0 keeps all
      top_p: keep the fewest tokens that reach this probability
      min_p: keep tokens at least this share as likely as the likeliest one
      seed: of the draws
      count: how many continuations
    """
    from jaxlm.decode import Sampler

    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    from jaxlm.run import SavedRun

    saved = SavedRun.open(run)
    for index in range(count):
      print(prompt + saved.sample(prompt, sampler=sampler, max_new=max_new, seed=seed + index))
    return 0

  return tyro.cli(sample, args=arguments, prog="jaxlm sample")


def _eval(arguments: list[str]) -> int:
  def evaluate(run: tyro.conf.Positional[Path], batches: int | None = None) -> int:
    """Loss of a run's newest weights on held-out text, beside a byte model's and zlib's.

    Args:
      run: folder of the run
      batches: read only this many
    """
    from jaxlm.data.baselines import baselines
    from jaxlm.run import SavedRun

    saved = SavedRun.open(run)
    text, loss, tokens = saved.evaluate(batches)
    print(f"step {saved.step}: held-out loss {loss:.4f} nats per token over {tokens:,.0f} tokens")
    print("bits per byte on the same text")
    for name, bits in {"this model": text.bits_per_byte(loss), **baselines(text.corpus)}.items():
      print(f"  {name:<18}{bits:.3f}")
    return 0

  return tyro.cli(evaluate, args=arguments, prog="jaxlm eval")


def _plot(arguments: list[str]) -> int:
  def plot(runs: tyro.conf.Positional[list[Path]], out: Path = Path("curves.png")) -> int:
    """Draw the curves of one or more runs, from their metrics.jsonl and eval.jsonl, side by side (extra plot).

    Args:
      runs: folders of runs
      out: picture to write
    """
    from jaxlm.run.plot import draw_runs
    from jaxlm.run.run_folder import RunFolder

    draw_runs([RunFolder(run) for run in runs], out)
    print(f"drew {out}")
    return 0

  return tyro.cli(plot, args=arguments, prog="jaxlm plot")


def _replay(arguments: list[str]) -> int:
  def replay(run: tyro.conf.Positional[Path], step: int) -> int:
    """Run a step again, from the newest checkpoint before it, and name what is the first that is not finite.

    Args:
      run: folder of the run
      step: the step, as metrics.jsonl counts them
    """
    from jaxlm.run.replay import replay

    replay(run, step)
    return 0

  return tyro.cli(replay, args=arguments, prog="jaxlm replay")


def _convert(arguments: list[str]) -> int:
  def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
  ) -> int:
    """Write a run's newest weights as a Hugging Face checkpoint, or such a checkpoint as a run at step 0.

    Args:
      source: folder of a run or checkpoint, or hf:owner/name on the Hub (extra hf)
      target: folder to write, new or empty
      dtype: type of the written weights; by default float32, in which runs keep theirs
    """
    from jaxlm.run.convert import convert

    print(convert(source, target, dtype))
    return 0

  return tyro.cli(convert, args=arguments, prog="jaxlm convert")


def _checkpoint(arguments: list[str]) -> int:
  def checkpoint(
    action: tyro.conf.Positional[Literal["verify", "show"]],
    run: tyro.conf.Positional[Path],
  ) -> int:
    """Look at a run's checkpoints without starting anything.

    Args:
      action: verify reads every file and compares (exit status 1 where one differs); show lists steps, sizes,
        configuration and arrays
      run: folder of the run
    """
    from jaxlm.checkpoint.report import show, verify

    return (verify if action == "verify" else show)(run)

  return tyro.cli(checkpoint, args=arguments, prog="jaxlm checkpoint")


def _kernels(arguments: list[str]) -> int:
  def report(
    chips: tuple[str, ...] = (), match: str = "", out: Path = Path("kernels_report")
  ) -> int:
    """Cycles, MXU use, HBM traffic, spills and VMEM of the TPU kernels, as the compiler scheduled them (needs libtpu).

    Writes a table, a bar chart and JSON, and says what a schedule cannot show. Minutes per chip.

    Args:
      chips: of v5e, v5p, v6e, tpu7x; by default all
      match: only kernels whose name contains this
      out: folder to write
    """
    os.environ["JAX_PLATFORMS"] = (
      "cpu"  # nothing runs; a backend that loads libtpu first would lose its listings
    )
    from pallas_kernels.schedule.report import report

    report(out, chips, match)
    return 0

  command, rest = " ".join(arguments[:1]), arguments[1:]
  if command in ("", "-h", "--help"):
    print("usage: jaxlm kernels report [flags]   (`jaxlm kernels report --help` lists the flags)")
    return 0 if command else 2
  if command != "report":
    raise ValueError(f"command 'kernels {command}' does not exist; nearest: kernels report")
  return tyro.cli(report, args=rest, prog="jaxlm kernels report")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
  "train": _train,
  "resume": _resume,
  "sample": _sample,
  "eval": _eval,
  "plot": _plot,
  "replay": _replay,
  "convert": _convert,
  "checkpoint": _checkpoint,
  "kernels": _kernels,
}


def _finish(result) -> int:
  if result.saved < result.step:
    return 1  # the log has said what went wrong
  return 0 if result.finished else RESUMABLE


def _presets() -> dict[str, Callable[[], TrainConfig]]:
  """Every public function of `jaxlm.presets`."""
  own = {
    name: value
    for name, value in vars(presets).items()
    if getattr(value, "__module__", "") == presets.__name__
  }
  return {name: function for name, function in own.items() if not name.startswith("_")}


def _preset_list() -> str:
  return "\n".join(f"  {name:<22} {function.__doc__}" for name, function in _presets().items())


def _nearest(name: str, names) -> str:
  return ", ".join(difflib.get_close_matches(name, names, n=3) or names)
