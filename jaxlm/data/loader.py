"""From a configuration to batches: rows in a global random order, or held-out rows in their own.

Training order depends on the seed alone, not on the number of processes or the mesh: a process asks for its slice of
each global batch and builds only those rows.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator

import grain
import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data.corpus import Corpus, Document, read_corpus
from jaxlm.data.packing import Batch, Rows, join, pack, windows
from jaxlm.data.tokenizer import Tokenizer, make_tokenizer
from pallas_kernels.common.errors import UserError

__all__ = ["Batch", "TextData", "heldout_batches", "load_text", "train_loader"]


@dataclasses.dataclass(frozen=True)
class TextData:
  config: DataConfig
  tokenizer: Tokenizer
  corpus: Corpus
  """the documents themselves, for baselines that need no model"""
  train: Rows
  heldout: Rows
  heldout_tokens_per_byte: float
  """targets / UTF-8 bytes of all held-out text; the ends of documents are targets too"""
  report: str
  """lines for the log"""

  def bits_per_byte(self, loss: float) -> float:
    """Of a held-out loss in nats per token."""
    return loss * self.heldout_tokens_per_byte / math.log(2)


def load_text(config: DataConfig, tokenizer: Tokenizer | None = None) -> TextData:
  """Reads the corpus and encodes it with `tokenizer`, by default the one that `config` asks for.

  Raises ValueError for what `read_corpus` and `make_tokenizer` refuse, and for training text shorter than one row.
  """
  corpus = read_corpus(config)
  tokenizer = tokenizer or make_tokenizer(config, corpus.train)
  train, train_targets = _rows(config, tokenizer, corpus.train, keep_last=False)
  heldout, heldout_targets = _rows(config, tokenizer, corpus.heldout, keep_last=True)
  if not len(train):
    rule = f"the training text has {train_targets + 1} tokens, a row needs {config.length + 1}"
    raise UserError(f"data.length={config.length}: {rule}")
  heldout_bytes = sum(len(document.text.encode()) for document in corpus.heldout)
  report = (
    f"{corpus.report}\n{tokenizer.vocab_size} different tokens; rows of {config.length}: "
    + ", ".join(
      f"{targets} tokens in {len(rows)} {side} rows"
      for side, rows, targets in (
        ("training", train, train_targets),
        ("held-out", heldout, heldout_targets),
      )
    )
  )
  return TextData(
    config, tokenizer, corpus, train, heldout, heldout_targets / heldout_bytes, report
  )


def _rows(
  config: DataConfig, tokenizer: Tokenizer, documents: tuple[Document, ...], *, keep_last: bool
) -> tuple[Rows, int]:
  """The rows of the documents, and how many targets their stream has."""
  dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
  ids = tokenizer.encode_all(document.text for document in documents)
  tokens_S, borders_D = join(ids, tokenizer.eos, dtype)
  if config.layout == "windows":
    return windows(tokens_S, config.length, keep_last=keep_last), len(tokens_S) - 1
  return pack(tokens_S, borders_D, config.length), len(tokens_S) - 1


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
  """Batch i holds the rows i * batch, i * batch + 1, ... of an endless order; only a slice of it is built."""

  source: Rows
  order: grain.MapDataset
  batch: int
  rows: slice | np.ndarray

  def __len__(self) -> int:
    return sys.maxsize // self.batch

  def __getitem__(self, index: int) -> Batch:
    first = index * self.batch
    return self.source.take(
      np.array([self.order[first + b] for b in np.arange(self.batch)[self.rows]])
    )


def train_loader(
  text: TextData, *, batch: int, seed: int, rows: slice | np.ndarray = slice(None)
) -> grain.DatasetIterator[Batch]:
  """An endless iterator over training batches, of which it builds the `rows`; each epoch has an order of its own.

  `get_state()` is a small dict of whole numbers; `set_state` of it continues with the batch that would have come next,
  and `grain.checkpoint.CheckpointSave` and `CheckpointRestore` take the iterator.
  """
  # Epoch e is shuffled by seed + e: spread the seeds, so that seed 1 does not begin with the second epoch of seed 0.
  order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  order = grain.MapDataset.range(len(text.train)).shuffle(seed=order_seed).repeat()
  batches = grain.MapDataset.source(_TrainBatches(text.train, order, batch, rows))
  threads = text.config.threads
  return iter(
    batches.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    )
  )


def heldout_batches(
  text: TextData, *, batch: int, rows: slice | np.ndarray = slice(None), limit: int | None = None
) -> Iterator[Batch]:
  """The held-out rows in order; the last batch is filled up with rows of weight 0.

  With a `limit` below their number, that many batches of rows spread evenly over the held-out text.
  """
  total = len(text.heldout)
  count = -(-total // batch)
  order = np.arange(count * batch)
  if limit is not None and limit < count:
    order = np.arange(limit * batch) * total // (limit * batch)
  for index_B in order.reshape(-1, batch):
    yield text.heldout.take(index_B[rows])
