"""Finds text: files, the standard library of the running Python, or a dataset of the Hub.

A source gives the pieces of its documents in an order that does not change, from any position on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from jaxlm.config import DataConfig
from jaxlm.data.formats import ENDINGS, TEXT, Piece, Position, Reader, missing_field
from pallas_kernels.common.errors import UserError, import_extra

INSTALLED = frozenset(("site-packages", "dist-packages", "__pycache__"))
TESTS = frozenset(("test", "tests", "idle_test"))
TABLES = frozenset(("encodings", "pydoc_data"))  # written by programs
PLATFORM = ("config-", "_sysconfigdata")  # differ from one build of Python to the next


class Source(Protocol):
  """Gives the pieces of a text's documents, in an order that does not change."""

  @property
  def identity(self) -> str:
    """Returns a digest of names, sizes and times of files, or of a revision."""

  @property
  def notes(self) -> tuple[str, ...]:
    """Returns what the log says about the source."""

  @property
  def expected_size(self) -> int | None:
    """Returns the bytes of text, where they are known without reading it."""

  @property
  def single_size(self) -> int | None:
    """Returns the bytes of the document, where the source is sure to hold only one."""

  def progress(self, position: Position) -> str:
    """Returns how much of the source lies before the position, as far as that is known."""

  def pieces(self, reader: Reader) -> Iterator[Piece]:
    """Yields the pieces from the reader's position on, which it moves.

    Raises UserError that names the file and the rule for what is damaged or not text.
    """


def open_source(config: DataConfig) -> Source:
  """Finds the text of `config.source` without reading it.

  Raises UserError for a source that is missing or holds no file of a known kind, and
  MissingExtraError that names the extra for the Hub where its libraries are not installed.
  """
  if config.source == "stdlib":
    return _stdlib()
  if config.source.startswith("hf:"):
    return _open_hub(config)
  name = f"data.source={config.source!r}"
  root = Path(config.source).expanduser()
  if not config.source or not root.exists():
    raise UserError(f"{name}: no such file or folder (or hf:owner/dataset, or stdlib)")
  if not root.is_dir():
    if not root.name.lower().endswith(ENDINGS):
      raise UserError(f"{name}: unknown ending, known are {' '.join(ENDINGS)}")
    return FileSource(root.parent, (root.name,), ("1 file",))
  names, links = _walk(root, ENDINGS)
  if not names:
    raise UserError(f"{name}: no file ends in {' '.join(ENDINGS)} ({links} links not followed)")
  notes = [f"{len(names)} files"]
  if links:
    notes.append(f"{links} links not followed")
  return FileSource(root, tuple(names), tuple(notes))


@dataclasses.dataclass(frozen=True)
class FileSource:
  """Reads files of a folder, in the order of their names."""

  root: Path
  names: tuple[str, ...]
  notes: tuple[str, ...]
  skip_invalid: bool = False
  """Leaves out files that are not text, with a note, instead of refusing; holds each whole."""

  @property
  def identity(self) -> str:
    """Returns a digest of the names, sizes and times of the files."""
    root = self.root.resolve()
    stats = [(name, (root / name).stat()) for name in self.names]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return digest(["files", str(root), files])

  @property
  def expected_size(self) -> int | None:
    """Returns the bytes of all files, some of which may be compressed."""
    return sum((self.root / name).stat().st_size for name in self.names)

  @property
  def single_size(self) -> int | None:
    """Returns the bytes of the only file, where it is plain text."""
    if len(self.names) == 1 and self.names[0].lower().endswith(TEXT):
      return self.expected_size
    return None

  def progress(self, position: Position) -> str:
    """Returns the share of a single text, or the number of the file."""
    if size := self.single_size:
      return f"{position.size / size:.0%}"
    return f"file {min(position.file + 1, len(self.names))} of {len(self.names)}"

  def pieces(self, reader: Reader) -> Iterator[Piece]:
    """Yields the rest of the files, one after another."""
    while reader.position.file < len(self.names) and not reader.position.full:
      name = self.names[reader.position.file]
      if self.skip_invalid:
        yield from self._valid_pieces(reader, name)
      else:
        yield from reader.read(self.root / name, name)
      if not reader.position.full:
        reader.next_file()

  def _valid_pieces(self, reader: Reader, name: str) -> list[Piece]:
    before = reader.position
    try:
      return list(reader.read(self.root / name, name))
    except UserError as error:
      reader.position = before._replace(left_out=(*before.left_out, str(error)))
      return []


def _walk(
  root: Path, endings: tuple[str, ...], skip: frozenset[str] = frozenset()
) -> tuple[list[str], int]:
  """Returns relative POSIX paths of files with these endings, sorted, and the number of links.

  No link is followed.
  """
  names, links = list[str](), 0

  def fail(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error

  for folder, folders, files in os.walk(root, onerror=fail):
    links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
    folders[:] = [name for name in folders if name not in skip]
    for path in (Path(folder, name) for name in files if name.lower().endswith(endings)):
      links += path.is_symlink()
      if path.is_file() and not path.is_symlink():
        names.append(path.relative_to(root).as_posix())
  return sorted(names), links


def _stdlib() -> FileSource:
  root = Path(sysconfig.get_path("stdlib"))
  names = _walk(root, (".py",), INSTALLED | TESTS | TABLES)[0] if root.is_dir() else []
  names = [name for name in names if not name.startswith(PLATFORM)]
  if not names:
    rule = f"this Python keeps no sources in {root}; name a file or folder instead"
    raise UserError(f"data.source='stdlib': {rule}")
  return FileSource(root, tuple(names), (f"Python {platform.python_version()}",), skip_invalid=True)


@dataclasses.dataclass(frozen=True)
class HubSource:
  """Streams a split of a dataset on the Hub at one revision."""

  name: str
  split: str
  revision: str
  text_field: str

  expected_size = None
  single_size = None

  @property
  def identity(self) -> str:
    """Returns a digest of the name, the split and the revision."""
    return digest(["hub", self.name, self.split, self.revision])

  @property
  def notes(self) -> tuple[str, ...]:
    """Returns the revision."""
    return (f"revision {self.revision}",)

  def progress(self, position: Position) -> str:
    """Returns the number of the record."""
    return f"record {position.record}"

  def pieces(self, reader: Reader) -> Iterator[Piece]:
    """Yields the rest of the records, skipping those before the position."""
    if reader.position.full:
      return
    source = f"hf:{self.name}:{self.split}"
    first = reader.position.record
    records = self._records()
    if first:
      records = records.skip(first)
    for index, record in enumerate(records, start=first):
      where = f"{source}:{index}"
      if self.text_field not in record:
        raise missing_field(where, self.text_field, list(record))
      yield from reader.record(f"{self.name}:{self.split}:{index}", record[self.text_field], where)
      if reader.position.full:
        return

  def _records(self) -> Any:
    datasets = import_extra("datasets", "hf", f"data.source='hf:{self.name}'")
    try:
      return datasets.load_dataset(
        self.name, split=self.split, streaming=True, revision=self.revision
      )
    except (OSError, ValueError) as error:
      raise UserError(f"data.source='hf:{self.name}': {error}") from error


def _open_hub(config: DataConfig) -> HubSource:
  purpose = f"data.source={config.source!r}"
  import_extra("datasets", "hf", purpose)
  hub = import_extra("huggingface_hub", "hf", purpose)
  name, _, split = config.source.removeprefix("hf:").partition(":")
  try:
    # Asked first and then pinned, so that the report names what was read.
    revision = hub.HfApi().dataset_info(name).sha
  except (OSError, ValueError) as error:
    raise UserError(f"{purpose}: {error}") from error
  return HubSource(name, split or "train", revision, config.text_field)


def digest(value: Any) -> str:
  """Returns a digest of a value of JSON, 32 hexadecimal digits of BLAKE2b."""
  text = json.dumps(value, sort_keys=True)  # ASCII, whatever file names hold
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
