"""What names of files and folders mean, and which are refused before anything is made."""

import getpass
import io
import os
import subprocess
import sys

import pytest

from jaxlm.cli import main
from jaxlm.interop.hub_folder import local_folder
from jaxlm.paths import LONGEST, is_address, left_by_system, literal_path, local_path
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError


def test_a_home_is_expanded_wherever_a_path_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert RunFolder.at("~/run").path == tmp_path / "run"
  assert local_path(f"~{getpass.getuser()}/x", "out").is_absolute()
  (tmp_path / "model").mkdir()
  assert local_folder("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
  "name, rule",
  [
    ("", "is not empty and holds no NUL"),
    ("a\0b", "is not empty and holds no NUL"),
    ("ftp://host/x", "must be on this machine, not an address"),
    ("~nobody-of-this-name/x", "home directory"),
    ("x" * 256, "a name in it has 256 bytes, at most 255"),
    ("é" * 128, "a name in it has 256 bytes, at most 255"),
    ("x/" * (LONGEST // 2), f"bytes, at most {LONGEST}"),
  ],
  ids=lambda value: ascii(value[:20]),
)
def test_names_that_no_file_can_have_are_refused_in_a_short_line(name, rule):
  with pytest.raises(UserError, match="^run='") as error:
    local_path(name, "run")
  assert rule in str(error.value) and len(str(error.value)) < 300


def test_addresses_are_told_from_paths():
  assert all(map(is_address, ("gs://b/r", "s3://b", "gs:/b", "hdfs://h/x", "file:///x")))
  assert not any(map(is_address, ("runs/gs:/b", "/gs:/b", "C:/x", "a:b", "./gs://b", "hf:o/n")))


def test_what_systems_leave_behind_is_known_by_its_name():
  assert all(map(left_by_system, (".DS_Store", "._x", "Thumbs.db", "DESKTOP.INI", "x~", "@eaDir")))
  assert not any(map(left_by_system, ("manifest.json", "d", "ocdbt.process_0", "_METADATA", "~x")))


def test_a_folder_whose_path_libraries_misread_gets_another_one(tmp_path):
  for name in ("plain", "ünïcødé", "{a,b}", "100%", "new\nline", "]"):
    assert literal_path(tmp_path / name) == tmp_path / name
  for name in ("[a]", "a*", "a?", "a\\b", "\udcff", "gs:/x"):
    folder = tmp_path / name / "run"
    folder.mkdir(parents=True)
    link = literal_path(folder)
    assert link.samefile(folder) and literal_path(folder) == link
    assert not set(str(link)) & set("*?[\\") and "gs:" not in str(link)


COMMANDS = [
  "resume ADDRESS",
  "sample ADDRESS",
  "eval ADDRESS",
  "plot ADDRESS",
  "replay ADDRESS --step 1",
  "checkpoint verify ADDRESS",
  "convert ADDRESS new",
  "tokenize stdlib ADDRESS",
  "tokenize ADDRESS new",
  "train micro --run ADDRESS",
  "train micro --run new --init ADDRESS",
  "train micro --run new --data.source ADDRESS",
  "train micro --run new --data.tokenizer ADDRESS",
  "train micro --run new --data.cache ADDRESS",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_address_that_is_of_no_object_store_is_refused_and_no_folder_is_made(
  command, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  arguments = command.replace("ADDRESS", "ftp://bucket/run").split()
  assert main([*arguments, *(["--mesh.data", "1"] if arguments[0] == "train" else [])]) == 2
  assert "ftp:/" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "jaxlm", "train", "micro", "--run", "run"],
    env=os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1].startswith("jaxlm: JAX_PLATFORMS='cuda': ")
  assert list(tmp_path.iterdir()) == []


def test_letters_that_stdout_lacks_are_printed_as_escapes(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
  monkeypatch.setattr("jaxlm.cli.commands.USAGE", "caf\u00e9\n")
  assert main(["--help"]) == 0
  assert raw.getvalue() == b"caf\\xe9\n"


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
def test_a_seed_that_jax_would_cut_is_refused(seed, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main(["sample", "run", "--seed", seed]) == 2
  assert f"seed={seed}: must be at least 0 and below 2**32" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    main(["train", "micro", "--seed", seed])
  assert f"seed={seed}: must be at least 0" in capsys.readouterr().err


def test_a_prompt_that_is_not_utf8_is_refused(capsys):
  assert main(["sample", "run", "--prompt", "caf\udce9"]) == 2
  assert "prompt='caf\\udce9': must be UTF-8" in capsys.readouterr().err
