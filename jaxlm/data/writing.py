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
import tensorstore as ts

from jaxlm.config import DataConfig
from jaxlm.data.arrays import Place
from jaxlm.data.corpus import Source, absolute_paths
from jaxlm.data.description import Size, check_sides, describe_amount, describe_text
from jaxlm.data.formats import Reader
from jaxlm.data.pieces import SIDES, LeftOut, Piece, Position, Side
from jaxlm.data.split import Split, Survey, assign_sides, better_split, make_split
from jaxlm.data.store import FORMAT, PROGRESS, SideWriter, TokenStore, write_finished, write_json
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
  survey: Survey = dataclasses.field(default_factory=Survey)
  sides: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def parse(cls, values: dict[str, Any]) -> Progress:
    """Reads the content of token_store_progress.json."""
    left_out = tuple(LeftOut(*entry) for entry in values["position"].pop("left_out"))
    return cls(
      values["plan"],
      Split.parse(**values["split"]),
      Position(**values["position"], left_out=left_out),
      Survey(**values["survey"]),
      values["sides"],
    )

  def to_json(self) -> dict[str, Any]:
    """Returns the content of token_store_progress.json."""
    tuples = {name: getattr(self, name)._asdict() for name in ("split", "position")}
    return {"plan": self.plan, **tuples, "survey": self.survey.to_json(), "sides": self.sides}


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
      progress = self._restart(self._first_split())
    else:
      values = json.loads(content)
      check_plan(self.place, values["plan"], self.plan)
      progress = Progress.parse(values)
      self.report(f"{self.place}: going on after {describe_amount(progress.position)}")
    try:
      if tokenizer is None:
        tokenizer, progress = self._trained_tokenizer(progress)
      if isinstance(tokenizer, BPETokenizer):
        self.place.files[TOKENIZER_FILE] = tokenizer.model.to_str().encode()
      while (better := self._write_arrays(progress, tokenizer)) is not None:
        self.report(f"writing again: data.holdout={self.config.holdout} needs another split")
        progress = self._restart(better)
    except UserError as error:
      unreadable = isinstance(error.__cause__, OSError)  # goes on where the disk is back
      if content is None and not (unreadable and progress.sides):
        self._remove()
      raise
    return TokenStore.open(self.place)

  def _first_split(self) -> Split:
    """Returns the split to begin with: the right one, where the sizes of documents are known."""
    documents = self.source.documents
    if documents is None or self.source.names_sides:
      return Split(self.config.holdout)
    survey, left = Survey(), self.config.max_bytes
    for name, size in documents:
      if left is not None:
        size = min(size, left)
        left -= size
      if size:
        survey.add(name, size)
    return make_split(survey, self.config.holdout)

  def _better_split(self, split: Split, survey: Survey) -> Split | None:
    """Returns the rule that the text, now read, should have been split by; None if it was."""
    named = self.source.names_sides
    return None if named else better_split(split, self.config.holdout, survey)

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
    elif self.place.address:
      self.place.files.delete_range(ts.KvStore.KeyRange()).result()

  def _trained_tokenizer(self, progress: Progress) -> tuple[Tokenizer, Progress]:
    """Trains the tokenizer on the training side, under the split that turns out to be right."""
    if content := self.place.read(TOKENIZER_FILE):
      return BPETokenizer.parse(content, f"{self.place}/{TOKENIZER_FILE}"), progress
    self.report(f"training the tokenizer {self.config.tokenizer}")
    while True:
      survey = Survey()
      tokenizer: Tokenizer | None = None
      refusal: UserError | None = None
      try:
        tokenizer = make_tokenizer(self.config, self._training_texts(progress.split, survey))
      except UserError as error:
        refusal = error
      better = self._better_split(progress.split, survey)
      if better is not None:
        progress = self._restart(better)
      elif tokenizer is not None:
        return tokenizer, progress
      else:
        raise refusal or AssertionError

  def _training_texts(self, split: Split, survey: Survey) -> Iterator[str]:
    """Yields the text of the training side, and counts in `survey` what was read."""
    for side, piece in assign_sides(split, self.source.pieces(Reader(self.config))):
      survey.add_piece(side, piece)
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
      progress.survey.add_piece(side, piece)
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
        self.report(f"{where}: {describe_amount(piece.after)}, {speed:.1f} MB/s")
        due = time.monotonic() + self.commit_seconds
    progress.position = reader.position  # past the empty documents at the end
    if (better := self._better_split(progress.split, progress.survey)) is not None:
      return better
    check_sides(self.config, self.source, progress.position, _sizes(sides))
    self._finish(progress, tokenizer, sides)
    return None

  def _encoded(
    self, split: Split, reader: Reader, tokenizer: Tokenizer
  ) -> Iterator[tuple[Side, Piece, np.ndarray]]:
    pieces, copies = itertools.tee(assign_sides(split, self.source.pieces(reader)))
    ids = tokenizer.encode_all(Excerpt(piece.text, piece.before) for _, piece in copies)
    for (side, piece), ids_S in zip(pieces, ids):
      yield side, piece, ids_S

  def _finish(
    self, progress: Progress, tokenizer: Tokenizer, sides: dict[Side, SideWriter]
  ) -> None:
    meta: dict[str, Any] = {
      "format": FORMAT,
      "source": absolute_paths(self.config).source,
      "plan": self.plan,
      "tokenizer": {
        "digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
      },
      "split": progress.split._asdict(),
      **{side: writer.finish() for side, writer in sides.items()},
    }
    meta["report"] = describe_text(
      self.config, self.source, progress.position, progress.split, _sizes(sides)
    )
    write_finished(self.place, meta)


def _sizes(sides: dict[Side, SideWriter]) -> dict[Side, Size]:
  return {side: Size(writer.documents, writer.size) for side, writer in sides.items()}


def check_plan(place: Place, stored: dict[str, Any], asked: dict[str, Any]) -> None:
  """Raises UserError where a store was made by another plan than the one that is asked for."""
  for name, value in asked.items():
    if stored.get(name) == value:
      continue
    if name == "rules":
      raise UserError(f"{place}: was made by another version; name a new store")
    if name == "identity":
      raise UserError(
        f"{place}: was made from another source, or from files that have changed since"
      )
    rule = f"the store was made with {stored.get(name)!r}; name a new store"
    raise UserError(f"{place}: data.{name}={value!r}: {rule}")
