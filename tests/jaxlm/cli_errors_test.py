"""What a user reads when a command fails: one line for his own mistakes, a traceback for ours."""

import sys

import pytest

from benchmarks.reliability.processes import finish, start_python, write_corpus
from jaxlm.cli import main
from jaxlm.run.guard import BadStep, Guard
from jaxlm.run.run_folder import RunFolder, log_to
from pallas_kernels.common.errors import MissingExtraError, UserError, import_extra

SMALL = (
  "--model.D 16 "
  "--model.pattern.0.feedforward.F 16 --model.pattern.0.mixer.H 8 "
  "--mesh.data 1 --data.length 32 --eval_batches 1 --optimizer.warmup 1 --ema 0 "
  "--steps 3 --eval_every 0 --save_every 0 --run run"
).split()


@pytest.fixture
def text(tmp_path, monkeypatch):
  """A working folder with a small text; the flags that train on it."""
  monkeypatch.chdir(tmp_path)
  write_corpus(tmp_path / "text")
  return ["train", "micro", "--data.source", "text", *SMALL]


def fail_in_the_second_step(monkeypatch, error: Exception) -> None:
  def check_step(self, step, *arguments):
    if step == 2:
      raise error

  monkeypatch.setattr(Guard, "check_step", check_step)


def test_a_fault_of_the_program_keeps_its_traceback_in_the_log_too(text, tmp_path, monkeypatch):
  """Even a ValueError, which is the parent of what a user's own mistake raises."""
  fail_in_the_second_step(monkeypatch, ValueError("deep inside"))
  with pytest.raises(ValueError, match="deep inside"):
    main(text)
  log = RunFolder(tmp_path / "run").log.read_text()
  assert "Traceback" in log and "ValueError: deep inside" in log and "check_step" in log


@pytest.mark.parametrize(
  "error, message",
  [
    (OSError(28, "No space left on device", "run/x"), "OSError: [Errno 28] No space left on"),
    (BadStep("step 2: loss nan"), "jaxlm: step 2: loss nan"),
  ],
  ids=["a full disk", "a bad step"],
)
def test_a_disk_that_refuses_and_a_bad_step_are_one_line_with_status_1(
  text, monkeypatch, capsys, error, message
):
  fail_in_the_second_step(monkeypatch, error)
  assert main(text) == 1
  printed = capsys.readouterr().err
  assert message in printed and "Traceback" not in printed


def test_floating_point_errors_of_jax_keep_their_traceback(text, monkeypatch):
  fail_in_the_second_step(monkeypatch, FloatingPointError("invalid value (nan) in jit(f)"))
  with pytest.raises(FloatingPointError):
    main(text)


def test_an_oserror_that_no_system_call_raised_keeps_its_traceback(text, monkeypatch):
  fail_in_the_second_step(monkeypatch, OSError("a library's own"))
  with pytest.raises(OSError, match="a library's own"):
    main(text)


def test_a_traceback_ends_the_process_with_status_1(tmp_path):
  script = "import sys; from jaxlm.cli import commands; "
  script += (
    "commands.BY_ARGUMENTS['train'] = lambda flags: [][0]; sys.exit(commands.main(['train']))"
  )
  status, printed = finish(tmp_path, start_python(tmp_path, "-c", script))
  assert status == 1 and "Traceback" in printed and "IndexError" in printed


def test_the_log_has_the_message_of_a_user_error_without_a_traceback(tmp_path):
  with pytest.raises(UserError):
    with log_to(tmp_path / "log.txt"):
      raise UserError("steps=0: must be at least 1")
  log = (tmp_path / "log.txt").read_text()
  assert "stopped: steps=0: must be at least 1" in log and "Traceback" not in log


def test_a_missing_extra_is_named_with_the_pip_line(monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert main(["plot", "run"]) == 2
  printed = capsys.readouterr().err
  assert "needs matplotlib, which is not installed: pip install 'jaxlm[plot]'" in printed


def test_an_extra_that_is_installed_but_broken_raises_its_own_error(monkeypatch, tmp_path):
  (tmp_path / "broken_extra.py").write_text("import no_such_dependency_of_it")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="no_such_dependency_of_it") as error:
    import_extra("broken_extra", "plot", "drawing")
  assert not isinstance(error.value, UserError)
  with pytest.raises(MissingExtraError, match=r"no_such_extra.*pip install 'jaxlm\[plot\]'"):
    import_extra("no_such_extra.part", "plot", "drawing")


def test_a_preset_that_imports_what_is_missing_keeps_its_traceback(tmp_path, monkeypatch):
  (tmp_path / "mine_with_a_fault.py").write_text("import no_such_module_here")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
    main(["train", "mine_with_a_fault:preset"])


def test_a_picture_with_an_unknown_ending_is_refused(tmp_path, monkeypatch, capsys):
  pytest.importorskip("matplotlib")
  monkeypatch.chdir(tmp_path)
  assert main(["plot", "run", "--out", "curves.gif3"]) == 2
  assert "out='curves.gif3': must end in one of" in capsys.readouterr().err
