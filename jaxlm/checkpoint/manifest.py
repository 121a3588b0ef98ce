"""Writes sizes and checksums of a checkpoint's files last of all, and verifies them before loading.

Orbax loads an array file with a flipped bit without complaint, as wrong numbers. A folder without
a manifest is incomplete, because the manifest is the last thing written to it. Checksums are CRC-32
of pieces: they guard against decay (any flipped bit, any burst up to 32 bits, all but one in 4e9 of
the rest), not against malice, and are several times faster than cryptographic digests, so that
verifying costs a fraction of restoring.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.atomic import TEMPORARY, write_text
from jaxlm.paths import left_by_system
from pallas_kernels.common.errors import UserError

NAME = "manifest.json"
FORMAT = 1
PIECE = 1 << 24
"""bytes that one checksum covers; pieces are read in parallel"""
_BUFFER = 1 << 18  # bytes; stays in the processor's cache
_THREADS = 4


class NewerFormat(UserError):
  """Raised for a manifest that a later version of this project wrote."""


def write_manifest(folder: Path) -> None:
  """Writes `manifest.json` with size and checksums of every file below `folder`, atomically.

  An interruption leaves no manifest (or the former one), never half of one. Raises OSError when a
  file cannot be read or the manifest cannot be written.
  """
  paths = _files(folder)
  sizes = {name: path.stat().st_size for name, path in paths.items()}
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = {
      name: pool.map(functools.partial(_checksum, paths[name]), _pieces(sizes[name]))
      for name in paths
    }
    files = {name: [sizes[name], list(sums[name])] for name in paths}
  write_text(
    folder / NAME,
    json.dumps({"format": FORMAT, "digest": _digest_of(files), "files": files}, indent=1),
  )


def verify(folder: Path) -> list[str]:
  """Returns one line "file: what differs" per fault, none if all is as the manifest says.

  Files that the manifest does not list are others' and no fault: nothing reads them. Compares
  names and sizes first and reads contents only when those agree, so that a truncation is found at
  once.
  """
  try:
    files = _read(folder)
  except FileNotFoundError:
    return [f"{NAME}: missing, the folder is incomplete"]
  except (OSError, ValueError) as error:
    return [f"{NAME}: {error}"]
  paths = _files(folder)
  missing = [name for name in sorted(files.keys() - paths.keys()) if not _is_foreign(name)]
  faults = [f"{name}: missing" for name in missing]
  common = sorted(paths.keys() & files.keys())
  sizes = [(name, paths[name].stat().st_size, files[name][0]) for name in common]
  faults += [
    f"{name}: size {size}, the manifest says {want}" for name, size, want in sizes if size != want
  ]
  if faults:
    return faults
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    faults_of = {
      name: pool.map(
        functools.partial(_piece_fault, paths[name]), _pieces(files[name][0]), files[name][1]
      )
      for name in common
    }
    return [f"{name}: {fault}" for name in common for fault in faults_of[name] if fault]


def refuse_newer(folder: Path) -> None:
  """Raises NewerFormat where a checkpoint is not damaged but newer than this version."""
  try:
    _read(folder)
  except NewerFormat as error:
    raise NewerFormat(
      f"{folder / NAME}: {error}; a newer jaxlm wrote this checkpoint, use that one"
    ) from None
  except (OSError, ValueError):
    return


def _files(folder: Path) -> dict[str, Path]:
  """Returns relative name -> path of every file below `folder` that belongs to a checkpoint.

  That is neither the manifest itself nor anything that the system dropped there.
  """
  files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  paths = {path.relative_to(folder).as_posix(): path for path in files}
  return {
    name: path
    for name, path in paths.items()
    if name not in (NAME, NAME + TEMPORARY) and not _is_foreign(name)
  }


def _is_foreign(name: str) -> bool:
  return any(map(left_by_system, name.split("/")))


def _pieces(size: int) -> range:
  """Returns where the pieces of a file begin."""
  return range(0, size, PIECE)


def _checksum(path: Path, start: int) -> str:
  """Returns the CRC-32 of the piece from `start` on, as 8 hexadecimal digits."""
  checksum, left, buffer = 0, PIECE, memoryview(bytearray(_BUFFER))
  with open(path, "rb", buffering=0) as file:
    file.seek(start)
    while left and (count := file.readinto(buffer[:left])):
      checksum = zlib.crc32(buffer[:count], checksum)
      left -= count
  return f"{checksum:08x}"


def _piece_fault(path: Path, start: int, want: str) -> str | None:
  try:
    checksum = _checksum(path, start)
  except OSError as error:
    return f"cannot be read ({error})"
  end = min(start + PIECE, path.stat().st_size) - 1
  return (
    None
    if checksum == want
    else f"bytes {start}-{end} have checksum {checksum}, the manifest says {want}"
  )


def _digest_of(files: dict[str, Any]) -> str:
  """Digests the manifest's own entries, so that its decay is not blamed on the files it lists."""
  return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
  """Returns the manifest's entries; raises ValueError when it is damaged or of a newer format."""
  try:
    manifest = json.loads((folder / NAME).read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"unreadable ({error})") from None
  version = manifest.get("format") if isinstance(manifest, dict) else None
  if not isinstance(version, int) or version < 1:
    raise ValueError("unreadable (it has no format number)")
  if version > FORMAT:
    raise NewerFormat(f"of format {version}, this version reads format {FORMAT}")
  if not isinstance(manifest.get("files"), dict) or manifest.get("digest") != _digest_of(
    manifest["files"]
  ):
    raise ValueError("damaged (its entries do not match its own digest)")
  return manifest["files"]
