"""Defines what a source of text consists of: files, and splits of datasets on the Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.data.blocks import Fault
from jaxlm.data.formats import Reader
from jaxlm.data.pieces import Piece, Side
from jaxlm.data.records import field_of
from pallas_kernels.common.errors import UserError, import_extra


@dataclasses.dataclass(frozen=True)
class FilePart:
  """Is a file of text or of records."""

  path: Path
  name: str
  side: Side | None = None

  @property
  def size(self) -> int | None:
    """Returns its bytes."""
    return self.path.stat().st_size

  @property
  def identity(self) -> list[Any]:
    """Returns its place, size and time."""
    stat = self.path.stat()
    return [str(self.path.resolve()), self.name, stat.st_size, stat.st_mtime_ns, self.side]

  def read(self, reader: Reader) -> Iterator[Piece]:
    """Yields its pieces."""
    return reader.read(self.path, self.name)


@dataclasses.dataclass(frozen=True)
class HubPart:
  """Is a split of a dataset on the Hub at one revision, which is streamed."""

  dataset: str
  split: str
  revision: str
  side: Side | None = None

  size = None

  @property
  def name(self) -> str:
    """Returns the names of the dataset and the split."""
    return f"{self.dataset}:{self.split}"

  @property
  def identity(self) -> list[Any]:
    """Returns the dataset, the split and the revision."""
    return [f"hf:{self.name}", self.revision, self.side]

  def read(self, reader: Reader) -> Iterator[Piece]:
    """Yields its pieces, after skipping the records before the position."""
    first = reader.position.record
    records = self._records()
    if first:
      records = records.skip(first)
    for index, record in enumerate(records, start=first):
      where = f"hf:{self.name}:{index}"
      try:
        value = field_of(record, reader.config.text_field, where)
      except Fault as fault:
        reader.leave_out(fault)
        reader.next_record()
        continue
      yield from reader.record(f"{self.name}:{index}", value, where)
      if reader.position.full:
        return

  def _records(self) -> Any:
    purpose = f"data.source='hf:{self.dataset}'"
    datasets = import_extra("datasets", "hf", purpose)
    try:
      return datasets.load_dataset(
        self.dataset, split=self.split, streaming=True, revision=self.revision
      )
    except (OSError, ValueError) as error:
      raise UserError(f"{purpose}: {error}") from error


Part = FilePart | HubPart
