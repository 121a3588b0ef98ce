"""Versions are pinned with hashes, no input is executed, and no path leads out of its folder."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxlm.checkpoint.manifest import NAME, verify, write_manifest
from jaxlm.cli import main
from jaxlm.config import DataConfig
from jaxlm.data.arrays import read_blocks
from jaxlm.data.cache import open_text
from jaxlm.data.tokenizer import load_tokenizer, train_bpe

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
  found = re.findall(r"^([\w.-]+)==([\w.+!-]+)", path.read_text(), re.MULTILINE)
  return {canonical(name): version for name, version in found}


@pytest.mark.parametrize("python", ["py311", "py312"])
def test_every_locked_version_is_the_known_good_one_and_has_its_hashes(python):
  lock = ROOT / f"constraints/{python}.lock.txt"
  locked, good = pins(lock), pins(ROOT / f"constraints/{python}.txt")
  assert {
    name: version for name, version in locked.items() if good.get(name, version) != version
  } == {}
  assert set(locked) - set(good) <= {"setuptools"}
  text = lock.read_text()
  for requirement in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
    assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement
  needed = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["dev"],
  ]
  needed += [
    line
    for extra in ("plot", "data")
    for line in PROJECT["project"]["optional-dependencies"][extra]
  ]
  names = {canonical(re.match(r"[\w.-]+", line)[0]) for line in needed} - {"jaxlm"}
  assert names <= set(locked)
  assert "://" not in text and "--index" not in text and "--find-links" not in text


HOSTILE = {
  "S102": "exec(text)",
  "S202": "import tarfile\ntarfile.open(text).extractall()",
  "S301": "import pickle\npickle.loads(text)",
  "S302": "import marshal\nmarshal.loads(text)",
  "S307": "eval(text)",
  "S506": "import yaml\nyaml.load(text)",
  "S602": "import subprocess\nsubprocess.run(text, shell=True)",
  "S604": "def run(*a, shell): ...\nrun(text, shell=True)",
  "S605": "import os\nos.system(text)",
  "S606": "import os\nos.execl(text, text)",
}


def test_lint_refuses_to_execute_what_users_write(tmp_path):
  """Each of these lines is an error under pyproject.toml, and nowhere are its rules off."""
  for rule, line in HOSTILE.items():
    (tmp_path / f"{rule}.py").write_text(f"text = input()\n{line}\n")
  command = [
    sys.executable,
    "-m",
    "ruff",
    "check",
    "--config",
    str(ROOT / "pyproject.toml"),
    "--output-format=json",
  ]
  done = subprocess.run([*command, "--no-cache", str(tmp_path)], capture_output=True, text=True)
  found = {(Path(error["filename"]).stem, error["code"]) for error in json.loads(done.stdout)}
  assert {(rule, rule) for rule in HOSTILE} <= found
  assert "per-file-ignores" not in PROJECT["tool"]["ruff"]["lint"]
  ours = [
    path
    for folder in ("jaxlm", "sharding", "pallas_kernels", "experiments")
    for path in (ROOT / folder).rglob("*.py")
  ]
  unlinted = re.compile(
    r"noqa: *S\d|noqa *$|allow_pickle=True|trust_remote_code=True|weights_only=False", re.MULTILINE
  )
  assert [str(path) for path in ours if unlinted.search(path.read_text())] == []


def test_a_manifest_that_names_files_elsewhere_reads_none_of_them(tmp_path):
  folder = tmp_path / "00000001"
  folder.mkdir()
  (folder / "array").write_text("1")
  os.mkfifo(tmp_path / "secret")  # opening it would wait forever
  write_manifest(folder)
  manifest = json.loads((folder / NAME).read_text())
  manifest["files"]["../secret"] = manifest["files"][str(tmp_path / "secret")] = manifest["files"][
    "array"
  ]
  (folder / NAME).write_text(json.dumps(manifest))
  assert any("damaged" in fault for fault in verify(folder))


def test_links_out_of_a_corpus_are_not_followed(tmp_path):
  (tmp_path / "secret.txt").write_text("secret")
  (tmp_path / "text").mkdir()
  (tmp_path / "text/a.txt").write_text("plain text\n" * 9)
  (tmp_path / "text/b.txt").symlink_to(tmp_path / "secret.txt")
  (tmp_path / "text/c").symlink_to(tmp_path)
  store = open_text(DataConfig(source=str(tmp_path / "text")))
  tokens = [*read_blocks(store.train.tokens), *read_blocks(store.heldout.tokens)]
  assert b"secret" not in b"".join(block.tobytes() for block in tokens)
  assert "links not followed (data.follow_links): 2" in store.report


def test_a_run_reads_the_tokenizer_of_its_own_folder_whatever_its_configuration_names(tmp_path):
  for name, size in (("run", 260), ("elsewhere", 270)):
    (tmp_path / name).mkdir()
    train_bpe(
      ["some text with a few different words in it, more of them, and others"] * 3, size
    ).save(tmp_path / name)
  config = DataConfig(tokenizer=str(tmp_path / "elsewhere/tokenizer.json"))
  assert load_tokenizer(tmp_path / "run", config).vocab_size == 260


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 300, "text/0.txt", "text/0.txt/run"])
def test_a_run_name_that_is_no_new_folder_is_refused_and_nothing_is_written(
  name, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "text").mkdir()
  (tmp_path / "text/0.txt").write_text("some text\n" * 99)
  before = sorted(tmp_path.rglob("*"))
  flags = "--data.source text --mesh.data 1 --data.length 32".split()
  assert main(["train", "micro", "--run", name, *flags]) in (1, 2)
  assert capsys.readouterr().err.startswith("jaxlm: ")
  assert sorted(tmp_path.rglob("*")) == before
