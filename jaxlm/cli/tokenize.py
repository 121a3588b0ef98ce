"""Defines `jaxlm tokenize`, which turns any source into a token store."""

from __future__ import annotations

import sys
from typing import Literal

import tyro

from jaxlm.config import DataConfig


def tokenize(
  source: tyro.conf.Positional[str],
  store: tyro.conf.Positional[str],
  tokenizer: str = "bytes",
  holdout: float = DataConfig.holdout,
  heldout: str = DataConfig.heldout,
  text_field: str = DataConfig.text_field,
  max_bytes: int | None = None,
  invalid_utf8: Literal["leave_out", "replace"] = DataConfig.invalid_utf8,
  strict: bool = DataConfig.strict,
  record_limit: int = DataConfig.record_limit,
  follow_links: bool = DataConfig.follow_links,
) -> int:
  """Write the tokens of a text of any size into a store, from which `train` reads them.

  Started again after it was stopped or killed, it goes on where it was. A finished store is
  verified. Train from it with --data.source STORE.

  Args:
    source: a file or folder (.txt .md .py .jsonl, these also with .gz or .zst, .parquet),
      hf:owner/dataset, or stdlib
    store: folder to write, or gs://bucket/folder or s3://bucket/folder
    tokenizer: bytes, a Hugging Face tokenizer.json, or bpe:SIZE to train one on the training text
    holdout: fraction of the bytes kept for evaluation
    heldout: file, folder or hf:owner/dataset:split kept for evaluation; by default what is named
      val, valid, validation, dev or test, where there is any; none ignores names
    text_field: the field of jsonl, parquet and hf records that holds the text
    max_bytes: read at most this much text
    invalid_utf8: what to do with a file or record that is not UTF-8
    strict: refuse the first file or record that is no text, instead of leaving it out
    record_limit: bytes of the longest record of jsonl or parquet; longer ones are left out
    follow_links: read what links in a folder lead to
  """
  from jaxlm.data.tokenize import tokenize
  from jaxlm.run.output import forgiving_output

  config = DataConfig(
    source=source,
    tokenizer=tokenizer,
    holdout=holdout,
    text_field=text_field,
    max_bytes=max_bytes,
    invalid_utf8=invalid_utf8,
    heldout=heldout,
    strict=strict,
    record_limit=record_limit,
    follow_links=follow_links,
  )
  with forgiving_output():
    written = tokenize(config, store, report=_print_progress)
  tokens = written.train.tokens.shape[0], written.heldout.tokens.shape[0]
  print(f"{written.report}\n{tokens[0]:,} training and {tokens[1]:,} held-out tokens in {store}")
  print("".join(f"  {side} digest {digest}\n" for side, digest in written.digests.items()), end="")
  flag = "" if tokenizer == "bytes" else f" --data.tokenizer {store}/tokenizer.json"
  print(f"train from it with: jaxlm train PRESET --data.source {store}{flag}")
  return 0


def _print_progress(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
