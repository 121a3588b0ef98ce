"""What a resume may change, what it refuses, and that a refusal leaves everything as it was."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from benchmarks.reliability.processes import SMALL, write_corpus
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder, read_records

FLAGS = [*SMALL, "--eval_every", "0", "--save_every", "0", "--ema", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
  """A folder with a text and a run of two steps on it."""
  folder = tmp_path_factory.mktemp("resume")
  write_corpus(folder / "text")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    assert main(["train", "micro", "--run", "run", "--steps", "2", *FLAGS]) == 0
  return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch) -> Path:
  """A copy of it, as working folder."""
  shutil.copytree(trained, tmp_path / "work")
  monkeypatch.chdir(tmp_path / "work")
  return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flags_that_contradict_nothing_take_effect_and_are_listed(work, capsys):
  flags = ["--steps", "4", "--optimizer.learning_rate", "1e-5", "--optimizer.schedule", "constant"]
  assert main(["resume", "run", *flags, "--optimizer.weight_decay", "0", "--log_every", "1"]) == 0
  records = list(read_records(RunFolder(work / "run").metrics))
  assert [record["step"] for record in records] == [1, 2, 3, 4]
  assert [record["learning_rate"] for record in records[2:]] == pytest.approx([1e-5, 1e-5])
  (line,) = [line for line in capsys.readouterr().out.splitlines() if "differs from" in line]
  assert line == (
    "differs from the start before: config.steps: 2 -> 4; config.log_every: 10 -> 1; "
    "config.optimizer.learning_rate: 0.003 -> 1e-05; "
    "config.optimizer.schedule: cosine -> constant; config.optimizer.weight_decay: 0.1 -> 0.0"
  )
  assert RunFolder(work / "run").read_config().optimizer.learning_rate == 1e-5


CONTRADICTIONS = [
  ("--model.D 32", "model.D: 16 -> 32"),
  ("--optimizer.name muon", "optimizer.name: adamw -> muon"),
  ("--ema 0.9", "ema: not kept -> kept"),
  ("--seed 3", "seed: 0 -> 3"),
  ("--data.length 16", "data.length: 32 -> 16"),
  ("--data.layout packed", "data.layout: windows -> packed"),
  ("--data.tokenizer bpe:270 --other_text", "data.tokenizer: bytes -> bpe:270"),
  ("--init somewhere", "init:  -> somewhere"),
]


@pytest.mark.parametrize("flags, field", CONTRADICTIONS, ids=lambda value: value)
def test_flags_that_contradict_the_checkpoint_are_refused_by_name(work, capsys, flags, field):
  before = contents(work)
  assert main(["resume", "run", "--steps", "4", *flags.split()]) == 2
  printed = capsys.readouterr().err
  assert "contradicts the checkpoints" in printed and printed.rstrip().endswith(f": {field}")
  assert contents(work) == before


def loggers() -> dict[str, tuple]:
  """The level, handlers and propagation of every logger."""
  every = {"": logging.getLogger()} | logging.Logger.manager.loggerDict
  return {
    name: (logger.level, tuple(logger.handlers), logger.propagate)
    for name, logger in every.items()
    if isinstance(logger, logging.Logger)
  }


@pytest.mark.parametrize(
  "arguments, status",
  [
    (["resume", "run", "--steps", "3"], 0),
    (["replay", "run", "--step", "2"], 0),
    (["resume", "run", "--steps", "3", "--seed", "1"], 2),
    (["resume", "run", "--steps", "3", "--compute.attention_implementation", "splash"], 2),
  ],
  ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_leaves_the_loggers_of_the_process_as_they_were(work, arguments, status, monkeypatch):
  for name in ("absl", "jaxlm"):  # to levels that no code of ours chooses
    monkeypatch.setattr(logging.getLogger(name), "level", 35)
  before = loggers()
  assert main(arguments) == status
  assert {name: state for name, state in loggers().items() if name in before} == before


def test_more_steps_say_what_the_learning_rate_does_and_let_choose(work, capsys):
  """Cosine from 3e-3 over two steps, of which one is warm-up, ends at 3e-4."""

  def rates(folder: str) -> list[float]:
    records = read_records(RunFolder(work / folder).metrics)
    return [record["learning_rate"] for record in records]

  shutil.copytree(work / "run", work / "kept")
  assert main(["resume", "run", "--steps", "5"]) == 0
  printed = capsys.readouterr().out
  assert "learning rate: 2.60e-03 at step 3 instead of 3.00e-04" in printed
  assert "--schedule extend, keep or decay chooses" in printed
  assert rates("run")[2] == pytest.approx(2.605e-3, rel=1e-3)
  assert main(["resume", "kept", "--steps", "4", "--schedule", "keep"]) == 0
  assert "learning rate: 3.00e-04 at step 3, 3.00e-04 at step 4" in capsys.readouterr().out
  assert rates("kept")[2:] == pytest.approx([3e-4, 3e-4])
  assert main(["resume", "kept", "--steps", "6", "--schedule", "decay"]) == 0
  assert rates("kept")[4:] == pytest.approx([3e-4, 1.65e-4])
  assert RunFolder(work / "kept").read_config().optimizer.cooldowns == (4, 6)


def test_another_batch_goes_on_with_the_next_row(work):
  flags = ["--batch", "16", "--accumulate", "2"]
  assert main(["resume", "run", "--steps", "3", *flags]) == 0
  path = checkpoint_path(RunFolder(work / "run").checkpoints, 3)
  assert json.loads((path / "data/metadata").read_text()) == {"next_row": 2 * 8 + 16}
  records = read_records(RunFolder(work / "run").metrics)
  assert [record["tokens"] for record in records] == [256, 256, 512]


def test_a_run_stays_in_its_folder(work, capsys):
  assert main(["resume", "run", "--steps", "4", "--run", "elsewhere"]) == 2
  assert "run='elsewhere': a resumed run stays in its folder run" in capsys.readouterr().err


def test_text_that_changed_is_named_and_refused_unless_a_flag_allows_it(work, capsys):
  recorded = json.loads((work / "run/text.json").read_text())
  path = work / "text/7.py"
  path.write_text(path.read_text() + "# changed\n")
  before = contents(work)
  resume = ["resume", "run", "--data.source", "text", "--steps"]  # the run has the original
  assert main([*resume, "3"]) == 2
  printed = capsys.readouterr().err
  assert "data.source='text': not the text of the run so far" in printed
  changed = [side for side in ("training", "held-out") if f"{side} text: digest" in printed]
  assert len(changed) == 1 and contents(work) == before
  assert main([*resume, "3", "--other_text"]) == 0
  assert "not the text of the run so far" in capsys.readouterr().out
  now = json.loads((work / "run/text.json").read_text())
  assert sum(recorded[side] != now[side] for side in recorded) == 1
  assert main(["resume", "run", "--steps", "4"]) == 0  # the new text is the run's from now on


def test_the_same_text_may_have_moved(trained, work, capsys):
  (work / "text").rename(work / "moved")
  assert main(["resume", "run", "--steps", "3", "--data.source", "moved"]) == 0
  text, moved = trained / "text", work / "moved"
  assert f"config.data.source: {text} -> {moved}" in capsys.readouterr().out


def test_a_refusal_after_the_start_undoes_it(work, capsys):
  """An implementation that this machine lacks is noticed when the step is traced."""
  before = contents(work / "run")
  flags = ["--steps", "4", "--compute.attention_implementation", "splash"]
  assert main(["resume", "run", *flags]) == 2
  assert "splash" in capsys.readouterr().err
  after = contents(work / "run")
  log = str(work / "run/log.txt")
  assert "stopped: " in after.pop(log).decode() and before.pop(log)
  assert after == before
  assert main(["resume", "run", "--steps", "3"]) == 0


REFUSED = [
  ["--mesh.tensor", "2", "--model.pattern.0.mixer.K", "2", "--data.tokenizer", "bpe:271"],
  ["--compute.attention_implementation", "splash"],
  ["--mesh.data", "3"],
  ["--optimizer.warmup", "9"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: " ".join(flags))
def test_a_refused_start_leaves_nothing_and_the_corrected_one_works(work, flags, capsys):
  before = contents(work)
  assert main(["train", "micro", "--run", "new/run", "--steps", "2", *FLAGS, *flags]) == 2
  assert "jaxlm: " in capsys.readouterr().err
  assert contents(work) == before and not (work / "new").exists()
  if "--compute.attention_implementation" in flags:  # the others are the same program
    assert main(["train", "micro", "--run", "new/run", "--steps", "2", *FLAGS]) == 0
    assert finished_steps(RunFolder(work / "new/run").checkpoints) == [2]
