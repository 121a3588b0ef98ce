"""Defines the commands that look: `jaxlm eval`, `plot`, `replay`, `checkpoint` and `kernels`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import tyro

from pallas_kernels.common.errors import UserError


def evaluate(
  run: tyro.conf.Positional[str],
  batches: int | None = None,
  dtype: Literal["float32", "bfloat16", "float16"] | None = None,
  ignore_config: tuple[str, ...] = (),
  ignore_tensors: tuple[str, ...] = (),
) -> int:
  """Compute the loss of a run's newest weights on held-out text, beside a byte model's and zlib's.

  Args:
    run: folder of the run
    batches: read only this many
    dtype: of the weights of a checkpoint; by default that of its files
    ignore_config: fields of a checkpoint's config.json to read as if they were not there
    ignore_tensors: tensors of a checkpoint that are no weights; names, or patterns with * and ?
  """
  from jaxlm.data.baselines import baselines
  from jaxlm.interop.huggingface import Ignored
  from jaxlm.run import SavedRun
  from jaxlm.run.run_folder import RunFolder
  from jaxlm.run.text_identity import changed_text

  saved = SavedRun.open(run, dtype=dtype, ignored=Ignored(ignore_config, ignore_tensors))
  text, values = saved.evaluate(batches)
  for line in text.store.report.splitlines():
    print(f"data: {line}")
  for change in changed_text(RunFolder(Path(run)), text.digests):
    print(f"not the text of the run: {change}")
  loss, tokens = values["heldout_loss"], values["tokens"]
  print(f"step {saved.step}: held-out loss {loss:.4f} nats per token over {tokens:,} tokens")
  print("bits per byte on the same text")
  for name, bits in {"this model": values["bits_per_byte"], **baselines(text.store)}.items():
    print(f"  {name:<18}{bits:.3f}")
  return 0


def plot(runs: tyro.conf.Positional[list[Path]], out: Path = Path("curves.png")) -> int:
  """Draw the curves of one or more runs side by side (extra plot).

  Reads their metrics.jsonl and eval.jsonl.

  Args:
    runs: folders of runs
    out: picture to write
  """
  from jaxlm.run.plot import draw_runs
  from jaxlm.run.run_folder import RunFolder

  draw_runs([RunFolder(run) for run in runs], out)
  print(f"drew {out}")
  return 0


def replay(run: tyro.conf.Positional[Path], step: int) -> int:
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
  run: tyro.conf.Positional[Path],
) -> int:
  """Look at a run's checkpoints without starting anything.

  Args:
    action: verify reads every file and compares (exit status 1 where one differs); show lists
      steps, sizes, configuration and arrays
    run: folder of the run
  """
  from jaxlm.checkpoint.report import print_soundness, show
  from jaxlm.run.run_folder import RunFolder

  folder = RunFolder(run)
  config = folder.read_config()
  if action == "verify":
    return print_soundness(folder.checkpoints)
  return show(folder.checkpoints, config)


def kernels(arguments: list[str]) -> int:
  """Runs `jaxlm kernels report`."""

  def report(
    chips: tuple[str, ...] = (), match: str = "", out: Path = Path("kernels_report")
  ) -> int:
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

    report(out, chips, match)
    return 0

  command, rest = " ".join(arguments[:1]), arguments[1:]
  if command in ("", "-h", "--help"):
    print("usage: jaxlm kernels report [flags]   (`jaxlm kernels report --help` lists the flags)")
    return 0 if command else 2
  if command != "report":
    raise UserError(f"command 'kernels {command}' does not exist; nearest: kernels report")
  return tyro.cli(report, args=rest, prog="jaxlm kernels report")
