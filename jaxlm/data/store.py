"""Stores the tokens of a corpus on both sides of its split, with what identifies them.

token_store.json           counts, digests, tokenizer, split; without it a store is unfinished
token_store_progress.json  where to go on, while the store is written
tokenizer.json             the tokenizer, unless tokens are bytes
train/tokens               the stream eos, document, eos, document, ..., eos
train/borders              int64, the places of the documents' ends: where the stream has its eos
heldout/...                likewise; heldout/text has the UTF-8 bytes of its documents in a row
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxlm.data.arrays import (
  CACHE,
  ArrayWriter,
  Place,
  digest,
  digest_array,
  missing_shards,
  read_blocks,
)
from jaxlm.data.pieces import SIDES, Side
from jaxlm.data.tokenizer import FILE as TOKENIZER_FILE
from jaxlm.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from pallas_kernels.common.errors import UserError

FORMAT = 1
FINISHED = "token_store.json"
PROGRESS = "token_store_progress.json"
SHARD = 1 << 23  # elements of a shard of tokens; one is held in memory per array that is written
BORDERS_SHARD = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoredSide:
  """Describes one side of the split; `jaxlm.data.arrays` reads its arrays."""

  tokens: ts.TensorStore
  borders: ts.TensorStore
  digest: str
  """Identifies tokens and borders, whatever their type and wherever they are kept."""
  documents: int
  size: int
  """Bytes of text."""
  byte_counts: np.ndarray
  """How often each of the 256 bytes stands in the text, int64."""
  zlib_size: int | None
  """Bytes of the text compressed by zlib at level 9; held-out side only."""


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """Holds a finished store, opened for reading."""

  place: Place
  meta: dict[str, Any]
  """The content of token_store.json."""
  tokenizer: Tokenizer
  train: StoredSide
  heldout: StoredSide

  @classmethod
  def open(cls, place: Place) -> TokenStore:
    """Opens a store and checks that it is finished and that no part of it is missing or cut short.

    Raises UserError that names the store and the part.
    """
    if place != Place():
      place = dataclasses.replace(place, cache=CACHE)
    meta = read_finished(place)
    tokenizer = _tokenizer(place, meta)
    sides = {side: _open_side(place, meta, side) for side in SIDES}
    return cls(place, meta, tokenizer, sides["train"], sides["heldout"])

  @property
  def digests(self) -> dict[str, str]:
    """Returns side -> digest of its tokens and borders."""
    return {"train": self.train.digest, "heldout": self.heldout.digest}

  @property
  def report(self) -> str:
    """Returns a line for the log: where the text is from and how much there is."""
    return self.meta["report"]

  def check_digests(self) -> None:
    """Reads the whole store; UserError names the first part that is not as it was written."""
    for side in SIDES:
      for name, recorded in self.meta[side]["arrays"].items():
        if digest_array(self.place.open_array(f"{side}/{name}", read=True)) != recorded["digest"]:
          raise _damaged(self.place, f"the digest of {side}/{name} is not the one in {FINISHED}")


def is_store(folder: Path) -> bool:
  """Returns whether a folder is a token store, finished or not."""
  return (folder / FINISHED).is_file() or (folder / PROGRESS).is_file()


def read_finished(place: Place) -> dict[str, Any]:
  """Returns the content of token_store.json; UserError where it is missing or damaged."""
  content = place.read(FINISHED)
  if content is None:
    if place.read(PROGRESS) is None:
      raise UserError(f"{place}: not a token store: there is no {FINISHED}")
    rule = "unfinished token store; go on with: jaxlm tokenize SOURCE"
    raise UserError(f"{place}: {rule} {place}")
  try:
    meta = json.loads(content)
    sound = meta.pop("checksum") == digest(meta)
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise _damaged(place, f"{FINISHED} cannot be read") from error
  if not sound:
    raise _damaged(place, f"{FINISHED} is not as it was written")
  if meta["format"] != FORMAT:
    raise UserError(f"{place}: format {meta['format']}, this version reads format {FORMAT}")
  return meta


def _damaged(place: Place, fault: str) -> UserError:
  return UserError(f"{place}: damaged token store: {fault}")


def _tokenizer(place: Place, meta: dict[str, Any]) -> Tokenizer:
  if meta["tokenizer"]["digest"] == ByteTokenizer.digest:
    return ByteTokenizer()
  content = place.read(TOKENIZER_FILE)
  if content is None:
    raise _damaged(place, f"there is no {TOKENIZER_FILE}")
  tokenizer = BPETokenizer.parse(content, f"{place}/{TOKENIZER_FILE}")
  if tokenizer.digest != meta["tokenizer"]["digest"]:
    raise _damaged(place, f"{TOKENIZER_FILE} is not the one that it was written with")
  return tokenizer


def _open_side(place: Place, meta: dict[str, Any], side: Side) -> StoredSide:
  arrays, recorded = {}, meta[side]
  for name, values in recorded["arrays"].items():
    try:
      arrays[name] = place.open_array(f"{side}/{name}", open=True, read=True)
    except ValueError as error:
      raise _damaged(place, f"{side}/{name} cannot be opened") from error
    if arrays[name].shape != (values["size"],):
      raise _damaged(place, f"{side}/{name} has another size than {FINISHED} says")
    if missing := missing_shards(place, f"{side}/{name}", arrays[name]):
      raise _damaged(place, f"{missing[0]} is missing or cut short ({len(missing)} such files)")
  return StoredSide(
    arrays["tokens"],
    arrays["borders"],
    recorded["digest"],
    recorded["documents"],
    recorded["size"],
    np.array(recorded["byte_counts"], np.int64),
    recorded.get("zlib_size"),
  )


class SideWriter:
  """Appends documents to one side of a store."""

  def __init__(self, place: Place, side: Side, tokenizer: Tokenizer, state: dict) -> None:
    """Goes on from a `state` that `flush` gave; an empty one begins anew."""
    self.place, self.side = place, side
    self.documents: int = state.get("documents", 0)
    self.size: int = state.get("size", 0)
    self.byte_counts = np.array(state.get("byte_counts", [0] * 256), np.int64)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    kinds = {"tokens": (dtype, SHARD), "borders": (np.dtype(np.int64), BORDERS_SHARD)}
    if side == "heldout":
      kinds["text"] = (np.dtype(np.uint8), SHARD)
    states = state.get("arrays", {})
    self.arrays = {
      name: ArrayWriter(place, f"{side}/{name}", dtype, shard, states.get(name, {}))
      for name, (dtype, shard) in kinds.items()
    }
    self.eos = np.array([tokenizer.eos], dtype)
    if not states:
      self._end_document()

  def append(self, text: str, ids: np.ndarray, *, last: bool) -> None:
    """Appends a part of a document, or its end."""
    raw = np.frombuffer(text.encode(), np.uint8)
    self.size += len(raw)
    self.byte_counts += np.bincount(raw, minlength=256)
    self.arrays["tokens"].append(ids)
    if "text" in self.arrays:
      self.arrays["text"].append(raw)
    if last:
      self.documents += 1
      self._end_document()

  def _end_document(self) -> None:
    self.arrays["borders"].append(np.array([self.arrays["tokens"].size]))
    self.arrays["tokens"].append(self.eos)

  def flush(self) -> dict[str, Any]:
    """Writes what is held in memory and returns the state to go on from."""
    return self._record({name: array.flush() for name, array in self.arrays.items()})

  def finish(self) -> dict[str, Any]:
    """Writes the rest; returns the counts and digests of the side for token_store.json."""
    arrays = {name: array.finish() for name, array in self.arrays.items()}
    record = self._record(arrays)
    record["digest"] = digest([arrays["tokens"]["digest"], arrays["borders"]["digest"]])
    if "text" in self.arrays:
      record["zlib_size"] = _zlib_size(self.place.open_array(f"{self.side}/text", open=True))
    return record

  def _record(self, arrays: dict[str, dict[str, Any]]) -> dict[str, Any]:
    counts = self.byte_counts.tolist()
    documents, size = self.documents, self.size
    return {"documents": documents, "size": size, "byte_counts": counts, "arrays": arrays}


def _zlib_size(text: ts.TensorStore) -> int:
  """Returns the size of a text compressed by DEFLATE at level 9 (RFC 1950, 1951), in bytes."""
  compressor = zlib.compressobj(9)
  size = sum(len(compressor.compress(block.tobytes())) for block in read_blocks(text))
  return size + len(compressor.flush())


def write_json(place: Place, name: str, value: dict[str, Any]) -> None:
  """Puts a file in the place of a former one in one step."""
  place.files[name] = (json.dumps(value, indent=1) + "\n").encode()


def write_finished(place: Place, meta: dict[str, Any]) -> None:
  """Writes token_store.json, which makes the store a finished one."""
  write_json(place, FINISHED, {**meta, "checksum": digest(meta)})
  del place.files[PROGRESS]
