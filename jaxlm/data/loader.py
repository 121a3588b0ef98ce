"""Turns a configuration into batches: rows in a global random order, or held-out rows in their own.

Training order depends on the seed alone, not on the number of processes or the mesh: a process asks
for its slice of each global batch and builds only those rows, which it reads from a token store.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterator
from typing import Self

import grain
import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.arrays import read_spans
from jaxlm.data.cache import open_text
from jaxlm.data.packing import Batch, Rows, pack, windows
from jaxlm.data.store import StoredSide, TokenStore
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.writing import Report
from pallas_kernels.common.errors import UserError

_log = logging.getLogger("jaxlm")
__all__ = ["Batch", "TextData", "heldout_batches", "load_text", "train_loader"]


@dataclasses.dataclass(frozen=True)
class TextData:
  """Holds the rows of both sides of a text, and what identifies them."""

  config: DataConfig
  tokenizer: Tokenizer
  store: TokenStore
  train: Rows
  heldout: Rows
  report: str
  """Lines for the log."""

  @property
  def digests(self) -> dict[str, str]:
    """Returns side -> digest of its tokens and of the borders of its documents."""
    return self.store.digests

  @property
  def heldout_tokens_per_byte(self) -> float:
    """Returns the targets per UTF-8 byte of the held-out text, ends of documents included."""
    heldout = self.store.heldout
    return (heldout.tokens.shape[0] - 1) / heldout.size

  def bits_per_byte(self, loss: float) -> float:
    """Returns a held-out loss in bits per byte, given nats per token."""
    return loss * self.heldout_tokens_per_byte / math.log(2)


def load_text(
  config: DataConfig, tokenizer: Tokenizer | None = None, report: Report = _log.info
) -> TextData:
  """Opens the text of `config.source` as tokens, by default of the tokenizer that it asks for.

  `report` gets a line now and then while large text is tokenized.

  Raises UserError for what `open_text` refuses, and for training text shorter than one row.
  """
  store = open_text(config, tokenizer, report)
  train = _rows(config, store.train, keep_last=False)
  heldout = _rows(config, store.heldout, keep_last=True)
  size = store.train.tokens.shape[0]
  if not len(train):
    rule = f"the training text has {size} tokens, a row needs {config.length + 1}"
    raise UserError(f"data.length={config.length}: {rule}")
  rows = (
    f"{size - 1} tokens in {len(train)} training rows, "
    f"{store.heldout.tokens.shape[0] - 1} tokens in {len(heldout)} held-out rows"
  )
  vocabulary = f"{store.tokenizer.vocab_size} different tokens; rows of {config.length}"
  lines = f"{store.report}\n{vocabulary}: {rows}"
  return TextData(config, store.tokenizer, store, train, heldout, lines)


def _rows(config: DataConfig, side: StoredSide, *, keep_last: bool) -> Rows:
  if config.layout == "windows":
    return windows(side.tokens, config.length, keep_last=keep_last)
  borders_D = read_spans(side.borders, [0], [side.borders.shape[0]])[0]
  return pack(side.tokens, borders_D, config.length)


@dataclasses.dataclass(frozen=True)
class _Slices:
  """Builds slices of batches, as a sequence that grain reads ahead.

  Batch i holds the i-th `batch` rows of an endless order, counted from the row `first`.
  """

  source: Rows
  order: grain.MapDataset
  batch: int
  rows: slice | np.ndarray
  first: int

  def __len__(self) -> int:
    return sys.maxsize // self.batch

  def __getitem__(self, index: int) -> Batch:
    rows_B = self.first + index * self.batch + np.arange(self.batch)[self.rows]
    return self.source.build(np.array([self.order[row] for row in rows_B]))


class TrainBatches:
  """Iterates without end over training batches. Its position counts rows, whatever the batch."""

  def __init__(self, text: TextData, order: grain.MapDataset, batch: int, rows: slice | np.ndarray):
    self._slices = _Slices(text.train, order, batch, rows, 0)
    threads = text.config.threads
    self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    self.set_state({"next_row": 0})

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._next_row += self._slices.batch
    return batch

  def get_state(self) -> dict[str, int]:
    """Returns the place of the next row in the order of all rows of all processes."""
    return {"next_row": self._next_row}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on with the batch that begins at this place."""
    if "next_row" not in state:
      rule = "its position counts batches; use the version that wrote it, or train anew"
      raise UserError(f"checkpoint: is of an older version ({rule})")
    self._next_row = state["next_row"]
    slices = dataclasses.replace(self._slices, first=self._next_row)
    self._batches = iter(grain.MapDataset.source(slices).to_iter_dataset(self._options))


def train_loader(
  text: TextData, *, batch: int, seed: int, rows: slice | np.ndarray = slice(None)
) -> TrainBatches:
  """Iterates without end over training batches, of which it builds the `rows`.

  Each epoch has an order of its own. `set_state` of what `get_state()` returns goes on with the row
  that would have come next, also in batches of another size.
  """
  # Epoch e is shuffled by seed + e: spread the seeds, so that seed 1 does not begin with the
  # second epoch of seed 0.
  order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  order = grain.MapDataset.range(len(text.train)).shuffle(seed=order_seed).repeat()
  return TrainBatches(text, order, batch, rows)


def heldout_batches(
  text: TextData, *, batch: int, rows: slice | np.ndarray = slice(None), limit: int | None = None
) -> Iterator[Batch]:
  """Yields the held-out rows in order; the last batch is filled up with rows of weight 0.

  With a `limit` below their number, yields that many batches of rows spread evenly over the text.
  """
  total = len(text.heldout)
  count = -(-total // batch)
  order = np.arange(count * batch)
  if limit is not None and limit < count:
    order = np.arange(limit * batch) * total // (limit * batch)
  for index_B in order.reshape(-1, batch):
    yield text.heldout.build(index_B[rows])
