"""Defines the commands that look: `jaxlm eval`, `plot`, `replay`, `checkpoint` and `kernels`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from typing import Literal

import tyro

from jaxlm.config import DataConfig, check
from jaxlm.paths import local_path
from pallas_kernels.common.errors import UserError

EVAL_USAGE = """\
usage: jaxlm eval RUN [--batches 20]
       jaxlm eval CHECKPOINT --data.source TEXT [flags]

Computes the loss on held-out text, beside a byte model's and zlib's: of a run's newest weights on
the run's own text, unless --data flags name another, or of a Hugging Face checkpoint (a folder, or
hf:owner/name with extra hf). `jaxlm eval RUN --help` lists every flag.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalFlags:
  """Compute the loss of a model's weights on held-out text, beside a byte model's and zlib's."""

  data: DataConfig
  batches: int | None = None
  """read only this many"""
  dtype: Literal["float32", "bfloat16", "float16"] | None = None
  """of the weights of a checkpoint; by default that of its files"""
  ignore_config: tuple[str, ...] = ()
  """fields of a checkpoint's config.json to read as if they were not there"""
  ignore_tensors: tuple[str, ...] = ()
  """tensors of a checkpoint that are no weights; names, or patterns with * and ?"""


def evaluate(arguments: list[str]) -> int:
  """Runs `jaxlm eval DIR [flags]`."""
  if not arguments or arguments[0] in ("-h", "--help"):
    print(EVAL_USAGE, end="")
    return 0 if arguments else 2
  from jaxlm.data.baselines import baselines
  from jaxlm.decode import NoDistribution
  from jaxlm.interop.huggingface import Ignored, is_checkpoint
  from jaxlm.run import SavedRun, packed
  from jaxlm.run.remote import working_copy
  from jaxlm.run.run_folder import RunFolder
  from jaxlm.run.text_identity import changed_text

  run = arguments[0]
  published, in_bytes = is_checkpoint(run), False
  if published:
    data = DataConfig(source="")
  else:
    with working_copy(run) as path:
      in_bytes = packed.is_packed(path)
      config = packed.read_config(path) if in_bytes else RunFolder(path).read_config()
      data = config.data
  prog = f"jaxlm eval {run}"
  flags = tyro.cli(_EvalFlags, default=_EvalFlags(data=data), args=arguments[1:], prog=prog)
  rule = "a checkpoint has no text of its own; name one with --data.source FILE_OR_FOLDER"
  check(bool(flags.data.source), "data.source", flags.data.source, rule)
  rule = "weights have a tokenizer of their own"
  check(flags.data.tokenizer == data.tokenizer, "data.tokenizer", flags.data.tokenizer, rule)
  ignored = Ignored(flags.ignore_config, flags.ignore_tensors)
  saved = SavedRun.open(run, dtype=flags.dtype, ignored=ignored)
  text, values = saved.evaluate(flags.batches, flags.data)
  for line in text.store.report.splitlines():
    print(f"data: {line}")
  if not (published or in_bytes):
    for change in changed_text(RunFolder(path), text.digests):
      print(f"not the text of the run: {change}")
  loss, tokens = values["heldout_loss"], values["tokens"]
  if not math.isfinite(loss):
    raise NoDistribution(f"the held-out loss is {loss}; {saved.describe_weights()}")
  print(f"step {saved.step}: held-out loss {loss:.4f} nats per token over {tokens:,} tokens")
  print("bits per byte on the same text")
  for name, bits in {"this model": values["bits_per_byte"], **baselines(text.store)}.items():
    print(f"  {name:<18}{bits:.3f}")
  return 0


def plot(runs: tyro.conf.Positional[list[str]], out: str = "curves.png") -> int:
  """Draw the curves of one or more runs side by side (extra plot).

  Reads their metrics.jsonl and eval.jsonl.

  Args:
    runs: folders of runs
    out: picture to write
  """
  from jaxlm.run.plot import draw_runs
  from jaxlm.run.remote import working_copy
  from jaxlm.run.run_folder import RunFolder

  with contextlib.ExitStack() as stack:
    folders = [RunFolder(stack.enter_context(working_copy(run))) for run in runs]
    draw_runs(folders, local_path(out, "out"))
  print(f"drew {out}")
  return 0


def replay(run: tyro.conf.Positional[str], step: int) -> int:
  """Run a step again and name the first module whose numbers are not finite.

  Starts from the newest checkpoint before the step.

  Args:
    run: folder of the run
    step: the step, as metrics.jsonl counts them
  """
  from jaxlm.run.replay import replay

  replay(run, step)
  return 0


def checkpoint(
  action: tyro.conf.Positional[Literal["verify", "show"]],
  run: tyro.conf.Positional[str],
) -> int:
  """Look at a run's checkpoints without starting anything.

  Args:
    action: verify reads every file and compares (exit status 1 where one differs); show lists
      steps, sizes, configuration and arrays
    run: folder of the run
  """
  from jaxlm.checkpoint.report import print_soundness, show
  from jaxlm.run.remote import working_copy
  from jaxlm.run.run_folder import RunFolder

  with working_copy(run) as path:
    folder = RunFolder(path)
    config = folder.read_config()
    if action == "verify":
      return print_soundness(folder.checkpoints)
    return show(folder.checkpoints, config)


def kernels(arguments: list[str]) -> int:
  """Runs `jaxlm kernels report`."""

  def report(chips: tuple[str, ...] = (), match: str = "", out: str = "kernels_report") -> int:
    """List what the TPU compiler made of the kernels (needs libtpu; takes minutes per chip).

    Writes cycles, MXU use, HBM traffic, spills and VMEM as a table, a bar chart and JSON, and says
    what a schedule cannot show.

    Args:
      chips: of v5e, v5p, v6e, tpu7x; by default all
      match: only kernels whose name contains this
      out: folder to write
    """
    # Nothing runs; a backend that loads libtpu first would lose its listings.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from pallas_kernels.schedule.report import report

    report(local_path(out, "out"), chips, match)
    return 0

  command, rest = " ".join(arguments[:1]), arguments[1:]
  if command in ("", "-h", "--help"):
    print("usage: jaxlm kernels report [flags]   (`jaxlm kernels report --help` lists the flags)")
    return 0 if command else 2
  if command != "report":
    raise UserError(f"command 'kernels {command}' does not exist; nearest: kernels report")
  return tyro.cli(report, args=rest, prog="jaxlm kernels report")
