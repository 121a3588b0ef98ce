"""Defines `jaxlm tokenize`, which turns any source into a token store."""

from __future__ import annotations

import sys
from typing import Literal

import tyro

from jaxlm.config import DataConfig
from jaxlm.paths import local_path


def tokenize(
  source: tyro.conf.Positional[str],
  store: tyro.conf.Positional[str],
  tokenizer: str = "bytes",
  holdout: float = DataConfig.holdout,
  text_field: str = DataConfig.text_field,
  max_bytes: int | None = None,
  invalid_utf8: Literal["error", "replace"] = "error",
) -> int:
  """Write the tokens of a text of any size into a store, from which `train` reads them.

  Started again after it was stopped or killed, it goes on where it was. A finished store is
  verified. Train from it with --data.source STORE.

  Args:
    source: a file or folder (.txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet), hf:owner/dataset,
      or stdlib
    store: folder to write
    tokenizer: bytes, a Hugging Face tokenizer.json, or bpe:SIZE to train one on the training text
    holdout: fraction of the documents kept for evaluation, chosen by a hash of their names
    text_field: the field of jsonl, parquet and hf records that holds the text
    max_bytes: read at most this much text
    invalid_utf8: what to do with bytes that are not UTF-8
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
  )
  with forgiving_output():
    written = tokenize(config, local_path(store, "store"), report=_print_progress)
  tokens = written.train.tokens.shape[0], written.heldout.tokens.shape[0]
  print(f"{written.report}\n{tokens[0]:,} training and {tokens[1]:,} held-out tokens in {store}")
  print("".join(f"  {side} digest {digest}\n" for side, digest in written.digests.items()), end="")
  flag = "" if tokenizer == "bytes" else f" --data.tokenizer {store}/tokenizer.json"
  print(f"train from it with: jaxlm train PRESET --data.source {store}{flag}")
  return 0


def _print_progress(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
