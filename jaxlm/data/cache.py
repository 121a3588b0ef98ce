"""Finds the token store of a configuration, or makes it: in memory, or in a cache folder.

A store in the cache is named by the digest of its source (names, sizes and times of files, or the
revision on the Hub), tokenizer and data configuration. It is used again where all of that is the
same, after its digests are verified.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.data.arrays import Place, digest
from jaxlm.data.corpus import open_source
from jaxlm.data.store import FINISHED, TokenStore, is_store
from jaxlm.data.tokenize import fixed_tokenizer, make_store_plan, tokenize, tokenize_in_memory
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.writing import Report, TextTooLarge
from jaxlm.paths import is_address, local_path, user_cache
from pallas_kernels.common.errors import UserError

IN_MEMORY = 1 << 26  # bytes of the largest text whose tokens are held in memory
_log = logging.getLogger("jaxlm")


def open_text(
  config: DataConfig, tokenizer: Tokenizer | None = None, report: Report = _log.info
) -> TokenStore:
  """Returns the store of `config.source`; `tokenizer` is by default the one that `config` asks for.

  `report` gets a line now and then while large text is tokenized. Raises UserError for what
  `tokenize` refuses, and for a given store that is unfinished or damaged or was made with another
  tokenizer or split than `config` asks for.
  """
  name = config.source
  if is_address(name) or (name and is_store(local_path(name, "data.source"))):
    store = TokenStore.open(Place.at(name, "data.source"))
    _check_given_store(store, config, tokenizer)
    return store
  source = open_source(config)
  cache_root(config)  # refused at once, not only where the text turns out to be large
  size, limit = source.expected_size, config.max_bytes
  if size is not None and min(size, size if limit is None else limit) <= IN_MEMORY:
    try:
      return tokenize_in_memory(config, source, tokenizer or fixed_tokenizer(config), IN_MEMORY)
    except TextTooLarge:  # it was compressed
      pass
  if config.tokenizer.startswith("bpe:"):
    folder = _cache_folder(config, make_store_plan(config, source, None))
    if tokenizer is None or _has_tokenizer(folder, tokenizer):
      return tokenize(config, folder, source=source, report=report)
  tokenizer = tokenizer or fixed_tokenizer(config)
  folder = _cache_folder(config, make_store_plan(config, source, tokenizer))
  return tokenize(config, folder, tokenizer, source=source, report=report)


def cache_root(config: DataConfig) -> Path:
  """Returns the folder that holds the stores of large text."""
  if config.cache:
    return local_path(config.cache, "data.cache")
  return user_cache()


def _cache_folder(config: DataConfig, plan: dict[str, Any]) -> Path:
  return cache_root(config) / digest(plan)


def _has_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
  """Returns whether a store has tokens of this tokenizer: one that was trained for it, say."""
  if not (folder / FINISHED).is_file():
    return False
  return TokenStore.open(Place(folder)).tokenizer.digest == tokenizer.digest


def _check_given_store(store: TokenStore, config: DataConfig, tokenizer: Tokenizer | None) -> None:
  tokenizer = tokenizer or fixed_tokenizer(config)
  if tokenizer is None:  # bpe:SIZE
    asked, got = config.tokenizer, store.meta["plan"]["tokenizer"]
  else:
    asked, got = tokenizer.digest, store.tokenizer.digest
  if asked != got:
    rule = f"the store {store.place} was made with another tokenizer"
    flag = "bytes" if store.tokenizer.digest == "bytes" else f"{store.place}/tokenizer.json"
    raise UserError(f"data.tokenizer={config.tokenizer!r}: {rule}; use --data.tokenizer {flag}")
  defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
  for name in ("holdout", "heldout", "text_field", "max_bytes", "invalid_utf8", "record_limit"):
    value, stored = getattr(config, name), store.meta["plan"].get(name)
    if value not in (stored, defaults[name]):
      raise UserError(f"data.{name}={value!r}: the store {store.place} was made with {stored!r}")
