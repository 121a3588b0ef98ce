"""Turns arguments into a command, and an exception into what the user reads."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

import tyro

from jaxlm.cli.fit import fit
from jaxlm.cli.inspection import checkpoint, evaluate, kernels, plot, replay
from jaxlm.cli.planning import compile_step, plan
from jaxlm.cli.presets import list_presets, nearest
from jaxlm.cli.programs import keep_compiled_programs
from jaxlm.cli.quantization import describe, own_text, quantize
from jaxlm.cli.report import report
from jaxlm.cli.tokenize import tokenize
from jaxlm.cli.training import RESUMABLE, resume, train
from jaxlm.cli.weights import convert, sample
from jaxlm.recipes import list_recipes
from jaxlm.run.output import leave_at_once, standard_streams
from pallas_kernels.common.errors import UserError

__all__ = ["COMMANDS", "RESUMABLE", "main"]

USAGE = """\
usage: jaxlm COMMAND ...

  train PRESET [flags]   train a model; `jaxlm train PRESET --help` lists every flag
  resume DIR [flags]     go on with a run from its newest checkpoint, as with --steps 1000
  sample DIR             continue a prompt with the weights of a run or of a Hugging Face checkpoint
  eval DIR [flags]       loss on all held-out text, beside what compression reaches; of a Hugging
                         Face checkpoint with --data.source
  plot RUN [RUN...]      draw the curves of runs side by side into a picture
  replay RUN --step N    run a step again and name the first module whose numbers are not finite
  convert FROM TO        a run to a Hugging Face checkpoint, or a checkpoint to a run to be tuned
  quantize FROM TO       weights in few bits and bytes, for sample and eval (--recipe int4)
  describe PRESET        every matmul with its formats, bits and bytes; of a run also the tails
  own_text FROM FILE     text that a model samples from itself, to train it in few bits on
  checkpoint verify DIR  whether the files of a run's checkpoints are as they were written; show
                         lists what they hold
  tokenize SOURCE STORE  text of any size into a token store, for --data.source STORE
  plan PRESET            memory, time and the best mesh on chips that need not be there (--topology)
  compile PRESET         compile the step for TPUs that are not here: memory, collectives, kernels
  fit TABLE              a scaling law of a table of runs: numbers, intervals, forecast, verdict
  report                 pages of all studies and of all papers that the code implements
  kernels report         what the TPU compiler made of the kernels: cycles, MXU use, bytes

presets, or your own function as module:function, or the config.json of a run to repeat it
{presets}

recipes, for quantize, describe and train --quantize, or a JSON file of rules
{recipes}

`jaxlm COMMAND --help` says more. First try: jaxlm train micro --run runs/first
"""

BY_SIGNATURE: dict[str, Callable[..., int]] = {
  "sample": sample,
  "plot": plot,
  "replay": replay,
  "checkpoint": checkpoint,
  "tokenize": tokenize,
  "fit": fit,
  "quantize": quantize,
  "describe": describe,
  "own_text": own_text,
  "report": report,
}
"""Commands whose flags are the parameters of a function, and whose help is its docstring."""
BY_ARGUMENTS: dict[str, Callable[[list[str]], int]] = {
  "train": train,
  "resume": resume,
  "convert": convert,
  "plan": plan,
  "compile": compile_step,
  "eval": evaluate,
  "kernels": kernels,
}
"""Commands that parse their arguments themselves."""
COMMANDS = (*BY_ARGUMENTS, *BY_SIGNATURE)
COMPILING = ("train", "resume", "sample", "eval", "replay", "quantize", "describe", "own_text")
"""Commands that run what they compile."""


@standard_streams()
def main(arguments: list[str] | None = None) -> int:
  """Runs one command and returns the exit status.

  0: done. 1: failed. 2: the user's mistake, told in one line. 130: stopped, but can be resumed.
  A disk or file that refuses, and numbers that go wrong, are told in one line too, with status 1.
  Any other exception is a fault of the program and is raised on, with its traceback (status 1).
  """
  arguments = sys.argv[1:] if arguments is None else arguments
  if not arguments or arguments[0] in ("-h", "--help"):
    print(USAGE.format(presets=list_presets(), recipes=list_recipes()), end="")
    return 0 if arguments else 2
  command, flags = arguments[0], arguments[1:]
  if command in COMPILING:
    keep_compiled_programs()
  try:
    if command in BY_SIGNATURE:
      return tyro.cli(BY_SIGNATURE[command], args=flags, prog=f"jaxlm {command}")
    if command in BY_ARGUMENTS:
      return BY_ARGUMENTS[command](flags)
    names = nearest(command, COMMANDS)
    raise UserError(f"command {command!r} does not exist; nearest: {names}")
  except UserError as error:
    return _print_error(str(error), status=2)
  except OSError as error:
    if error.errno is None:  # not the operating system's, but some library's
      raise
    return _print_error(f"{type(error).__name__}: {error}", status=1)
  except (RuntimeError, AssertionError):  # jax has either where it finds no backend
    if not (fault := _missing_backend()):
      raise
    return _print_error(fault, status=2)
  except FloatingPointError as error:
    from jaxlm.decode import NoDistribution
    from jaxlm.run.guard import BadStep

    if not isinstance(error, BadStep | NoDistribution):
      raise
    return _print_error(str(error), status=1)
  except KeyboardInterrupt:
    with contextlib.suppress(OSError):
      print("jaxlm: left at once, without saving", file=sys.stderr, flush=True)
    leave_at_once(1)  # threads that still write would hold up an orderly exit


def _missing_backend() -> str:
  """Returns a line that says why jax has no devices, or nothing where it has some."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "this machine has no such devices"
    return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: {reason.splitlines()[0]}"
  return ""


def _print_error(message: str, *, status: int) -> int:
  line = " ".join(filter(None, map(str.strip, message.splitlines())))  # a library's own has several
  with contextlib.suppress(OSError):  # nobody listens; the status says it
    print(f"jaxlm: {line}", file=sys.stderr)
  return status
