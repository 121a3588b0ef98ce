"""Checkpoint manifests: every kind of damage is found and named."""

import json
import os
import random
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxlm.checkpoint.manifest import verify, write_manifest

FILES = ("state/a.bin", "state/deep/b.bin", "state/manifest.json", "empty", "meta.json")


def make(folder):
  """A small folder like a checkpoint, with its manifest; one file is longer than a read buffer."""
  source = random.Random(0)
  for name, size in zip(FILES, (700_000, 1000, 17, 0, 60)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(source.randbytes(size))
  write_manifest(folder)
  return folder


@pytest.fixture
def folder(tmp_path):
  return make(tmp_path)


def flip(path, bit):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def test_a_fresh_folder_is_sound_and_the_manifest_lists_every_file(folder):
  assert verify(folder) == []
  assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(FILES)
  assert not (folder / "manifest.json.tmp").exists()


def test_writing_again_takes_the_new_contents(folder):
  (folder / "meta.json").write_bytes(b"other")
  assert len(verify(folder)) == 1
  write_manifest(folder)
  assert verify(folder) == []


@pytest.fixture(scope="module")
def shared():
  with tempfile.TemporaryDirectory() as name:
    yield make(Path(name))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
  st.sampled_from([name for name in FILES if name != "empty"]), st.floats(0, 1, exclude_max=True)
)
def test_any_single_flipped_bit_is_found(shared, name, place):
  bit = int(place * 8 * (shared / name).stat().st_size)
  flip(shared / name, bit)
  try:
    assert [fault.split(": bytes ")[0] for fault in verify(shared)] == [name]
  finally:
    flip(shared / name, bit)
  assert verify(shared) == []


def test_every_flipped_bit_of_the_manifest_is_harmless_or_blamed_on_the_manifest(tmp_path):
  (tmp_path / "a").write_bytes(b"abc")
  write_manifest(tmp_path)
  path = tmp_path / "manifest.json"
  intact = path.read_bytes()
  for bit in range(8 * len(intact)):
    flip(path, bit)
    faults = verify(tmp_path)
    assert all(fault.startswith("manifest.json: ") for fault in faults)
    # Blanks between the entries carry nothing; any other change must show.
    assert len(faults) == (0 if json_or_none(path.read_bytes()) == json.loads(intact) else 1), (
      path.read_bytes()
    )
    flip(path, bit)


def json_or_none(content):
  try:
    return json.loads(content)
  except ValueError:
    return None


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.floats(0, 1, exclude_max=True))
def test_a_cut_manifest_is_unreadable(shared, place):
  path = shared / "manifest.json"
  intact = path.read_bytes()
  path.write_bytes(intact[: int(place * len(intact))])
  try:
    (fault,) = verify(shared)
    assert fault.startswith("manifest.json: unreadable")
  finally:
    path.write_bytes(intact)


@pytest.mark.parametrize("size", [0, 1, 699_999, 700_001])
def test_a_changed_size_is_found_without_reading(folder, monkeypatch, size):
  monkeypatch.setattr("zlib.crc32", None)  # any read would fail
  os.truncate(folder / "state/a.bin", size)
  assert verify(folder) == [f"state/a.bin: size {size}, the manifest says 700000"]


def test_missing_files_are_named(folder):
  (folder / "empty").unlink()
  (folder / "state/deep/b.bin").rename(folder / "state/deep/c.bin")
  os.truncate(folder / "meta.json", 3)
  assert verify(folder) == [
    "empty: missing",
    "state/deep/b.bin: missing",
    "meta.json: size 3, the manifest says 60",
  ]


def test_the_piece_that_differs_is_named(folder, monkeypatch):
  monkeypatch.setattr("jaxlm.checkpoint.manifest.PIECE", 1000)
  monkeypatch.setattr("jaxlm.checkpoint.manifest._BUFFER", 300)  # a piece is no multiple of it
  write_manifest(folder)
  assert verify(folder) == []
  for place in (0, 999, 1000, 699_999):
    flip(folder / "state/a.bin", 8 * place)
    (fault,) = verify(folder)
    first = place // 1000 * 1000
    assert fault.startswith(f"state/a.bin: bytes {first}-{first + 999} have checksum ")
    flip(folder / "state/a.bin", 8 * place)


def test_two_swapped_files_of_one_size_are_found(folder):
  (folder / "twin").write_bytes(b"x" * 1000)
  write_manifest(folder)
  os.rename(folder / "twin", folder / "held")
  os.rename(folder / "state/deep/b.bin", folder / "twin")
  os.rename(folder / "held", folder / "state/deep/b.bin")
  assert [fault.split(":")[0] for fault in verify(folder)] == ["state/deep/b.bin", "twin"]


def test_an_unreadable_file_is_a_fault_not_a_crash(folder, monkeypatch):
  def fail(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr("zlib.crc32", fail)
  faults = verify(folder)
  assert len(faults) == len(FILES) - 1 and all(
    "cannot be read ([Errno 5]" in fault for fault in faults
  )


def test_a_folder_without_manifest_is_incomplete(folder):
  (folder / "manifest.json").unlink()
  assert verify(folder) == ["manifest.json: missing, the folder is incomplete"]
  assert verify(folder / "nowhere") == ["manifest.json: missing, the folder is incomplete"]


@pytest.mark.parametrize(
  "change, fault",
  [
    ({"format": 2}, "of format 2, this version reads format 1"),
    ({"format": 0}, "unreadable (it has no format number)"),
    ({"format": "1"}, "unreadable (it has no format number)"),
    ({"files": {}}, "damaged"),
    ({"files": None}, "damaged"),
    ({"digest": None}, "damaged"),
  ],
)
def test_newer_or_altered_manifests_are_refused(folder, change, fault):
  path = folder / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  (line,) = verify(folder)
  assert line.startswith(f"manifest.json: {fault}")


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_of_another_kind_is_unreadable(folder, content):
  (folder / "manifest.json").write_bytes(content)
  (line,) = verify(folder)
  assert line.startswith("manifest.json: unreadable")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_keeps_the_former_manifest(folder, monkeypatch, step):
  former = (folder / "manifest.json").read_bytes()
  (folder / "meta.json").write_bytes(b"x" * 60)

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
      write_manifest(folder)
  assert (folder / "manifest.json").read_bytes() == former
  assert [fault.split(":")[0] for fault in verify(folder)] == ["meta.json"]
  write_manifest(folder)
  assert verify(folder) == []


FOREIGN = (".DS_Store", "state/._a.bin", "Thumbs.db", "lost+found/x", ".sync/state", "meta.json~")


@pytest.mark.parametrize("name", [*FOREIGN, "notes.txt", "state/deep/copy of b.bin"])
def test_files_that_others_drop_into_a_folder_are_no_damage(folder, name):
  (folder / name).parent.mkdir(exist_ok=True)
  (folder / name).write_text("not of the checkpoint")
  assert verify(folder) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_system_drops_while_a_manifest_is_written_may_go_again(folder, name):
  (folder / name).parent.mkdir(exist_ok=True)
  (folder / name).write_text("not of the checkpoint")
  write_manifest(folder)
  (folder / name).unlink()
  assert verify(folder) == []
