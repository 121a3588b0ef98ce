"""A run says what it does and what it waits for."""

import json
import re
import time

import pytest

from benchmarks.reliability.processes import SMALL, run, write_corpus
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.watch import Watch

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


class Impatient(Watch):
  LEAST, COMPILING, EVERY = 0.1, 0.1, 0.01


@pytest.fixture
def said():
  return []


def heard(said: list[str], count: int) -> str:
  """The line of this number, for which it waits."""
  for _ in range(500):
    if len(said) >= count:
      break
    time.sleep(0.01)
  return said[count - 1]


@pytest.fixture
def watch(said):
  with Impatient(said.append) as watch:
    yield watch


def test_a_step_that_does_not_come_is_named_with_what_is_waited_for(watch, said):
  for _ in range(8):
    watch.step_done(0.001)
  watch.set_activity("data")
  waits = []
  for line in (
    heard(said, 1),
    heard(said, 2),
  ):  # again when the wait has doubled, not at every look
    waits.append(
      re.fullmatch(r"no step for (\d+\.\d) s \(median 0\.00 s\): waiting for the data loader", line)
    )
  assert float(waits[1][1]) >= 0.2


@pytest.mark.parametrize(
  "phase, words",
  [("device", "the devices"), ("checkpoint", "the checkpoint"), ("evaluation", "the evaluation")],
)
def test_other_waits_have_their_names(watch, said, phase, words):
  for _ in range(8):
    watch.step_done(0.001)
  watch.set_activity(phase)
  assert words in heard(said, 1)


def test_a_long_compilation_is_said_before_any_step(watch, said):
  watch.set_activity("compile")
  assert re.fullmatch(r"compiling for \d s so far", heard(said, 1))


def test_steps_that_take_their_usual_time_are_not_stalls(watch, said):
  for _ in range(8):
    watch.step_done(0.05)  # ten times this is 0.5 s
  for _ in range(10):
    watch.set_activity("device")
    time.sleep(0.03)
    watch.set_activity("data")
    watch.step_done(0.05)
  assert said == []


def test_seconds_are_counted_by_phase(watch):
  watch.set_activity("data")
  time.sleep(0.05)
  watch.set_activity("device")
  time.sleep(0.01)
  watch.set_activity("data")
  watch.set_activity("device")
  assert 0.05 <= watch.pop_seconds("data") < 0.2 and watch.pop_seconds("data") == 0


STALLING = """
import time
from jaxlm.data import loader
from jaxlm.run.watch import Watch
Watch.LEAST, Watch.EVERY, Watch.COMPILING = 1.0, 0.1, 0.5
whole = loader._Slices.__getitem__
def late(self, index):
  time.sleep(3.5 if index == 25 else 0)
  return whole(self, index)
loader._Slices.__getitem__ = late
"""


@pytest.mark.slow
def test_as_a_user_sees_it(tmp_path):
  """The loader stops for 3.5 seconds at batch 25; compiling takes more than half a second."""
  write_corpus(tmp_path / "text")
  flags = [
    "--run",
    "run",
    "--steps",
    "40",
    "--eval_every",
    "0",
    "--save_every",
    "0",
    "--log_every",
    "10",
    *SMALL,
  ]
  status, said = run(tmp_path, "train", "micro", *flags, setup=STALLING)
  assert status == 0, said
  assert re.search(r"^compiling for \d+ s so far$", said, re.MULTILINE)
  assert re.search(
    r"^no step for [1-3]\.\d s \(median 0\.\d\d s\): waiting for the data loader$",
    said,
    re.MULTILINE,
  )
  line = r"^step 10/40  loss [\d.]+  [\d,]+ tokens/s  0:00:\d\d left  MFU unknown  "
  line += r"memory \d+\.\d GiB \(host\)  "
  assert re.search(line + r"data wait \d+%  lr [\d.e-]+  grad [\d.]+$", said, re.MULTILINE), said
  waits = [record["data_seconds"] for record in read_records(RunFolder(tmp_path / "run").metrics)]
  assert max(waits) > 2 and sorted(waits)[20] < 0.5
  assert "waiting for the data loader" in (tmp_path / "run/log.txt").read_text()


def write_run(folder, name: str, losses) -> None:
  (folder / name).mkdir()
  keys = ("step", "loss", "grad_norm", "learning_rate")
  lines = [
    json.dumps(dict(zip(keys, (step, loss, 1.0 / step, 1e-3))))
    for step, loss in enumerate(losses, start=1)
  ]
  (folder / name / "metrics.jsonl").write_text(
    "\n".join(lines) + '\n{"step": 99, "lo'
  )  # cut in its last line
  (folder / name / "eval.jsonl").write_text(
    json.dumps({"step": len(losses), "heldout_loss": losses[-1]}) + "\n"
  )


def test_curves_of_runs_cut_in_the_middle_of_a_line_are_drawn(tmp_path, monkeypatch, capsys):
  pytest.importorskip("matplotlib")
  monkeypatch.chdir(tmp_path)
  write_run(tmp_path, "a", [5 / step**0.5 for step in range(1, 200)])
  write_run(tmp_path, "b", [4 / step**0.5 for step in range(1, 100)] + [float("nan")] * 3)
  assert main(["plot", "a", "b", "--out", "both.png"]) == 0
  assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
  assert "drew both.png" in capsys.readouterr().out
  (tmp_path / "empty").mkdir()
  assert main(["plot", "a", "empty"]) == 2
  assert "run='empty': holds no metrics.jsonl with a whole line" in capsys.readouterr().err
