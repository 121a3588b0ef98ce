"""Writes a token store in passes over its source, resumable after a kill at any moment.

While a store is written, its progress says how far the source has been read and how much of each
array is valid. It is replaced after the arrays were written, so that a process which goes on from
it writes again what came after. Memory does not grow with the corpus: it holds a shard of each
array, the pieces that a tokenizer encodes at once, and one record.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.arrays import Place
from jaxlm.data.corpus import Source
from jaxlm.data.formats import Piece, Position, Reader
from jaxlm.data.split import SIDES, Places, Side, Split, assign_sides, better_split, first_split
from jaxlm.data.store import PROGRESS, SideWriter, TokenStore, write_finished, write_json
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import BPETokenizer, Excerpt, Tokenizer, make_tokenizer
from pallas_kernels.common.errors import UserError

Report = Callable[[str], None]


class TextTooLarge(Exception):
  """Raised where the text is larger than the limit under which it was to be written."""


@dataclasses.dataclass
class Progress:
  """Records how far a store is written, as in token_store_progress.json."""

  plan: dict[str, Any]
  split: Split
  position: Position = Position()
  places: Places = Places()
  sides: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def parse(cls, content: bytes) -> Progress:
    """Reads the content of token_store_progress.json."""
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
    """Returns the content of token_store_progress.json."""
    tuples = {name: getattr(self, name)._asdict() for name in ("split", "position", "places")}
    return {"plan": self.plan, **tuples, "sides": self.sides}

  @property
  def better_split(self) -> Split | None:
    """Returns the rule that the text, now read, should have been split by; None if it was."""
    at, holdout = self.position, self.plan["holdout"]
    return better_split(self.split, holdout, at.documents, at.size, self.places)


@dataclasses.dataclass(frozen=True)
class StoreWriter:
  """Writes one store, or the rest of one."""

  config: DataConfig
  source: Source
  place: Place
  plan: dict[str, Any]
  report: Report
  commit_seconds: float
  limit: int | None = None
  """Most bytes of text."""

  def run(self, tokenizer: Tokenizer | None) -> TokenStore:
    """Writes what is missing and returns the finished store; trains a tokenizer for None."""
    content = self.place.read(PROGRESS)
    if content is None:
      progress = self._restart(first_split(self.config.holdout, self._single_size()))
    else:
      progress = Progress.parse(content)
      check_plan(self.place, progress.plan, self.plan)
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

  def _restart(self, split: Split) -> Progress:
    progress = Progress(self.plan, split)
    write_json(self.place, PROGRESS, progress.to_json())
    return progress

  def _remove(self) -> None:
    if self.place.folder is not None:
      for side in SIDES:
        shutil.rmtree(self.place.folder / side, ignore_errors=True)
      for file in (PROGRESS, TOKENIZER_FILE):
        (self.place.folder / file).unlink(missing_ok=True)

  def _trained_tokenizer(self, progress: Progress) -> tuple[Tokenizer, Progress]:
    """Trains the tokenizer on the training side, under the split that turns out to be right."""
    if content := self.place.read(TOKENIZER_FILE):
      return BPETokenizer.parse(content, f"{self.place}/{TOKENIZER_FILE}"), progress
    self.report(f"training the tokenizer {self.config.tokenizer}")
    while True:
      survey = Progress(self.plan, progress.split)
      tokenizer: Tokenizer | None = None
      refusal: UserError | None = None
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

  def _training_texts(self, survey: Progress) -> Iterator[str]:
    """Yields the text of the training side, and counts in `survey` what was read."""
    reader = Reader(self.config)
    for side, piece in assign_sides(survey.split, self.source.pieces(reader)):
      survey.places = survey.places.add(piece)
      survey.position = reader.position
      if side == "train":
        yield piece.text

  def _write_arrays(self, progress: Progress, tokenizer: Tokenizer) -> Split | None:
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
        where = self.source.progress(piece.after)
        self.report(f"{where}: {_amount(piece.after)}, {speed:.1f} MB/s")
        due = time.monotonic() + self.commit_seconds
    progress.position = reader.position  # past the empty documents at the end
    if progress.better_split is not None:
      return progress.better_split
    self._check_text(progress.position, sides)
    self._finish(progress, tokenizer, sides)
    return None

  def _encoded(
    self, split: Split, reader: Reader, tokenizer: Tokenizer
  ) -> Iterator[tuple[Side, Piece, np.ndarray]]:
    pieces, copies = itertools.tee(assign_sides(split, self.source.pieces(reader)))
    ids = tokenizer.encode_all(Excerpt(piece.text, piece.before) for _, piece in copies)
    for (side, piece), ids_S in zip(pieces, ids):
      yield side, piece, ids_S

  def _check_text(self, position: Position, sides: dict[Side, SideWriter]) -> None:
    name = f"data.source={self.config.source!r}"
    if not position.documents:
      notes = "; ".join([*self.source.notes, f"{position.empty} empty documents"])
      raise UserError(f"{name}: holds no text ({notes})")
    if not all(writer.documents for writer in sides.values()):
      rule = f"one character is too short to keep {self.config.holdout} of it for evaluation"
      raise UserError(f"{name}: {rule}")

  def _finish(
    self, progress: Progress, tokenizer: Tokenizer, sides: dict[Side, SideWriter]
  ) -> None:
    meta: dict[str, Any] = {
      "format": self.plan["format"],
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
    counts = f"{sides['train'].documents} train, {sides['heldout'].documents} held out"
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


def check_plan(place: Place, stored: dict[str, Any], asked: dict[str, Any]) -> None:
  """Raises UserError where a store was made by another plan than the one that is asked for."""
  for name, value in asked.items():
    if stored.get(name) == value:
      continue
    if name == "identity":
      raise UserError(
        f"{place}: was made from another source, or from files that have changed since"
      )
    rule = f"the store was made with {stored.get(name)!r}; name a new store"
    raise UserError(f"{place}: data.{name}={value!r}: {rule}")
