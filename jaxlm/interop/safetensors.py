"""Reads and writes safetensors files; checks every claim of a header before it allocates.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length n, n bytes of JSON
that map each name to dtype, shape and data_offsets, then the data, whose ranges follow each other
without gap or overlap.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.data.placeholder import HEAD, find_placeholder
from jaxlm.interop.strict_json import parse_object
from pallas_kernels.common.errors import UserError

DTYPES: dict[str, np.dtype] = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types that weights are read in and written in."""
OTHER_DTYPES: dict[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
  **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
  "BOOL": np.dtype(np.bool_),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Types of buffers and of quantized weights, which are found and not read."""
_KNOWN = DTYPES | OTHER_DTYPES
# A parsed header takes about 13 times its bytes. The headers of published checkpoints are under a
# thousandth of their files.
HEADER_BYTES, HEADER_SHARE = 1 << 20, 1 / 16


class Entry(NamedTuple):
  """Holds dtype and shape of a tensor, and where it lies: bytes start .. stop of its file."""

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int


def read_header(path: Path) -> dict[str, Entry]:
  """Returns the tensors of a file by name.

  Raises UserError, naming file, tensor and rule, for a damaged header.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    head = file.read(HEAD)
    if (placeholder := find_placeholder(head)) is not None:
      raise UserError(f"{path}: is {placeholder.description}")
    length_bytes = head[:8]
    file.seek(8)
    if len(length_bytes) < 8:
      rule = "a safetensors file begins with 8 bytes of header length"
      raise UserError(f"{path}: {size} bytes, but {rule}")
    (length,) = struct.unpack("<Q", length_bytes)
    if length > size - 8:
      raise UserError(f"{path}: header of {length:,} bytes, but the file has {size:,}")
    if length > max(HEADER_BYTES, HEADER_SHARE * size):
      rule = f"over {HEADER_BYTES:,} and {HEADER_SHARE} of the file"
      raise UserError(f"{path}: header of {length:,} bytes, {rule}")
    header = parse_object(file.read(length), f"{path}: header")
  _check_metadata(header.pop("__metadata__", {}), path)
  entries = {name: _parse_entry(name, value, path, 8 + length) for name, value in header.items()}
  _check_ranges(entries, path, 8 + length, size)
  return entries


def _check_metadata(metadata: Any, path: Path) -> None:
  good = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
  if not good:
    raise UserError(f"{path}: __metadata__ must map names to strings")


def _parse_entry(name: str, value: Any, path: Path, data_start: int) -> Entry:
  where = f"{path}: tensor {name[:200]!r}"
  if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
    raise UserError(f"{where}: must have dtype, shape and data_offsets, and nothing else")
  dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
  if not isinstance(dtype, str) or dtype not in _KNOWN:
    raise UserError(f"{where}: dtype {str(dtype)[:50]!r} is not one of {', '.join(_KNOWN)}")
  if not _are_sizes(shape) or len(shape) > 8:
    raise UserError(f"{where}: shape must be a list of at most 8 integers from 0 to 2^48")
  if not _are_sizes(offsets) or len(offsets) != 2:
    raise UserError(f"{where}: data_offsets must be two integers from 0 to 2^48")
  start, stop = offsets
  need = math.prod(shape) * _KNOWN[dtype].itemsize
  if stop - start != need:
    spanned = f"data_offsets {offsets} span {stop - start} bytes"
    raise UserError(f"{where}: {spanned}, {dtype} {shape} takes {need}")
  return Entry(path, _KNOWN[dtype], tuple(shape), data_start + start, data_start + stop)


def _are_sizes(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(value) is int and 0 <= value <= 1 << 48 for value in values
  )


def _check_ranges(entries: Mapping[str, Entry], path: Path, data_start: int, size: int) -> None:
  end = data_start
  for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
    where = f"{path}: tensor {name[:200]!r}"
    begin = f"data_offsets begin at {entry.start - data_start}"
    if entry.start < end:
      raise UserError(f"{where}: {begin}, which overlaps the tensor before it")
    if entry.start > end:
      raise UserError(f"{where}: {begin}, which leaves {entry.start - end} bytes unused")
    if entry.stop > size:
      fault = f"ends at byte {entry.stop}, the file has {size}: is it truncated?"
      raise UserError(f"{where}: {fault}")
    end = entry.stop
  if end != size:
    raise UserError(f"{path}: {size - end} bytes after the last tensor")


class MappedFile:
  """Maps a file into memory; its pages can be released after use."""

  def __init__(self, path: Path):
    with path.open("rb") as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def view(self, entry: Entry) -> np.ndarray:
    """Returns the tensor, read-only, without a copy."""
    flat = np.frombuffer(self._map, np.uint8, entry.stop - entry.start, entry.start)
    return flat.view(entry.dtype).reshape(entry.shape)

  def advise(self, entry: Entry, advice: str) -> None:
    """Tells the system to read a tensor ahead ("WILLNEED") or to drop its pages ("DONTNEED")."""
    option = getattr(mmap, f"MADV_{advice}", None)
    if option is not None:  # Linux and most of the BSDs
      first = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
      self._map.madvise(option, first, entry.stop - first)


def write(
  path: Path,
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes `tensors` (name -> dtype, shape) in their order, one `read(name)` at a time."""
  names = {dtype: name for name, dtype in _KNOWN.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, (dtype, shape) in tensors.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (dtype, shape) in tensors.items():
      values = np.ascontiguousarray(read(name))
      assert values.dtype == dtype and values.shape == shape, name
      file.write(values.reshape(-1).view(np.uint8).data)
