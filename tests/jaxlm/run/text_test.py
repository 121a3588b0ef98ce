"""What a run says of its text, where it finds it again, and that runs are no text themselves."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from benchmarks.reliability.processes import SMALL
from jaxlm.cli import main
from jaxlm.run.run_folder import RunFolder

FLAGS = [*SMALL, "--data.source", ".", "--eval_every", "0", "--save_every", "0", "--ema", "0"]
SAID = [
  "2 files",
  "left out files and folders of the system or hidden: 1, links not followed (data.follow_links): ",
  "of these the end is held out: a.txt, b.jsonl:0, b.jsonl:3",
  "left out records whose text field holds no text: 1 (",
  "stopped at data.max_bytes=7000",
  "1 empty documents left out",
  "1 invalid UTF-8 sequences replaced",
]


def run(*arguments: str) -> str:
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    assert main(list(arguments)) == 0
  return printed.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
  """A folder of text with a run of two steps in it, and what the run printed."""
  folder = tmp_path_factory.mktemp("project")
  (folder / "a.txt").write_text("some text in lines\n" * 200)
  good = json.dumps({"text": "good text in records\n" * 100}).encode()
  lines = [good.replace(b"records", b"r\xffcords", 1), b'{"text": null}', b'{"text": ""}', good]
  (folder / "b.jsonl").write_bytes(b"\n".join(lines))
  (folder / ".DS_Store").write_bytes(b"\0")
  (folder / "link.txt").symlink_to(folder / "a.txt")
  flags = ["--data.max_bytes", "7000", "--data.invalid_utf8", "replace"]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    return folder, run("train", "micro", "--run", "runs/one", "--steps", "2", *FLAGS, *flags)


@pytest.mark.parametrize("place", ["terminal", "log", "environment"])
def test_what_was_left_out_is_said(trained, place):
  folder, printed = trained
  files = RunFolder(folder / "runs/one")
  said = {
    "terminal": printed,
    "log": files.log.read_text(),
    "environment": "\n".join(json.loads(files.environment.read_text())[-1]["data"]),
  }[place]
  assert not [line for line in SAID if line not in said]
  assert f"{folder}: " in said


def test_a_run_finds_its_text_from_anywhere_and_is_no_text_itself(trained, tmp_path, monkeypatch):
  folder, _ = trained
  run_folder = folder / "runs/one"
  assert RunFolder(run_folder).read_config().data.source == str(folder)
  (tmp_path / "a.txt").write_text("other text of the same name\n" * 200)
  monkeypatch.chdir(tmp_path)
  printed = run("resume", str(run_folder), "--steps", "3")
  assert "left out files and folders of the system or hidden: 1, folders of runs: 1" in printed
  assert "not the text" not in printed
  assert "records whose text field holds no text" in run("eval", str(run_folder))


REPLAY = pytest.param(["replay", "--step", "1"], marks=pytest.mark.slow)


@pytest.mark.parametrize("command", [["eval"], REPLAY], ids=" ".join)
def test_text_that_has_changed_is_named_by_what_only_looks_at_it(
  command, trained, tmp_path, monkeypatch
):
  folder, _ = trained
  shutil.copytree(folder, tmp_path / "copy", symlinks=True)
  monkeypatch.chdir(tmp_path / "copy")
  config = json.loads(Path("runs/one/config.json").read_text())
  config["data"]["source"] = str(tmp_path / "copy")
  Path("runs/one/config.json").write_text(json.dumps(config))
  Path("a.txt").write_text("other text\n" * 400)
  name, *flags = command
  printed = run(name, "runs/one", *flags)
  assert "not the text of the run: training text: digest" in printed
