"""What a resume may change, what it refuses, and that a refusal leaves everything as it was."""

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.reliability.processes import SMALL, write_corpus
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder, read_records

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

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
    pytest.param(["resume", "run", "--steps", "3"], 0, marks=pytest.mark.slow),
    pytest.param(["replay", "run", "--step", "2"], 0, marks=pytest.mark.slow),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def change_the_text(work) -> None:
  path = work / "text/7.py"
  path.write_text("#" + path.read_text()[1:])  # as long as before: documents keep their sides


def test_text_that_changed_is_named_and_refused(work, capsys):
  change_the_text(work)
  before = contents(work)
  # the run has the original
  assert main(["resume", "run", "--data.source", "text", "--steps", "3"]) == 2
  printed = capsys.readouterr().err
  assert "data.source='text': not the text of the run so far" in printed
  changed = [side for side in ("training", "held-out") if f"{side} text: digest" in printed]
  assert len(changed) == 1 and contents(work) == before


@pytest.mark.slow
def test_a_flag_allows_other_text_which_is_the_runs_from_then_on(work, capsys):
  recorded = json.loads((work / "run/text.json").read_text())
  change_the_text(work)
  assert main(["resume", "run", "--data.source", "text", "--steps", "3", "--other_text"]) == 0
  assert "not the text of the run so far" in capsys.readouterr().out
  now = json.loads((work / "run/text.json").read_text())
  assert sum(recorded[side] != now[side] for side in recorded) == 1
  assert main(["resume", "run", "--steps", "4"]) == 0


def test_the_same_text_may_have_moved(trained, work, capsys):
  (work / "text").rename(work / "moved")
  assert main(["resume", "run", "--steps", "3", "--data.source", "moved"]) == 0
  text, moved = trained / "text", work / "moved"
  assert f"config.data.source: {text} -> {moved}" in capsys.readouterr().out


def test_a_refusal_after_the_start_undoes_it(work, capsys):
  """An implementation that this machine lacks is noticed when the step is traced."""
  folder = RunFolder(work / "run")
  with folder.metrics.open("a") as records:  # of a step that no checkpoint has, and half of one
    records.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
  unfinished = folder.checkpoints / "00000003/params/x"
  unfinished.parent.mkdir(parents=True)
  unfinished.write_text("")
  before = contents(work / "run")
  flags = ["--steps", "4", "--compute.attention_implementation", "splash"]
  assert main(["resume", "run", *flags]) == 2
  assert "splash" in capsys.readouterr().err
  after = contents(work / "run")
  log = str(work / "run/log.txt")
  assert "stopped: " in after.pop(log).decode() and before.pop(log)
  assert after == before
  assert main(["resume", "run", "--steps", "3"]) == 0
  assert [record["step"] for record in read_records(folder.metrics)] == [1, 2, 3]
  assert (folder.checkpoints / "00000003.unsound/params/x").exists()


REFUSED = [
  ["--mesh.tensor", "2", "--model.pattern.0.mixer.K", "2", "--data.tokenizer", "bpe:271"],
  ["--compute.attention_implementation", "splash"],
  ["--mesh.data", "3"],
  ["--optimizer.warmup", "9"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: " ".join(flags))
def test_a_refused_start_leaves_nothing(work, flags, capsys):
  before = contents(work)
  assert main(["train", "micro", "--run", "new/run", "--steps", "2", *FLAGS, *flags]) == 2
  assert "jaxlm: " in capsys.readouterr().err
  assert contents(work) == before and not (work / "new").exists()


@pytest.mark.slow
def test_after_a_refused_start_the_corrected_one_works(work):
  start = ["train", "micro", "--run", "new/run", "--steps", "2", *FLAGS]
  assert main([*start, "--compute.attention_implementation", "splash"]) == 2
  assert main(start) == 0
  assert finished_steps(RunFolder(work / "new/run").checkpoints) == [2]


@pytest.mark.parametrize("made", ["nothing", "a folder", "a folder with a system's file"])
def test_a_failure_before_the_first_step_has_ended_leaves_nothing(work, made, monkeypatch):
  if made != "nothing":
    (work / "new").mkdir()
  if made == "a folder with a system's file":
    (work / "new/.DS_Store").write_text("")
  before = sorted(work.rglob("*"))

  def out_of_memory(*arguments):
    raise RuntimeError("RESOURCE_EXHAUSTED")

  monkeypatch.setattr("jaxlm.run.loop.make_train_step", lambda *arguments: out_of_memory)
  with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
    main(["train", "micro", "--run", "new", "--steps", "2", *FLAGS])
  assert sorted(work.rglob("*")) == before


def test_a_run_that_exists_is_refused_before_its_text_is_read(work, capsys):
  flags = ["--data.source", "nowhere"]
  assert main(["train", "micro", "--run", "run", "--steps", "2", *FLAGS, *flags]) == 2
  assert "run='run': must be a new or empty folder" in capsys.readouterr().err


def test_wandb_without_an_account_is_refused_before_the_text_is_read(work, capsys, monkeypatch):
  wandb = pytest.importorskip("wandb")

  def login(**options):
    raise wandb.errors.UsageError("No API key configured")

  monkeypatch.setattr(wandb, "login", login)
  flags = ["--data.source", "nowhere", "--trackers", "wandb"]
  assert main(["train", "micro", "--run", "new/run", "--steps", "2", *FLAGS, *flags]) == 2
  assert "trackers=wandb: No API key configured" in capsys.readouterr().err
  assert not (work / "new").exists()


def test_a_home_is_expanded_and_letters_that_stdout_lacks_are_escaped(work, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(work))
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
  assert main(["sample", "~/run", "--prompt", "caf\u00e9", "--max-new", "1"]) == 0
  assert raw.getvalue().startswith(b"caf\\xe9")
  assert "standard output takes ascii alone" in capsys.readouterr().err
  assert main(["convert", "~/run", "~/hf"]) == 0
  assert (work / "hf/config.json").exists() and not (work / "~").exists()


def test_a_run_is_measured_on_the_text_that_is_named(work, capsys):
  (work / "other.txt").write_text("one two three " * 500)
  assert main(["eval", "run", "--data.source", "other.txt", "--data.holdout", "0.5"]) == 0
  printed = capsys.readouterr().out
  assert "other.txt: 1 document" in printed and "not the text of the run: held-out text" in printed
  assert main(["eval", "run", "--data.source", "other.txt", "--data.tokenizer", "bpe:300"]) == 2
