"""The live line keeps step, loss, speed and time left however narrow the terminal is."""

import io
import logging
import re

import pytest
from rich.console import Console

from jaxlm.run.progress import Progress


def shown(width: int, step: int = 98765, *, terminal: bool = True) -> str:
  """What a terminal of this width, or a file, gets of one step, without control sequences."""
  file = io.StringIO()
  progress = Progress(100_000, 0, "tokens", log_every=1, quiet=False)
  progress._console = Console(
    file=file, width=width, force_terminal=terminal, highlight=False, _environ={"TERM": "xterm"}
  )
  progress._is_live = terminal
  progress.start()
  others = ("MFU 41.5%", "memory 21.3 GiB", "data wait 0%")
  progress.show(step, 12.3456, 123_456.7, 36_754.0, *others, logged="lr 1.00e-03  grad 0.50")
  progress.stop()
  return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


@pytest.mark.parametrize("width", [200, 100, 80, 79, 60, 50, 40, 30, 12])
def test_step_loss_speed_and_time_left_are_there_at_any_width(width):
  text = shown(width)
  assert "\u2026" not in text
  assert all(len(line.rstrip()) <= width for line in re.split("[\r\n]", text))
  for part in ("98765/100000", "12.3456", "10:12:34"):
    assert part in text, text
  assert "123,457 tokens/s" in text or "123k/s" in text
  assert ("MFU 41.5%" in text) == (width >= 79) and ("data wait 0%" in text) == (width >= 120)


def test_the_bar_takes_what_is_left():
  assert "\u2501" * 12 in shown(200) and "\u2501" not in shown(80)


def test_a_file_gets_the_whole_line():
  want = "step 98765/100000  loss 12.3456  123,457 tokens/s  10:12:34 left  MFU 41.5%  "
  want += "memory 21.3 GiB  data wait 0%  lr 1.00e-03  grad 0.50\n"
  assert shown(40, terminal=False) == want


def test_a_display_that_fails_is_logged_once_and_stops_nothing(monkeypatch, caplog):
  progress = Progress(10, 0, "tokens", log_every=1, quiet=False)
  monkeypatch.setattr(Console, "print", lambda *_, **__: 1 / 0)
  with caplog.at_level(logging.WARNING, "jaxlm"):
    for step in range(3):
      progress.show(step, 1.0, 1.0, 1.0, logged="")
  assert caplog.text.count("progress is shown no more") == 1 and "ZeroDivision" in caplog.text
