"""Appends to the arrays of a token store shard by shard, and reads them span by span.

They are zarr3 arrays of tensorstore. A shard is one file, or one entry in memory, and is written at
once; the chunks in it are what a reader fetches, each with a checksum (CRC-32C), so that a damaged
one is an error and never other numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from jaxlm.paths import full_address, is_address, literal_path, local_path
from pallas_kernels.common.errors import UserError

CHUNK = 1 << 14  # elements that are read at once
CACHE = 1 << 26  # bytes of chunks that a process keeps of one store that it reads
SYNC = True  # a file is on disk when its write returns
DIGEST_BLOCK = 1 << 16  # elements of one link of a digest
READ_BLOCK = 1 << 20  # elements that are held while a whole array is read
CHECKSUM = 4  # bytes of CRC-32C behind every chunk and every index of a shard
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


OBJECT_STORES = {"gs": "gcs", "s3": "s3"}  # scheme of an address -> driver of tensorstore
_PROBE = ".jaxlm_probe"  # is written and removed, to see whether that is allowed
_RETRIES = {"max_retries": 3, "max_delay": "4s"}


def address_spec(address: str) -> dict[str, Any]:
  """Returns tensorstore's description of an address such as gs://bucket/folder/."""
  scheme, _, rest = address.partition("://")
  bucket, _, path = rest.partition("/")
  return {"driver": OBJECT_STORES[scheme], "bucket": bucket, "path": path}


def open_address(address: str, field: str, *, write: bool = False) -> ts.KvStore:
  """Opens what is at an address, with the credentials that the tools of its store have left here.

  Raises UserError that begins with `field` where they do not suffice to read it, or with `write` to
  write there, and says why.
  """
  where = f"{field}={address.rstrip('/')!r}"
  scheme, _, rest = address.partition("://")
  if scheme not in OBJECT_STORES or not rest.partition("/")[0]:
    raise UserError(f"{where}: must be a path on this machine, gs://bucket/... or s3://bucket/...")
  try:
    files = ts.KvStore.open(address_spec(address), context=_context(0)).result()
    files.read(_PROBE).result()  # a list takes every answer that is JSON for an empty one
    if write:
      files.write(_PROBE, b"").result()
      files.write(_PROBE, None).result()
  except ValueError as error:
    reason = str(error).partition("\n")[0]
    raise UserError(f"{where}: cannot be reached with the credentials here: {reason}") from error
  return files


def _context(cache: int) -> ts.Context:
  return ts.Context(
    {
      "cache_pool": {"total_bytes_limit": cache},
      "file_io_sync": SYNC,
      "gcs_request_retries": _RETRIES,
      "s3_request_retries": _RETRIES,
    }
  )


@dataclasses.dataclass(frozen=True)
class Place:
  """Says where a store is: in a local folder, at an address, or in the memory of this process."""

  folder: Path | None = None
  address: str = ""
  """of an object store, with a slash at the end; takes the place of the folder"""
  cache: int = dataclasses.field(default=0, compare=False)
  """Bytes of chunks that are kept for reading again."""

  def __str__(self) -> str:
    return self.address.rstrip("/") or ("memory" if self.folder is None else str(self.folder))

  @classmethod
  def at(cls, name: str | Path, field: str, *, write: bool = False) -> Place:
    """Returns the place of this name; UserError where it can be none, or cannot be reached."""
    if not is_address(name):
      return cls(local_path(name, field))
    open_address(full_address(name), field, write=write)
    return cls(address=full_address(name))

  def spec(self, prefix: str = "") -> dict[str, Any]:
    """Returns tensorstore's description of the place below `prefix`."""
    if self.address:
      spec = address_spec(self.address)
      return {**spec, "path": spec["path"] + prefix}
    if self.folder is None:
      return {"driver": "memory", "path": prefix}
    return {"driver": "file", "path": f"{literal_path(self.folder.resolve())}/{prefix}"}

  @functools.cached_property
  def context(self) -> ts.Context:
    """Returns the cache of the store, with its memory where it is held there."""
    return _context(self.cache)

  @functools.cached_property
  def files(self) -> ts.KvStore:
    """Returns the files by name; a write replaces a file in one step and is then on disk."""
    return ts.KvStore.open(self.spec(), context=self.context).result()

  def read(self, name: str) -> bytes | None:
    """Returns the content of a file, None where there is none."""
    result = self.files.read(name).result()
    return result.value if result.state == "value" else None

  def open_array(self, name: str, metadata: dict | None = None, **options: Any) -> ts.TensorStore:
    """Opens an array of the store."""
    spec = {
      "driver": "zarr3",
      **({"metadata": metadata} if metadata else {}),
      "kvstore": self.spec(f"{name}/"),
      "fill_missing_data_reads": False,
      "store_data_equal_to_fill_value": True,
      "recheck_cached_data": False,
      "recheck_cached_metadata": False,
    }
    return ts.open(spec, context=self.context, **options).result()

  def create_array(self, name: str, dtype: np.dtype, shard: int) -> ts.TensorStore:
    """Creates an array without a size yet, in place of a former one."""
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard]}}
    sharding = {
      "chunk_shape": [min(CHUNK, shard)],
      "codecs": _CODECS,
      "index_codecs": _CODECS,
    }
    metadata = {
      "data_type": np.dtype(dtype).name,
      "shape": [1 << 50],  # until `ArrayWriter.finish`
      "chunk_grid": grid,
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return self.open_array(name, metadata, create=True, delete_existing=True)


def read_spans(
  array: ts.TensorStore, starts: Iterable[int], sizes: Iterable[int]
) -> list[np.ndarray]:
  """Returns the elements from each start on, read at the same time.

  Raises UserError that names the file where one is missing or damaged.
  """
  try:
    reads = [array[start : start + size].read() for start, size in zip(starts, sizes)]
    return [read.result() for read in reads]
  except ValueError as error:
    raise UserError(f"damaged token store: {error}") from error


def read_blocks(array: ts.TensorStore, start: int = 0) -> Iterator[np.ndarray]:
  """Yields the elements from `start` on in blocks of bounded size."""
  for begin in range(start, array.shape[0], READ_BLOCK):
    yield read_spans(array, [begin], [min(READ_BLOCK, array.shape[0] - begin)])[0]


class ArrayWriter:
  """Appends to an array; holds what is not yet a whole shard until `flush` or `finish`."""

  def __init__(self, place: Place, name: str, dtype: np.dtype, shard: int, state: dict) -> None:
    """Goes on from a `state` that was given after a `flush`; an empty one begins anew."""
    self.size: int = state.get("size", 0)
    if self.size:
      self.array = place.open_array(name, open=True)
    else:
      self.array = place.create_array(name, dtype, shard)
    self.buffer = np.empty(_shard_and_chunk(self.array)[0], dtype)
    filled = self.size % len(self.buffer)
    if filled:
      self.buffer[:filled] = read_spans(self.array, [self.size - filled], [filled])[0]
    block = self.size // DIGEST_BLOCK * DIGEST_BLOCK
    self.digest = ChainDigest(self.buffer.dtype, state.get("chain", ""))
    if block < self.size:
      self.digest.update(read_spans(self.array, [block], [self.size - block])[0])

  def append(self, values: np.ndarray) -> None:
    """Appends values; writes each shard that they fill."""
    self.digest.update(values)
    while len(values):
      start = self.size % len(self.buffer)
      part = values[: len(self.buffer) - start]
      self.buffer[start : start + len(part)] = part
      self.size += len(part)
      if start + len(part) == len(self.buffer):
        self._write(len(self.buffer))
      values = values[len(part) :]

  def flush(self) -> dict[str, Any]:
    """Writes what is held and returns the state to go on from."""
    self._write(self.size % len(self.buffer))
    return {"size": self.size, "chain": self.digest.chain}

  def finish(self) -> dict[str, Any]:
    """Writes what is held, sets the size of the array, and returns size and digest."""
    self._write(self.size % len(self.buffer))
    self.array.resize(exclusive_max=[self.size], resize_metadata_only=True).result()
    return {"size": self.size, "digest": self.digest.hexdigest()}

  def _write(self, filled: int) -> None:
    if filled:
      self.array[self.size - filled : self.size].write(self.buffer[:filled]).result()


class ChainDigest:
  """Digests whole numbers in a chain of blocks, so that it can go on from the state of a few bytes.

  The digest depends on the numbers alone, not on how they come in parts: link n is SHA-256 of link
  n - 1 and block n, as little-endian int64, or uint32 for numbers of an unsigned type up to that.
  """

  def __init__(self, dtype: np.dtype, chain: str = "") -> None:
    self.chain = chain
    """The link of all whole blocks so far, in hexadecimal."""
    self.block = np.empty(DIGEST_BLOCK, "<u4" if np.can_cast(dtype, np.uint32) else "<i8")
    self.filled = 0

  def update(self, values: np.ndarray) -> None:
    """Adds values to what is digested."""
    while len(values):
      part = values[: DIGEST_BLOCK - self.filled]
      self.block[self.filled : self.filled + len(part)] = part
      self.filled += len(part)
      values = values[len(part) :]
      if self.filled == DIGEST_BLOCK:
        self.chain, self.filled = self.hexdigest(), 0

  def hexdigest(self) -> str:
    """Returns the digest of all values so far."""
    link = hashlib.sha256(bytes.fromhex(self.chain))
    link.update(self.block[: self.filled].data)
    return link.hexdigest()


def digest(value: Any) -> str:
  """Returns a digest of a value of JSON, 32 hexadecimal digits of BLAKE2b."""
  text = json.dumps(value, sort_keys=True)  # ASCII, whatever file names hold
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_array(array: ts.TensorStore) -> str:
  """Returns the digest of all elements, read block by block."""
  digest = ChainDigest(array.dtype.numpy_dtype)
  for block in read_blocks(array):
    digest.update(block)
  return digest.hexdigest()


def missing_shards(place: Place, name: str, array: ts.TensorStore) -> list[str]:
  """Returns the names of shards that are missing or shorter than they were written."""
  shard, chunk = _shard_and_chunk(array)
  size, width = array.shape[0], array.dtype.numpy_dtype.itemsize
  reads = []
  for index, start in enumerate(range(0, size, shard)):
    chunks = -(-min(shard, size - start) // chunk)
    length = chunks * (chunk * width + CHECKSUM) + shard // chunk * 16 + CHECKSUM
    file = f"{name}/c/{index}"
    reads.append((file, place.files.read(file, byte_range=slice(length - 1, length))))
  return [file for file, read in reads if not _has_value(read)]


def _shard_and_chunk(array: ts.TensorStore) -> tuple[int, int]:
  shard, chunk = array.chunk_layout.write_chunk.shape, array.chunk_layout.read_chunk.shape
  assert shard and chunk and shard[0] and chunk[0]
  return shard[0], chunk[0]


def _has_value(read: ts.Future) -> bool:
  try:
    return read.result().state == "value"
  except ValueError:  # beyond the end of the file
    return False
