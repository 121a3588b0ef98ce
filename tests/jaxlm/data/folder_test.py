"""What is in a folder besides text is left out, and counted by its reason."""

import json
import os

import pytest

from jaxlm.config import DataConfig, TrainConfig
from jaxlm.config_json import to_dict
from jaxlm.data.cache import open_text
from jaxlm.data.corpus import open_source
from jaxlm.data.tokenize import tokenize
from pallas_kernels.common.errors import UserError


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "text"
  (folder / "sub").mkdir(parents=True)
  for name in ("a.txt", "b.txt", "sub/c.txt"):
    (folder / name).write_text(f"text of {name}\n" * 9)
  return folder


def read(folder, **options):
  """The names of what is read, and what is said about it."""
  config = DataConfig(source=str(folder), **options)
  names = [part.name for part in open_source(config).parts]
  return names, open_text(config).report


TEXTS = ["a.txt", "b.txt", "sub/c.txt"]
LEFTOVERS = [
  ".DS_Store",
  "._a.txt",
  "Thumbs.db",
  "desktop.ini",
  "__MACOSX/a.txt",
  "__MACOSX/sub/._a.txt",
  ".ipynb_checkpoints/a-checkpoint.py",
  ".git/description.txt",
  ".cache/huggingface/a.txt",
  "__pycache__/a.py",
  "$RECYCLE.BIN/a.txt",
  "System Volume Information/a.txt",
  "lost+found/a.txt",
  "a.txt~",
  "~$a.txt",
  ".a.txt.swp",
  ".hidden/a.txt",
]


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_systems_and_editors_leave_is_no_text(folder, name):
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  (folder / name).write_bytes(b"\0\5\x16\7")
  names, report = read(folder, strict=True)
  assert names == TEXTS and "left out files and folders of the system or hidden: 1" in report


def test_a_hidden_folder_may_be_the_source(tmp_path):
  (tmp_path / ".text").mkdir()
  (tmp_path / ".text/a.txt").write_text("some text")
  assert read(tmp_path / ".text")[0] == ["a.txt"]


def test_runs_stores_and_checkpoints_below_the_source_are_no_text(folder):
  before = open_source(DataConfig(source=str(folder))).identity
  run = folder / "runs/micro"
  run.mkdir(parents=True)
  (run / "config.json").write_text(json.dumps(to_dict(TrainConfig())))
  for name in ("metrics.jsonl", "log.txt", "eval.jsonl"):
    (run / name).write_text('{"step": 1}\n')
  tokenize(DataConfig(source=str(folder / "a.txt")), folder / "store")
  (folder / "weights").mkdir()
  (folder / "weights/merges.txt").write_text("a b")
  (folder / "weights/config.json").write_text("{}")
  (folder / "weights/model.safetensors").write_bytes(b"")
  names, report = read(folder)
  assert names == TEXTS
  assert open_source(DataConfig(source=str(folder))).identity == before
  assert "folders of checkpoints: 1, folders of runs: 1, token stores: 1" in report
  with pytest.raises(UserError, match="data.source=.*is the folder of a run"):
    read(run)
  with pytest.raises(UserError, match="data.heldout=.*is a token store"):
    read(folder, heldout=str(folder / "store"))


def test_a_folder_with_a_config_of_its_own_is_text(folder):
  for content in ('{"steps": 3}', "[1]", "not json"):
    (folder / "sub/config.json").write_text(content)
    assert read(folder)[0] == TEXTS


def test_links_are_not_followed_unless_told_to(folder, tmp_path):
  (tmp_path / "secret.txt").write_text("secret")
  (tmp_path / "more").mkdir()
  (tmp_path / "more/d.txt").write_text("more")
  (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
  (folder / "more").symlink_to(tmp_path / "more")
  (folder / "up").symlink_to(tmp_path)
  (folder / "a_link.txt").symlink_to(folder / "a.txt")
  (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
  names, report = read(folder)
  assert names == TEXTS
  assert "links not followed (data.follow_links): 4, links to nothing: 1" in report
  names, report = read(folder, follow_links=True)
  assert names == ["a.txt", "b.txt", "link.txt", "more/d.txt", "sub/c.txt"]
  assert "links to what is read already" in report


def test_a_source_of_links_alone_says_so(tmp_path):
  (tmp_path / "text").mkdir()
  (tmp_path / "a.txt").write_text("a text")
  (tmp_path / "text/a.txt").symlink_to(tmp_path / "a.txt")
  with pytest.raises(
    UserError, match=r"no file ends in .*links not followed \(data.follow_links\): 1"
  ):
    read(tmp_path / "text")
  assert read(tmp_path / "text", follow_links=True)[0] == ["a.txt"]


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
  """A dataset's snapshot is links to files that are named by their content."""
  dataset = tmp_path / "datasets--owner--name"
  for revision in ("abc", "def"):
    snapshot = dataset / "snapshots" / revision
    (snapshot / "data").mkdir(parents=True)
    for name in ("data/a.txt", "data/b.txt"):
      blob = dataset / "blobs" / f"{hash(name):x}"
      blob.parent.mkdir(exist_ok=True)
      blob.write_text(f"text of {name}")
      (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
  names, report = read(dataset / "snapshots/abc")
  assert names == ["data/a.txt", "data/b.txt"] and "left out" not in report
  names, report = read(dataset)  # both revisions, which share their blobs
  assert names == ["snapshots/abc/data/a.txt", "snapshots/abc/data/b.txt"]
  assert "links to what is read already: 2" in report


def test_what_is_no_regular_file(folder):
  os.mkfifo(folder / "pipe.txt")
  assert "files that are no regular ones: 1" in read(folder)[1]
