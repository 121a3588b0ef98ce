"""Configures where text comes from and how it becomes rows of tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxlm.config.checks import check, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Configures where text comes from and how it becomes rows of tokens."""

  source: str = "stdlib"
  """A file or folder (.txt .md .py .jsonl, these also with .gz or .zst, .parquet),
  hf:owner/dataset, stdlib (Python's own sources), or a token store of `jaxlm tokenize`."""
  tokenizer: str = "bytes"
  """`bytes`, a Hugging Face tokenizer.json, or `bpe:SIZE` to train one on the training text."""
  length: int = 256
  """T, predicted tokens per row."""
  layout: Literal["windows", "packed"] = "windows"
  """windows: cuts of the joined text. packed: whole documents side by side, with attention and
  positions kept apart."""
  holdout: float = 0.03
  """Fraction of the bytes kept for evaluation, up to one half: whole documents, chosen by a hash of
  their names, and the ends of some where documents are few, cut behind a line, a sentence or a word
  if one ends within a tenth of the part that is held out."""
  heldout: str = ""
  """The text to evaluate on: a file, folder or hf:owner/dataset:split. Empty: files and folders
  named val, valid, validation, dev or test, where there are any, else `holdout` of the bytes. none:
  never by name."""
  text_field: str = "text"
  """The field of jsonl, parquet and hf records that holds the text."""
  max_bytes: int | None = None
  """Read at most this much text, of each side where the source names its sides; None reads all."""
  invalid_utf8: Literal["leave_out", "replace"] = "leave_out"
  """What to do with a file or record that is not UTF-8: leave it out, or read it with U+FFFD in
  such places. Both are counted in the log."""
  strict: bool = False
  """Refuse the first file or record that is no text, instead of leaving it out and counting it."""
  record_limit: int = 1 << 25
  """Bytes of the longest record of jsonl or parquet; longer ones are not read but left out."""
  follow_links: bool = False
  """Read what links in a folder lead to. Those of the Hub's cache are read in any case."""
  cache: str = ""
  """Folder for the token stores of text over 64 MiB, which are used again by later runs; by default
  $XDG_CACHE_HOME/jaxlm, or ~/.cache/jaxlm. Smaller text is tokenized in memory."""
  threads: int = 2
  """Reader threads."""

  def __post_init__(self) -> None:
    check_finite(self, "data.")
    check(self.length >= 1, "data.length", self.length, "must be at least 1")
    rule = "must lie above 0 and not above 0.5: more would be held out than trained on"
    check(0 < self.holdout <= 0.5, "data.holdout", self.holdout, rule)
    check(self.record_limit >= 1, "data.record_limit", self.record_limit, "must be at least 1")
    limit = self.max_bytes
    check(limit is None or limit >= 1, "data.max_bytes", limit, "must be at least 1, or None")
    check(self.threads >= 1, "data.threads", self.threads, "must be at least 1")
    if self.tokenizer.startswith("bpe:"):
      size = self.tokenizer.removeprefix("bpe:")
      good = size.isascii() and size.isdigit() and int(size) >= 257
      check(good, "data.tokenizer", self.tokenizer, "bpe:SIZE needs a whole number of at least 257")
