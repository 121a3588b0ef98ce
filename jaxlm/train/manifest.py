"""Integrity of a checkpoint folder: sizes and digests of its files, written last and checked before loading.

Orbax loads an array file with a flipped bit without complaint, as wrong numbers. A folder without a manifest is
incomplete, because the manifest is the last thing written to it. Digests guard against decay, not against malice.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from pathlib import Path
from typing import Any

from jaxlm.train.atomic import TEMPORARY, write_text

NAME = "manifest.json"
FORMAT = 1
_THREADS = 4


def write_manifest(folder: Path) -> None:
  """Writes `manifest.json` with the size and blake2b digest of every file below `folder`, atomically.

  An interruption leaves no manifest (or the former one), never half of one. Raises OSError when a file cannot be read
  or the manifest cannot be written.
  """
  paths = _files(folder)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    files = dict(zip(paths, pool.map(_size_and_digest, paths.values())))
  write_text(folder / NAME, json.dumps({"format": FORMAT, "digest": _digest_of(files), "files": files}, indent=1))


def verify(folder: Path) -> list[str]:
  """Empty if every file below `folder` is as the manifest says, else one line per fault: "file: what differs".

  Names and sizes come first; contents are read only when those agree, so a truncation is found at once.
  """
  try:
    files = _read(folder)
  except FileNotFoundError:
    return [f"{NAME}: missing, the folder is incomplete"]
  except (OSError, ValueError) as error:
    return [f"{NAME}: {error}"]
  paths = _files(folder)
  faults = [f"{name}: missing" for name in sorted(files.keys() - paths.keys())]
  faults += [f"{name}: surplus, not in the manifest" for name in sorted(paths.keys() - files.keys())]
  common = sorted(paths.keys() & files.keys())
  sizes = [(name, paths[name].stat().st_size, files[name][0]) for name in common]
  faults += [f"{name}: size {size}, the manifest says {want}" for name, size, want in sizes if size != want]
  if faults:
    return faults
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    found = pool.map(lambda name: _content_fault(paths[name], files[name][1]), common)
    return [f"{name}: {fault}" for name, fault in zip(common, found) if fault]


def _files(folder: Path) -> dict[str, Path]:
  """Relative name -> path of every file below `folder` except the manifest itself."""
  paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
  return {name: path for name, path in paths.items() if name not in (NAME, NAME + TEMPORARY)}


def _size_and_digest(path: Path) -> list[Any]:
  with open(path, "rb", buffering=0) as file:
    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return [file.tell(), digest]


def _content_fault(path: Path, want: str) -> str | None:
  try:
    _, digest = _size_and_digest(path)
  except OSError as error:
    return f"cannot be read ({error})"
  return None if digest == want else f"digest {digest[:16]}..., the manifest says {want[:16]}..."


def _digest_of(files: dict[str, Any]) -> str:
  """The manifest guards its own entries, so that its decay is not blamed on the files it lists."""
  return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
  """The manifest's entries; ValueError when it is damaged or of a newer format."""
  try:
    manifest = json.loads((folder / NAME).read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"unreadable ({error})") from None
  version = manifest.get("format") if isinstance(manifest, dict) else None
  if not isinstance(version, int) or version < 1:
    raise ValueError("unreadable (it has no format number)")
  if version > FORMAT:
    raise ValueError(f"of format {version}, this version reads up to {FORMAT}")
  if not isinstance(manifest.get("files"), dict) or manifest.get("digest") != _digest_of(manifest["files"]):
    raise ValueError("damaged (its entries do not match its own digest)")
  return manifest["files"]
