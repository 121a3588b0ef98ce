"""Records and log of a run on a disk that refuses."""

import json
import logging
import math
import os

import numpy as np
import pytest

from jaxlm.checkpoint.atomic import write_text
from jaxlm.run.run_folder import RecordFile, RunFolder, log_to, read_records


class Moody:
  """A file that takes a few bytes at a time, and while `full` none."""

  name = "metrics.jsonl"

  def __init__(self):
    self.content, self.full = b"", False

  def write(self, data: bytes) -> int:
    if self.full:
      raise OSError(28, "No space left on device")
    self.content += data[:5]
    return len(data[:5])

  def close(self):
    pass


def test_lines_wait_for_room_and_none_is_lost_or_doubled(tmp_path, caplog):
  records = RecordFile(tmp_path / "metrics.jsonl")
  records._file = file = Moody()
  for step in range(9):
    file.full = step in (3, 4, 6)
    records.append({"step": step})
  records.close()
  assert [json.loads(line)["step"] for line in file.content.splitlines()] == list(range(9))
  assert caplog.text.count("lines wait in memory: No space left on device") == 2  # once per time


def test_numbers_that_are_not_finite_are_null_in_json_and_nan_when_read(tmp_path):
  path = tmp_path / "metrics.jsonl"
  records = RecordFile(path)
  values = {"step": 1, "loss": math.nan, "grad_norm": np.float32(np.inf), "tokens": np.int64(3)}
  records.append(values)
  records.append({"step": 2, "loss": -math.inf})
  records.close()

  def refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")

  lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
  first = {"step": 1, "loss": None, "grad_norm": None, "tokens": 3}
  assert lines == [first, {"step": 2, "loss": None}]
  RunFolder(tmp_path).forget_after(1)  # rewrites them
  assert [json.loads(line, parse_constant=refuse) for line in path.open()] == [first]
  (record,) = read_records(path)
  assert math.isnan(record["loss"]) and math.isnan(record["grad_norm"])


def test_a_log_that_cannot_be_opened_stops_nothing(tmp_path, capsys):
  (tmp_path / "log.txt").mkdir()
  with log_to(tmp_path / "log.txt"):
    for _ in range(2):
      logging.getLogger("jaxlm").info("line")
  assert capsys.readouterr().err.count("lines of the log are lost: Is a directory") == 1


def test_lines_that_never_found_room_are_counted(caplog):
  records = RecordFile("/dev/full")
  for step in range(3):
    records.append({"step": step})
  records.close()
  assert "/dev/full: lacks its last 3 lines" in caplog.text


def test_a_log_without_room_stops_nothing_and_errors_reach_stderr(capsys):
  with log_to("/dev/full"):
    logging.getLogger("jaxlm").info("quiet")
    logging.getLogger("jaxlm").error("loud")
    assert not logging.getLogger("jaxlm").propagate
  assert capsys.readouterr().err == "loud\n" and logging.getLogger("jaxlm").propagate


def test_forgetting_later_records_keeps_the_file_whole_when_it_fails(tmp_path, monkeypatch):
  folder = RunFolder(tmp_path)
  lines = "".join(f'{{"step": {step}}}\n' for step in range(1, 6))
  folder.metrics.write_text(lines + '{"st')
  with monkeypatch.context() as patch:
    patch.setattr(
      os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
      folder.forget_after(3)
  assert folder.metrics.read_text() == lines + '{"st'
  folder.forget_after(3)
  assert [record["step"] for record in read_records(folder.metrics)] == [1, 2, 3]


def test_atomic_text_replaces_what_was_there(tmp_path):
  write_text(tmp_path / "a", "first")
  write_text(tmp_path / "a", "second")
  assert (tmp_path / "a").read_text() == "second" and [
    path.name for path in tmp_path.iterdir()
  ] == ["a"]
