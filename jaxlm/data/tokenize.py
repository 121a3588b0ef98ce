"""Makes token stores: streams any source through a tokenizer into a folder or into memory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.data.arrays import Place
from jaxlm.data.corpus import Source, open_source
from jaxlm.data.store import FINISHED, PROGRESS, TokenStore, is_store
from jaxlm.data.tokenizer import Tokenizer, make_tokenizer
from jaxlm.data.writing import Report, StoreWriter, check_plan
from jaxlm.paths import left_by_system
from pallas_kernels.common.errors import UserError

LOCK = "lock"
RULES = 2  # by which text is read and split; one more whenever they give other documents or sides
_log = logging.getLogger("jaxlm")


def tokenize(
  config: DataConfig,
  folder: str | Path,
  tokenizer: Tokenizer | None = None,
  *,
  source: Source | None = None,
  report: Report = _log.info,
  commit_seconds: float = 5.0,
) -> TokenStore:
  """Writes the tokens of `config.source` into a store, or goes on with an unfinished one.

  A finished store is read and verified. The tokenizer is by default the one that `config` asks for,
  the source the one that it names. `folder` may be an address, gs:// or s3://, which one process
  writes at a time; where another process writes a store in a folder, this one waits for it.
  Raises UserError where the folder holds something else, or a store of another source, tokenizer or
  split; a store that was begun here is removed again where its source is refused.
  """
  place = Place.at(folder, "store", write=True)
  source, tokenizer = source or open_source(config), tokenizer or fixed_tokenizer(config)
  plan = make_store_plan(config, source, tokenizer)
  with _only_writer(place, report):
    if place.read(FINISHED) is not None:
      store = TokenStore.open(place)
      check_plan(place, store.meta["plan"], plan)
      store.check_digests()
      place.files.write(PROGRESS, None).result()  # killed between the last two writes
      report(f"{place}: is finished; its digests are verified")
      return store
    report(f"{config.source}: writing its tokens into {place}")
    return StoreWriter(config, source, place, plan, report, commit_seconds).run(tokenizer)


def tokenize_in_memory(
  config: DataConfig, source: Source, tokenizer: Tokenizer | None, limit: int
) -> TokenStore:
  """Writes a store in the memory of this process; TextTooLarge above `limit` bytes of text."""
  plan = make_store_plan(config, source, tokenizer)
  return StoreWriter(config, source, Place(), plan, _log.debug, math.inf, limit).run(tokenizer)


def fixed_tokenizer(config: DataConfig) -> Tokenizer | None:
  """Returns the tokenizer that `config` asks for, None where it has to be trained on the text."""
  return None if config.tokenizer.startswith("bpe:") else make_tokenizer(config, [])


def make_store_plan(
  config: DataConfig, source: Source, tokenizer: Tokenizer | None
) -> dict[str, Any]:
  """Returns what decides the content of a store, before any text is read."""
  return {
    "rules": RULES,
    "identity": source.identity,
    "text_field": config.text_field,
    "max_bytes": config.max_bytes,
    "invalid_utf8": config.invalid_utf8,
    "record_limit": config.record_limit,
    "holdout": config.holdout,
    "heldout": config.heldout,
    "tokenizer": config.tokenizer if tokenizer is None else tokenizer.digest,
  }


@contextlib.contextmanager
def _only_writer(place: Place, report: Report) -> Iterator[None]:
  """Makes the folder and holds its lock, which the kernel releases however this process ends.

  At an address nothing is made and nothing is locked.
  """
  if place.folder is None:
    names = {name.decode() for name in place.files.list().result()}
    if names and not names & {FINISHED, PROGRESS}:
      raise UserError(f"store={str(place)!r}: holds other files, must be new or a token store")
    yield
    return
  folder = place.folder
  if folder.exists() and not folder.is_dir():
    raise UserError(f"store={str(folder)!r}: is a file, must be a new folder or a token store")
  if folder.exists() and not is_store(folder) and _names(folder) - {LOCK}:
    raise UserError(f"store={str(folder)!r}: holds other files, must be new or a token store")
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a")
  except OSError as error:
    raise UserError(f"store={str(folder)!r}: cannot be written to ({error.strerror})") from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      report(f"{folder}: waiting for another process that writes it")
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      _log.warning("%s: the file system has no locks; let one process write at a time", folder)
    try:
      yield
    finally:
      (folder / LOCK).unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # the first that is not empty ends it
        for path in missing:
          path.rmdir()


def _names(folder: Path) -> set[str]:
  return {path.name for path in folder.iterdir() if not left_by_system(path.name)}
