"""Streams that are closed, full or of another encoding raise nothing and change no exit status."""

import io
import os
import subprocess
import sys

import pytest

from benchmarks.reliability.processes import ROOT
from jaxlm.run.output import forgiving_output


class Broken(io.StringIO):
  """Refuses everything, as a pipe whose reader has left or a terminal that is gone."""

  def write(self, text):
    raise BrokenPipeError(32, "Broken pipe")

  def flush(self):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("make", [Broken, lambda: open(os.devnull, "w"), lambda: None])
def test_what_a_stream_refuses_is_dropped_and_the_first_time_logged(make, monkeypatch, caplog):
  stream = make()
  if stream is not None and not isinstance(stream, Broken):
    stream.close()
  monkeypatch.setattr(sys, "stdout", stream)
  with forgiving_output():
    for _ in range(3):
      print("line", flush=True)
  assert sys.stdout is stream
  assert caplog.text.count("takes no more lines") == (stream is not None)


def test_letters_that_an_encoding_lacks_are_written_as_escapes(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
  with forgiving_output():
    print("na\u00efve", flush=True)
    assert sys.stdout.encoding == "ascii"
  assert raw.getvalue() == b"na\\xefve\n"


PROGRAM = """
import os, sys
from jaxlm.run.output import forgiving_output, standard_streams
@standard_streams()
def main():
  with forgiving_output():
    print("line")
    opened = open(sys.argv[1], "w")
    assert opened.fileno() > 2
    try:
      os.write(2, b"printed by a library")
    except OSError:
      pass
  return 130
sys.exit(main())
"""


@pytest.mark.parametrize(
  "redirect", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full", "| head -c 0"]
)
def test_a_program_keeps_its_exit_status_and_its_files(redirect, tmp_path):
  """A file that got the number of a closed stderr would hold what libraries print."""
  quoted = f"'{sys.executable}' -c '{PROGRAM}' '{tmp_path}/file'"
  script = f"({quoted}; echo $? >status) {redirect}"
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
  subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, check=True)
  assert (tmp_path / "status").read_text() == "130\n"
  assert (tmp_path / "file").read_text() == ""
