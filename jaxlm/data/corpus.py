"""Finds text: files, the standard library of the running Python, or a dataset of the Hub.

A source gives the pieces of its documents in an order that does not change, from any position on.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxlm.config import DataConfig
from jaxlm.data.arrays import digest
from jaxlm.data.blocks import TEXT
from jaxlm.data.folder import find_text, is_run
from jaxlm.data.formats import ENDINGS, KNOWN, Reader
from jaxlm.data.named_splits import split_by_name, training_parts
from jaxlm.data.parts import FilePart, HubPart, Part
from jaxlm.data.pieces import SIDES, Piece, Position
from jaxlm.data.store import is_store
from jaxlm.paths import is_address, local_path
from pallas_kernels.common.errors import UserError, import_extra

INSTALLED = frozenset(("site-packages", "dist-packages"))
TESTS = frozenset(("test", "tests", "idle_test"))
TABLES = frozenset(("encodings", "pydoc_data"))  # written by programs
PLATFORM = ("config-", "_sysconfigdata")  # differ from one build of Python to the next


@dataclasses.dataclass(frozen=True)
class Source:
  """Gives the pieces of a text's documents, part by part."""

  parts: tuple[Part, ...]
  """Where they name their sides, those that train come first."""
  notes: tuple[str, ...]
  """Says what the source is and what was left out, for the log."""

  @property
  def identity(self) -> str:
    """Returns a digest of the names, sizes and times of files, and of revisions."""
    return digest([part.identity for part in self.parts])

  @property
  def names_sides(self) -> bool:
    """Returns whether its parts are named as sides, so that nothing is left to split."""
    return self.parts[0].side is not None

  @functools.cached_property
  def expected_size(self) -> int | None:
    """Returns the bytes of all files, some of which may be compressed; None with the Hub."""
    sizes = [part.size for part in self.parts]
    return sum(size or 0 for size in sizes) if all(size is not None for size in sizes) else None

  @property
  def documents(self) -> list[tuple[str, int]] | None:
    """Returns name and bytes of each document, where all are files of plain text."""
    if not all(part.name.lower().endswith(TEXT) for part in self.parts):
      return None
    return [(part.name, part.size or 0) for part in self.parts]

  def progress(self, position: Position) -> str:
    """Returns the share of a single text, or the number of the file or record."""
    if self.expected_size is None:
      return f"record {position.record}"
    if len(self.parts) == 1 and self.documents and self.expected_size:
      return f"{position.size / self.expected_size:.0%}"
    return f"file {min(position.file + 1, len(self.parts))} of {len(self.parts)}"

  def pieces(self, reader: Reader) -> Iterator[Piece]:
    """Yields the pieces from the reader's position on, which it moves.

    Raises UserError that names the file and the rule for what cannot be read, and with
    `config.strict` for what is damaged or no text.
    """
    while (index := reader.position.file) < len(self.parts):
      reader.side = self.parts[index].side
      if not reader.position.full:
        yield from self.parts[index].read(reader)
      following = self.parts[index + 1 : index + 2]
      reader.next_file(next_side=any(part.side != reader.side for part in following))


def open_source(config: DataConfig) -> Source:
  """Finds the text of `config.source`, and of `config.heldout`, without reading it.

  Raises UserError for a source that is missing, a run, or without a file of a known kind, and
  MissingExtraError that names the extra for the Hub where its libraries are not installed.
  """
  parts, notes = _find_parts(config.source, "data.source", config)
  if config.heldout and config.heldout != "none":
    more, more_notes = _find_parts(config.heldout, "data.heldout", config)
    heldout = tuple(dataclasses.replace(part, side="heldout") for part in more)
    taken = {part.identity[0] for part in more}
    rest = tuple(part for part in parts if part.identity[0] not in taken)
    train, train_notes = training_parts(rest)
    if not train:
      raise UserError(f"data.heldout={config.heldout!r}: leaves nothing of {config.source!r}")
    notes = (*notes, *train_notes, f"held out {config.heldout}", *more_notes)
    parts = (*train, *heldout)
  elif not config.heldout:
    parts, more_notes = split_by_name(parts)
    notes = (*notes, *more_notes)
  source = Source(parts, notes)
  _check_sizes(source, config)
  return source


def _check_sizes(source: Source, config: DataConfig) -> None:
  """Raises UserError where plain files that name their sides hold out more than they train on.

  What other files hold is known only when they are read.
  """
  documents = source.documents
  if documents is None or not source.names_sides or config.invalid_utf8 == "replace":
    return
  sizes = {side: 0 for side in SIDES}
  for part in source.parts:
    sizes[part.side or "train"] += part.size or 0
  train, heldout = (min(size, config.max_bytes or size) for size in sizes.values())
  if train < heldout:
    raise too_little_training(train, heldout, config.source, source.notes)


def too_little_training(train: int, heldout: int, source: str, notes: Iterable[str]) -> UserError:
  """Returns the error for a source of which more bytes would be held out than trained on."""
  rule = f"{heldout:,} bytes would be held out and only {train:,} trained on"
  way_on = "hold out less by data.heldout, or a fraction by --data.heldout none"
  return UserError(f"data.source={source!r}: {rule} ({'; '.join(notes)}); {way_on}")


def absolute_paths(config: DataConfig) -> DataConfig:
  """Returns the configuration with absolute paths of the text, which mean the same anywhere."""
  source, heldout = _absolute(config.source), _absolute(config.heldout)
  return dataclasses.replace(config, source=source, heldout=heldout)


def _absolute(source: str) -> str:
  if source in ("", "stdlib", "none") or source.startswith("hf:") or is_address(source):
    return source
  return str(Path(source).expanduser().absolute())


def _find_parts(
  source: str, field: str, config: DataConfig
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
  """Returns the parts of a file, a folder, a dataset or the standard library, and its notes."""
  name = f"{field}={source!r}"
  if source == "stdlib":
    return _stdlib()
  if source.startswith("hf:"):
    return _open_hub(source, name)
  root = local_path(source, field) if source else Path()
  if not source or not root.exists():
    raise UserError(f"{name}: no such file or folder (or hf:owner/dataset, or stdlib)")
  if not root.is_dir():
    if not root.name.lower().endswith(ENDINGS):
      raise UserError(f"{name}: unknown ending, known are {KNOWN}")
    return (FilePart(root, root.name),), ("1 file",)
  if is_run(root) or is_store(root):
    kind = "the folder of a run" if is_run(root) else "a token store, which has its own sides"
    raise UserError(f"{name}: is {kind}, not text")
  found = find_text(root, follow_links=config.follow_links)
  if not found.names:
    left_out = f" ({'; '.join(found.notes)})" if found.notes else ""
    raise UserError(f"{name}: no file ends in {KNOWN}{left_out}")
  parts = tuple(FilePart(root / below, below) for below in found.names)
  left_out = f"left out {', '.join(found.notes)}"
  number = f"{len(parts):,} file{'s' * (len(parts) != 1)}"
  return parts, (number, *([left_out] if found.notes else []))


def _stdlib() -> tuple[tuple[Part, ...], tuple[str, ...]]:
  root = Path(sysconfig.get_path("stdlib"))
  skip = INSTALLED | TESTS | TABLES
  names = find_text(root, endings=(".py",), skip=skip).names if root.is_dir() else ()
  names = tuple(name for name in names if not name.startswith(PLATFORM))
  if not names:
    rule = f"this Python keeps no sources in {root}; name a file or folder instead"
    raise UserError(f"data.source='stdlib': {rule}")
  notes = (f"Python {platform.python_version()}",)
  return tuple(FilePart(root / name, name) for name in names), notes


def _open_hub(source: str, purpose: str) -> tuple[tuple[Part, ...], tuple[str, ...]]:
  import_extra("datasets", "hf", purpose)
  hub = import_extra("huggingface_hub", "hf", purpose)
  name, _, split = source.removeprefix("hf:").partition(":")
  try:
    # Asked first and then pinned, so that the report names what was read.
    revision = hub.HfApi().dataset_info(name).sha
  except (OSError, ValueError) as error:
    raise UserError(f"{purpose}: {error}") from error
  return (HubPart(name, split or "train", revision),), (f"revision {revision}",)
