"""Numbers that go wrong, runs that repeat, input that is wrong: writes benchmarks/results/reliability_numbers.md.

    python -m benchmarks.reliability_numbers

The tests in tests/reliability/ run the same, smaller.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxlm import presets
from jaxlm.data.packing import Batch
from jaxlm.run.guard import Guard
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from jaxlm.train import step as steps
from tests.reliability import fuzz_test, messages_test
from tests.reliability.processes import SMALL, run, same_end, write_corpus
from tests.reliability.repeat_test import MESHES

RESULTS = Path(__file__).parent / "results" / "reliability_numbers.md"


def main() -> None:
  sections = [spikes(), overhead(), repeats(), wrong_input()]
  machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
  head = f"# Numbers, repetition, input\n\nWritten by `python -m benchmarks.reliability_numbers` on CPU ({machine}).\n"
  RESULTS.write_text("\n".join([head, *sections]))


def table(columns: list[str], rows: list[list]) -> str:
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def spikes(count: int = 100_000, every: int = 500) -> str:
  """False alarms on noise alone, and jumps of each size that are noticed."""
  rows = []
  for name, draw in NOISES.items():
    for jump in (0, 4, 6, 8, 12, 16):
      losses = 3 + 0.05 * draw(np.random.default_rng(0), count)
      jumps = np.arange(every, count, every)
      losses[jumps] += 0.05 * jump
      guard, found = Guard(presets.micro(), RunFolder(Path("none")), 0), []
      for step, loss in enumerate(losses.tolist()):
        if guard.is_spike(step, loss):
          found.append(step)
        guard.losses[step] = loss
        guard.losses.pop(step - 100, None)
      hits = len(set(found) & set(jumps.tolist())) if jump else 0
      rows.append([name, jump, f"{hits} of {len(jumps)}" if jump else "-", len(found) - hits])
  return f"""\
## Spikes of the loss

Losses of mean 3 and noise of standard deviation 0.05, {count:,} steps, a jump every {every}; `spike_size` 10.

{table(["noise", "jump, in deviations", "jumps noticed", "other steps reported"], rows)}"""


NOISES = {
  "normal": lambda draw, count: draw.standard_normal(count),
  "Student's t, 5 degrees": lambda draw, count: draw.standard_t(5, count) * (3 / 5) ** 0.5,
}


def overhead(turns: int = 12, each: int = 4) -> str:
  """A step that can leave its update out, beside one that cannot; in turns, so that the machine's speed meets both."""
  config = presets.tiny()
  ids_BT = np.random.default_rng(0).integers(0, 256, (config.batch, config.data.length), np.int32)
  batch = Batch(ids_BT, ids_BT, np.ones(ids_BT.shape, np.float32))
  choose, arms = steps._choose, {}
  for name, rule in {
    "leaves out": choose,
    "always takes": lambda taken, path, new, old: new,
  }.items():
    steps._choose = rule
    step, state = (
      jax.jit(make_train_step(config, TextTask(config)), donate_argnums=0),
      jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config)),
    )
    arms[name] = [step, step(state, batch, 100.0)[0], []]
  steps._choose = choose
  for _ in range(turns):
    for arm in arms.values():
      for _ in range(each):
        start = time.perf_counter()
        arm[1], metrics = arm[0](arm[1], batch, 100.0)
        jax.block_until_ready(metrics)
        arm[2].append(1e3 * (time.perf_counter() - start))
  rows = [
    [name, f"{statistics.median(arm[2]):.1f}", f"{min(arm[2]):.1f}"] for name, arm in arms.items()
  ]
  return f"""\
## What it costs that a bad update can be left out

The step of the preset `tiny` (muon), {turns * each} steps each, {each} at a time in turns. Compare the best:
the median has what else the machine did in it.

{table(["step", "median ms", "best ms"], rows)}"""


def repeats(steps: int = 30) -> str:
  """Whole runs in processes of their own."""
  rows = []
  with tempfile.TemporaryDirectory() as name:
    place = Path(name)
    write_corpus(place)
    flags = [
      "--steps",
      str(steps),
      "--save_every",
      "15",
      "--eval_every",
      "15",
      "--model.K",
      "2",
      *SMALL,
    ]
    _ok(run(place, "train", "micro", "--run", "first", *flags))
    first = RunFolder(place / "first")
    _ok(run(place, "train", "first/config.json", "--run", "again"))
    same = same_end(RunFolder(place / "again"), first)
    rows.append(
      [
        "again, from config.json",
        "0 (bit for bit, state too)" if same else "differs",
        "0" if same else "-",
      ]
    )
    for mesh in MESHES:
      axes = [f"--mesh.{axis}={size}" for axis, size in mesh.sizes().items()]
      _ok(
        run(
          place,
          "train",
          "first/config.json",
          "--run",
          str(len(rows)),
          *axes,
          JAX_NUM_CPU_DEVICES="8",
        )
      )
      rows.append([mesh.describe(), *_deviations(RunFolder(place / str(len(rows))), first)])
  return f"""\
## The same run again

{steps} steps of a model of 11 thousand parameters (adamw, float32); the largest relative difference of any step.

{table(["run", "loss", "gradient norm"], rows)}"""


def _ok(ended: tuple[int, str]) -> None:
  if ended[0]:
    raise RuntimeError(ended[1])


def _deviations(got: RunFolder, want: RunFolder) -> list[str]:
  ours, theirs = (list(read_records(folder.metrics)) for folder in (got, want))
  pairs = lambda key: [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True)]  # noqa: E731
  return [f"{max(abs(a - b) / abs(b) for a, b in pairs(key)):.1e}" for key in ("loss", "grad_norm")]


def wrong_input(configs: int = 98_000, lines: int = 2_000) -> str:
  import pytest

  start = time.perf_counter()
  taken, refused = fuzz_test.fuzz_configs(configs, seed=1)
  middle = time.perf_counter()
  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
    patch.chdir(folder)
    statuses = fuzz_test.fuzz_command_lines(lines, 2, patch)
  end = time.perf_counter()
  rows = [
    ["configurations", f"{configs:,}", f"{taken:,}", f"{refused:,}", 0, f"{middle - start:.0f}"],
    ["command lines", f"{lines:,}", statuses[0], lines - statuses[0], 0, f"{end - middle:.0f}"],
  ]
  cases = len(messages_test.CASES.strip().splitlines())
  return f"""\
## Wrong input

Random changes to configurations, and random command lines (until training would start); what is refused gets a
message. {cases} mistakes and their messages, word for word, are in tests/reliability/messages.txt.

{table(["what", "tried", "taken", "refused by a message", "tracebacks", "seconds"], rows)}"""


if __name__ == "__main__":
  main()
