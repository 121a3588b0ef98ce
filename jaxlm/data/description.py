"""Says what a text is, how it is split and what was left out; refuses one without two sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data.corpus import Source, absolute_paths, too_little_training
from jaxlm.data.pieces import Position, Side
from jaxlm.data.split import Split
from pallas_kernels.common.errors import UserError


class Size(NamedTuple):
  """Counts what is on a side of the split."""

  documents: int
  bytes: int


def check_sides(
  config: DataConfig, source: Source, position: Position, sizes: Mapping[Side, Size]
) -> None:
  """Raises UserError where a text, read to its end, leaves a side empty or most of it held out."""
  name = f"data.source={config.source!r}"
  notes = [*source.notes, *_left_out(position, config.max_bytes)]
  train, heldout = sizes["train"], sizes["heldout"]
  if not position.documents:
    raise UserError(f"{name}: holds no text ({'; '.join(notes)})")
  if not source.names_sides and not (train.documents and heldout.documents):
    rule = f"one character is too short to keep {config.holdout} of it for evaluation"
    raise UserError(f"{name}: {rule}")
  if not heldout.documents:
    raise UserError(f"{name}: there is no text to hold out ({'; '.join(notes)})")
  if source.names_sides and train.bytes < heldout.bytes:
    raise too_little_training(train.bytes, heldout.bytes, config.source, notes)


def describe_text(
  config: DataConfig,
  source: Source,
  position: Position,
  split: Split,
  sizes: Mapping[Side, Size],
) -> str:
  """Returns lines for the log: where the text is from, how it is split and what was left out."""
  train, heldout = sizes["train"], sizes["heldout"]
  share = heldout.bytes / (train.bytes + heldout.bytes)
  documents = f"{train.documents:,} document{'s' * (train.documents != 1)}"
  line = f"{documents} to train on, {heldout.documents:,} held out"
  line += f" ({heldout.bytes:,} bytes, {share:.1%})"
  if split.cuts:
    line += f"; of these the end is held out: {', '.join(cut.document for cut in split.cuts)}"
  first = f"{absolute_paths(config).source}: {describe_amount(position)}"
  lines = [first, *source.notes, line, *_left_out(position, config.max_bytes)]
  return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
  """Returns a line without what a file name may hold and a terminal or log may not."""
  return "".join(
    char if char.isprintable() else char.encode("unicode_escape").decode() for char in line
  )


def describe_amount(position: Position) -> str:
  """Returns how much text was read."""
  documents = f"{position.documents:,} document{'s' * (position.documents != 1)}"
  return f"{documents}, {position.size:,} bytes"


def _left_out(position: Position, max_bytes: int | None) -> Iterator[str]:
  for entry in position.left_out:
    first = "" if entry.number == 1 else "the first: "
    yield f"left out {entry.kind}: {entry.number:,} ({first}{entry.first})"
  if position.stopped:
    yield f"stopped at data.max_bytes={max_bytes}"
  if position.empty:
    yield f"{position.empty:,} empty documents left out"
  if position.replaced:
    yield f"{position.replaced:,} invalid UTF-8 sequences replaced"
