"""Writes token stores: streams any source through a tokenizer, resumable after a kill at any moment.

While a store is written, progress.json says how far the source has been read and how much of each array is valid. It
is replaced after the arrays were written, so that a process which goes on from it writes again what came after. Memory
does not grow with the corpus: it holds a shard of each array, the pieces that a tokenizer encodes at once, and one
record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.data.arrays import Place
from jaxlm.data.corpus import Source, open_source
from jaxlm.data.formats import Piece, Position, Reader
from jaxlm.data.split import SIDES, Places, Split, assign_sides, better_split, first_split
from jaxlm.data.store import (
  FINISHED,
  FORMAT,
  PROGRESS,
  SideWriter,
  TokenStore,
  is_store,
  write_finished,
  write_json,
)
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import BPETokenizer, Tokenizer, make_tokenizer
from pallas_kernels.common.errors import UserError

LOCK = "lock"
Report = Callable[[str], None]
_log = logging.getLogger("jaxlm")


class TextTooLarge(Exception):
  """The text is larger than the limit under which it was to be written."""


def tokenize(
  config: DataConfig,
  folder: Path,
  tokenizer: Tokenizer | None = None,
  *,
  source: Source | None = None,
  report: Report = _log.info,
  commit_seconds: float = 5.0,
) -> TokenStore:
  """Writes the tokens of `config.source` into a store, or goes on with an unfinished one.

  A finished store is read and verified. The tokenizer is by default the one that `config` asks for,
  the source the one that it names. Where another process writes the store, this one waits for it.
  Raises UserError where the folder holds something else, or a store of another source, tokenizer or
  split; a store that was begun here is removed again where its source is refused.
  """
  if "://" in str(folder):
    raise UserError(f"store={str(folder)!r}: must be a local folder")
  source, tokenizer = source or open_source(config), tokenizer or fixed_tokenizer(config)
  plan, place = make_plan(config, source, tokenizer), Place(folder)
  with _only_writer(folder, report):
    if (folder / FINISHED).is_file():
      store = TokenStore.open(place)
      _check_plan(place, store.meta["plan"], plan)
      store.verify()
      report(f"{folder}: is finished; its digests are verified")
      return store
    return _Writing(config, source, place, plan, report, commit_seconds).run(tokenizer)


def tokenize_in_memory(
  config: DataConfig, source: Source, tokenizer: Tokenizer | None, limit: int
) -> TokenStore:
  """Writes a store in the memory of this process; raises TextTooLarge above `limit` bytes of text."""
  plan = make_plan(config, source, tokenizer)
  return _Writing(config, source, Place(), plan, _log.debug, math.inf, limit).run(tokenizer)


def fixed_tokenizer(config: DataConfig) -> Tokenizer | None:
  """Returns the tokenizer that `config` asks for, None where it has to be trained on the text."""
  return None if config.tokenizer.startswith("bpe:") else make_tokenizer(config, [])


def make_plan(config: DataConfig, source: Source, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Returns what decides the content of a store, before any text is read."""
  return {
    "format": FORMAT,
    "identity": source.identity,
    "text_field": config.text_field,
    "max_bytes": config.max_bytes,
    "invalid_utf8": config.invalid_utf8,
    "holdout": config.holdout,
    "tokenizer": config.tokenizer if tokenizer is None else tokenizer.digest,
  }


def _check_plan(place: Place, stored: dict[str, Any], asked: dict[str, Any]) -> None:
  for name, value in asked.items():
    if stored.get(name) == value:
      continue
    if name == "identity":
      raise UserError(
        f"{place}: was made from another source, or from files that have changed since"
      )
    rule = f"the store was made with {stored.get(name)!r}; name a new store"
    raise UserError(f"{place}: data.{name}={value!r}: {rule}")


@contextlib.contextmanager
def _only_writer(folder: Path, report: Report) -> Iterator[None]:
  """Makes the folder and holds its lock, which the kernel releases however this process ends."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"store={str(folder)!r}: is a file, must be a new folder or a token store")
  if folder.exists() and not is_store(folder) and set(_names(folder)) - {LOCK}:
    raise UserError(f"store={str(folder)!r}: holds other files, must be new or a token store")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a")
  except OSError as error:
    raise UserError(f"store={str(folder)!r}: cannot be written to ({error.strerror})") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      report(f"{folder}: waiting for another process that writes it")
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      _log.warning("%s: the file system has no locks; let one process write at a time", folder)
    try:
      yield
    finally:
      (folder / LOCK).unlink(missing_ok=True)
      if not _names(folder):
        folder.rmdir()


def _names(folder: Path) -> list[str]:
  return [path.name for path in folder.iterdir()]


@dataclasses.dataclass
class _Progress:
  """How far a store is written, as in progress.json."""

  plan: dict[str, Any]
  split: Split
  position: Position = Position()
  places: Places = Places()
  sides: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def parse(cls, content: bytes) -> _Progress:
    values = json.loads(content)
    left_out = tuple(values["position"].pop("left_out"))
    return cls(
      values["plan"],
      Split(**values["split"]),
      Position(**values["position"], left_out=left_out),
      Places(**values["places"]),
      values["sides"],
    )

  def to_json(self) -> dict[str, Any]:
    tuples = {name: getattr(self, name)._asdict() for name in ("split", "position", "places")}
    return {"plan": self.plan, **tuples, "sides": self.sides}

  @property
  def better_split(self) -> Split | None:
    """The rule that the text should have been split by, once it has been read; None if it was."""
    at, holdout = self.position, self.plan["holdout"]
    return better_split(self.split, holdout, at.documents, at.size, self.places)


@dataclasses.dataclass(frozen=True)
class _Writing:
  """The writing of one store."""

  config: DataConfig
  source: Source
  place: Place
  plan: dict[str, Any]
  report: Report
  commit_seconds: float
  limit: int | None = None
  """Most bytes of text."""

  def run(self, tokenizer: Tokenizer | None) -> TokenStore:
    content = self.place.read(PROGRESS)
    if content is None:
      progress = self._restart(first_split(self.config.holdout, self._single_size()))
    else:
      progress = _Progress.parse(content)
      _check_plan(self.place, progress.plan, self.plan)
      self.report(f"{self.place}: going on after {_amount(progress.position)}")
    try:
      if tokenizer is None:
        tokenizer, progress = self._trained_tokenizer(progress)
      if isinstance(tokenizer, BPETokenizer):
        self.place.files[TOKENIZER_FILE] = tokenizer.model.to_str().encode()
      while (better := self._write_arrays(progress, tokenizer)) is not None:
        progress = self._restart(better)
    except UserError:
      if content is None:
        self._remove()
      raise
    return TokenStore.open(self.place)

  def _single_size(self) -> int | None:
    size, limit = self.source.single_size, self.config.max_bytes
    return size if size is None or limit is None else min(size, limit)

  def _restart(self, split: Split) -> _Progress:
    progress = _Progress(self.plan, split)
    write_json(self.place, PROGRESS, progress.to_json())
    return progress

  def _remove(self) -> None:
    if self.place.folder is not None:
      for name in SIDES:
        shutil.rmtree(self.place.folder / name, ignore_errors=True)
      for name in (PROGRESS, TOKENIZER_FILE):
        (self.place.folder / name).unlink(missing_ok=True)

  def _trained_tokenizer(self, progress: _Progress) -> tuple[Tokenizer, _Progress]:
    """Trains the tokenizer on the training side, under the split that turns out to be right."""
    if content := self.place.read(TOKENIZER_FILE):
      return BPETokenizer.parse(content, f"{self.place}/{TOKENIZER_FILE}"), progress
    self.report(f"training the tokenizer {self.config.tokenizer}")
    while True:
      survey = _Progress(self.plan, progress.split)
      tokenizer, refusal = None, None
      try:
        tokenizer = make_tokenizer(self.config, self._training_texts(survey))
      except UserError as error:
        refusal = error
      if (better := survey.better_split) is not None:
        progress = self._restart(better)
      elif tokenizer is not None:
        return tokenizer, progress
      else:
        raise refusal or AssertionError

  def _training_texts(self, survey: _Progress) -> Iterator[str]:
    """Yields the text of the training side, and counts in `survey` what was read."""
    reader = Reader(self.config)
    for side, piece in assign_sides(survey.split, self.source.pieces(reader)):
      survey.places = survey.places.add(piece)
      survey.position = reader.position
      if side == "train":
        yield piece.text

  def _write_arrays(self, progress: _Progress, tokenizer: Tokenizer) -> Split | None:
    """Writes the rest of the text; returns a better split where this one was not right."""
    reader = Reader(self.config, progress.position)
    sides = {
      side: SideWriter(self.place, side, tokenizer, progress.sides.get(side, {})) for side in SIDES
    }
    started, before = time.monotonic(), progress.position.size
    due = started + self.commit_seconds
    for side, piece, ids in self._encoded(progress.split, reader, tokenizer):
      sides[side].append(piece.text, ids, last=piece.last)
      progress.places = progress.places.add(piece)
      if piece.after is None:
        continue
      progress.position = piece.after
      if self.limit is not None and piece.after.size > self.limit:
        raise TextTooLarge
      if time.monotonic() >= due:
        progress.sides = {side: writer.flush() for side, writer in sides.items()}
        write_json(self.place, PROGRESS, progress.to_json())
        speed = (piece.after.size - before) / (time.monotonic() - started) / 1e6
        self.report(f"{_amount(piece.after)}, {speed:.1f} MB/s")
        due = time.monotonic() + self.commit_seconds
    progress.position = reader.position  # past the empty documents at the end
    if progress.better_split is not None:
      return progress.better_split
    self._check_text(progress.position, sides)
    self._finish(progress, tokenizer, sides)
    return None

  def _encoded(
    self, split: Split, reader: Reader, tokenizer: Tokenizer
  ) -> Iterator[tuple[str, Piece, Any]]:
    pieces, copies = itertools.tee(assign_sides(split, self.source.pieces(reader)))
    ids = tokenizer.encode_all(piece.text for _, piece in copies)
    for (side, piece), ids_S in zip(pieces, ids):
      yield side, piece, ids_S

  def _check_text(self, position: Position, sides: dict[str, SideWriter]) -> None:
    name = f"data.source={self.config.source!r}"
    if not position.documents:
      notes = "; ".join([*self.source.notes, f"{position.empty} empty documents"])
      raise UserError(f"{name}: holds no text ({notes})")
    if not all(writer.documents for writer in sides.values()):
      rule = f"one character is too short to keep {self.config.holdout} of it for evaluation"
      raise UserError(f"{name}: {rule}")

  def _finish(
    self, progress: _Progress, tokenizer: Tokenizer, sides: dict[str, SideWriter]
  ) -> None:
    meta = {
      "format": FORMAT,
      "source": self.config.source,
      "plan": self.plan,
      "tokenizer": {
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
      },
      "split": progress.split._asdict(),
      **{side: writer.finish() for side, writer in sides.items()},
    }
    counts = ", ".join(
      f"{sides[side].documents} {name}" for side, name in zip(SIDES, ("train", "held out"))
    )
    notes = [*self.source.notes, *_notes(progress.position, self.config.max_bytes)]
    meta["report"] = "; ".join(
      [f"{self.config.source}: {_amount(progress.position)}: {counts}", *notes]
    )
    write_finished(self.place, meta)


def _amount(position: Position) -> str:
  return f"{position.documents} documents, {position.size} bytes"


def _notes(position: Position, max_bytes: int | None) -> Iterator[str]:
  yield from (f"left out {reason}" for reason in position.left_out)
  if position.full:
    yield f"stopped at data.max_bytes={max_bytes}"
  if position.empty:
    yield f"{position.empty} empty documents left out"
  if position.replaced:
    yield f"{position.replaced} invalid UTF-8 sequences replaced"
