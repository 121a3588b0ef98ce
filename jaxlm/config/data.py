"""Where text comes from and how it becomes rows of tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config.checks import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where text comes from and how it becomes rows of tokens."""

  source: str = "stdlib"
  """a file or folder (.txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet), hf:owner/dataset, or stdlib (Python's own)"""
  tokenizer: str = "bytes"
  """bytes, a Hugging Face tokenizer.json, or bpe:SIZE to train one on the corpus"""
  length: int = 256
  """T, predicted tokens per row"""
  layout: Literal["windows", "packed"] = "windows"
  """windows: cuts of the joined text; packed: whole documents side by side, attention and positions kept apart"""
  holdout: float = 0.03
  """fraction of the documents kept for evaluation, chosen by a hash of their names"""
  text_field: str = "text"
  """the field of jsonl, parquet and hf records that holds the text"""
  max_bytes: int = 2**30
  """read at most this much text"""
  invalid_utf8: Literal["error", "replace"] = "error"
  """what to do with bytes that are not UTF-8; replaced ones are counted in the log"""
  threads: int = 2
  """reader threads"""

  def __post_init__(self) -> None:
    check_finite(self, "data.")
    check(self.length >= 1, "data.length", self.length, "must be at least 1")
    check(0 < self.holdout < 1, "data.holdout", self.holdout, "must lie between 0 and 1")
    check(self.max_bytes >= 1, "data.max_bytes", self.max_bytes, "must be at least 1")
    check(self.threads >= 1, "data.threads", self.threads, "must be at least 1")
    if self.tokenizer.startswith("bpe:"):
      size = self.tokenizer.removeprefix("bpe:")
      good = size.isascii() and size.isdigit() and int(size) >= 257
      check(good, "data.tokenizer", self.tokenizer, "bpe:SIZE needs a whole number of at least 257")
