"""Shows how far a run is: one live line on a terminal, a printed line now and then elsewhere."""

from __future__ import annotations

import datetime
import logging
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_log = logging.getLogger("jaxlm")
_NARROWEST_BAR = 12
_GAP = "  "


class Progress:
  """Shows the newest step, between `start` and `stop`. What goes wrong in it is logged only."""

  def __init__(self, steps: int, start: int, unit: str, *, log_every: int, quiet: bool):
    self.steps, self.step, self.unit, self.log_every = steps, start, unit, log_every
    self._console = Console(highlight=False, quiet=quiet)
    self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
    self._live: Live | None = None
    self._parts, self._shortest = [f"step {start}/{steps}", "compiling"], ""

  def start(self) -> None:
    """Begins the live line, where there is a terminal."""
    if self._is_live:
      self._live = Live(console=self._console, get_renderable=self._render)
      self._guarded(self._live.start)

  def stop(self) -> None:
    """Ends the live line, whose last state stays."""
    if self._live is not None:
      self._guarded(self._live.stop)

  def show(
    self, step: int, loss: float, speed: float, seconds_left: float, *others: str, logged: str
  ) -> None:
    """Shows a step: its loss, units per second, time left, then `others` as far as there is room.

    `logged` follows them only where lines are printed.
    """
    self._guarded(self._show, step, loss, speed, seconds_left, others, logged)

  def _show(
    self,
    step: int,
    loss: float,
    speed: float,
    seconds_left: float,
    others: tuple[str, ...],
    logged: str,
  ) -> None:
    left = datetime.timedelta(seconds=round(seconds_left))
    self.step = step
    self._shortest = f"{step}/{self.steps} {loss:.4f} {_shorten(speed)}/s {left}"
    first = [f"step {step}/{self.steps}", f"loss {loss:.4f}", f"{speed:,.0f} {self.unit}/s"]
    self._parts = [*first, f"{left} left", *others]
    if not self._is_live and (step % self.log_every == 0 or step == self.steps):
      self._console.print(_GAP.join([*self._parts, logged]), soft_wrap=True)

  def _render(self) -> RenderableType:
    """Returns the line that fits the terminal's width; where none does, the shortest in rows."""
    width, parts = self._console.width, self._parts
    necessary = 4  # step, loss, speed and time left
    count = len(parts)
    while count > necessary and len(_GAP.join(parts[:count])) > width:
      count -= 1
    line = _GAP.join(parts[:count])
    if len(line) > width:
      return Text(self._shortest or line)
    if width - len(line) < _NARROWEST_BAR:
      return Text(line, no_wrap=True)
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_row(Text(line), ProgressBar(total=self.steps, completed=self.step))
    return row

  def _guarded(self, function: Any, *arguments: Any) -> None:
    """Calls what only displays; a failure is logged, and nothing is shown from then on."""
    if self._console.quiet:
      return
    try:
      function(*arguments)
    except Exception:
      _log.warning("progress is shown no more", exc_info=True)
      self._console.quiet = True


def _shorten(value: float) -> str:
  """Returns a number of at most four digits and a letter, such as 12.3k."""
  for letter in ("", "k", "M"):
    if value < 1000:
      return f"{value:.3g}{letter}"
    value /= 1000
  return f"{value:.3g}G"
