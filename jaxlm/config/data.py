"""Configures where text comes from and how it becomes rows of tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config.checks import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Configures where text comes from and how it becomes rows of tokens."""

  source: str = "stdlib"
  """A file or folder (.txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet), hf:owner/dataset, stdlib
  (Python's own sources), or a token store written by `jaxlm tokenize`."""
  tokenizer: str = "bytes"
  """`bytes`, a Hugging Face tokenizer.json, or `bpe:SIZE` to train one on the training text."""
  length: int = 256
  """T, predicted tokens per row."""
  layout: Literal["windows", "packed"] = "windows"
  """windows: cuts of the joined text. packed: whole documents side by side, with attention and
  positions kept apart."""
  holdout: float = 0.03
  """Fraction of the documents kept for evaluation, chosen by a hash of their names."""
  text_field: str = "text"
  """The field of jsonl, parquet and hf records that holds the text."""
  max_bytes: int | None = None
  """Read at most this much text; None reads all."""
  invalid_utf8: Literal["error", "replace"] = "error"
  """What to do with bytes that are not UTF-8; replaced ones are counted in the log."""
  cache: str = ""
  """Folder for the token stores of text over 64 MiB, which are used again by later runs; by default
  $XDG_CACHE_HOME/jaxlm, or ~/.cache/jaxlm. Smaller text is tokenized in memory."""
  threads: int = 2
  """Reader threads."""

  def __post_init__(self) -> None:
    check_finite(self, "data.")
    check(self.length >= 1, "data.length", self.length, "must be at least 1")
    check(0 < self.holdout < 1, "data.holdout", self.holdout, "must lie between 0 and 1")
    limit = self.max_bytes
    check(limit is None or limit >= 1, "data.max_bytes", limit, "must be at least 1, or None")
    check(self.threads >= 1, "data.threads", self.threads, "must be at least 1")
    if self.tokenizer.startswith("bpe:"):
      size = self.tokenizer.removeprefix("bpe:")
      good = size.isascii() and size.isdigit() and int(size) >= 257
      check(good, "data.tokenizer", self.tokenizer, "bpe:SIZE needs a whole number of at least 257")
