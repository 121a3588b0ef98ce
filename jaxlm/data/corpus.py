"""Where text comes from: files, the standard library of the running Python, or the Hugging Face Hub.

Training and held-out documents are told apart by a hash of their names, so that a document keeps its side when others
come or go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxlm.config import DataConfig
from jaxlm.data.formats import ENDINGS, Document, Reader, no_field
from pallas_kernels.common.errors import UserError, import_extra

__all__ = ["Corpus", "Document", "read_corpus"]

INSTALLED = frozenset(("site-packages", "dist-packages", "__pycache__"))
TESTS = frozenset(("test", "tests", "idle_test"))
TABLES = frozenset(("encodings", "pydoc_data"))  # written by programs
PLATFORM = ("config-", "_sysconfigdata")  # differ from one build of Python to the next


@dataclasses.dataclass(frozen=True)
class Corpus:
  train: tuple[Document, ...]
  heldout: tuple[Document, ...]
  report: str
  """one line for the log: where the text is from and how much there is"""


def read_corpus(config: DataConfig) -> Corpus:
  """The documents of `config.source`, split into training and held-out text.

  Raises ValueError that names the file and the rule for a source that is missing, empty, damaged or not UTF-8, and
  ImportError that names the extra for a format whose reader is not installed.
  """
  reader, notes = Reader(config), list[str]()
  if config.source == "stdlib":
    stream = _stdlib(reader, notes)
  elif config.source.startswith("hf:"):
    stream = _hub(reader, notes)
  else:
    stream = _files(reader, notes)
  documents, empty = list[Document](), 0
  for document in stream:
    if document.text:
      documents.append(document)
    if reader.full:
      notes.append(f"stopped at data.max_bytes={config.max_bytes}")
      break
    empty += not document.text
  if not documents:
    raise UserError(
      f"data.source={config.source!r}: holds no text ({'; '.join([*notes, f'{empty} empty documents'])})"
    )
  train, heldout = _split(documents, config.holdout)
  if empty:
    notes.append(f"{empty} empty documents left out")
  if reader.replaced:
    notes.append(f"{reader.replaced} invalid UTF-8 sequences replaced")
  counts = f"{len(documents)} documents, {reader.bytes_read} bytes: {len(train)} train, {len(heldout)} held out"
  return Corpus(train, heldout, "; ".join([f"{config.source}: {counts}", *notes]))


def _files(reader: Reader, notes: list[str]) -> Iterator[Document]:
  root = Path(reader.config.source).expanduser()
  source = f"data.source={reader.config.source!r}"
  if not reader.config.source or not root.exists():
    raise UserError(f"{source}: no such file or folder (or hf:owner/dataset, or stdlib)")
  if not root.is_dir():
    if not root.name.lower().endswith(ENDINGS):
      raise UserError(f"{source}: unknown ending, known are {' '.join(ENDINGS)}")
    notes.append("1 file")
    yield from reader.read(root, root.name)
    return
  names, links = _walk(root, ENDINGS)
  notes.append(f"{len(names)} files")
  if links:
    notes.append(f"{links} links not followed")
  if not names:
    raise UserError(f"{source}: no file ends in {' '.join(ENDINGS)} ({links} links not followed)")
  for name in names:
    yield from reader.read(root / name, name)


def _walk(
  root: Path, endings: tuple[str, ...], skip: frozenset[str] = frozenset()
) -> tuple[list[str], int]:
  """Relative POSIX paths of the files with these endings, sorted, and the number of links met (none is followed)."""
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


def _stdlib(reader: Reader, notes: list[str]) -> Iterator[Document]:
  root = Path(sysconfig.get_path("stdlib"))
  names = _walk(root, (".py",), INSTALLED | TESTS | TABLES)[0] if root.is_dir() else []
  names = [name for name in names if not name.startswith(PLATFORM)]
  if not names:
    raise UserError(
      f"data.source='stdlib': this Python keeps no sources in {root}; name a file or folder instead"
    )
  notes.append(f"Python {platform.python_version()}")
  for name in names:
    try:
      yield from reader.read(root / name, name)
    except UserError as error:
      notes.append(f"left out {error}")


def _hub(reader: Reader, notes: list[str]) -> Iterator[Document]:
  config = reader.config
  datasets = import_extra("datasets", "hf", f"data.source={config.source!r}")
  hub = import_extra("huggingface_hub", "hf", f"data.source={config.source!r}")
  name, _, split = config.source.removeprefix("hf:").partition(":")
  split = split or "train"
  try:
    # Asked first and then pinned, so that the report names what was read.
    revision = hub.HfApi().dataset_info(name).sha
    records = datasets.load_dataset(name, split=split, streaming=True, revision=revision)
  except (OSError, ValueError) as error:
    raise UserError(f"data.source={config.source!r}: {error}") from error
  notes.append(f"revision {revision}")
  for index, record in enumerate(records):
    where = f"{config.source}:{index}"
    if config.text_field not in record:
      raise no_field(where, config.text_field, list(record))
    yield reader.record(f"{name}:{split}:{index}", record[config.text_field], where)


def _split(
  documents: list[Document], holdout: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
  if len(documents) == 1:
    return _split_text(documents[0], holdout)
  places = [_place(document.name) for document in documents]
  # Both sides get at least one: the border moves to just past the nearest document.
  border = min(max(holdout, min(places)), sorted(places)[-2])
  train = tuple(document for document, place in zip(documents, places) if place > border)
  heldout = tuple(document for document, place in zip(documents, places) if place <= border)
  return train, heldout


def _place(name: str) -> float:
  """A number in [0, 1) that depends on the name alone."""
  digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
  return int.from_bytes(digest) / 2**64


def _split_text(
  document: Document, holdout: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
  """A single document by position: its tail, from a line break if one is near, is held out."""
  name, text = document
  if len(text) < 2:
    raise UserError(f"{name}: one character is too short to keep {holdout} of it for evaluation")
  cut = min(max(round(len(text) * (1 - holdout)), 1), len(text) - 1)
  reach = min(cut, len(text) - cut) // 2
  cut = text.rfind("\n", cut - reach, cut) + 1 or cut
  return (Document(name, text[:cut]),), (Document(name, text[cut:]),)
