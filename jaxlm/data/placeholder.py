"""Recognises files that stand where another file should be, by their first bytes."""

from __future__ import annotations

import codecs
from pathlib import Path

HEAD = 1024
"""Bytes that `describe_placeholder` needs to see."""

_POINTERS = {
  b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; `git lfs pull` fetches the file",
  b"version https://hawser.github.com/spec/": "a Git LFS pointer; `git lfs pull` fetches the file",
  b"/annex/objects/": "a git-annex pointer; `git annex get` fetches the file",
  b"../../.git/annex/objects/": "a git-annex pointer; `git annex get` fetches the file",
}
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<!--")


def describe_placeholder(head: bytes) -> str | None:
  """Returns what a file with these first bytes is in the place of the one that was asked for.

  That is a pointer of Git LFS or git-annex, an HTML page or an error message of a server, or an
  empty file; None for every other content.
  """
  start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
  if not head:
    return "an empty file: a download or a copy that was cut off"
  for prefix, description in _POINTERS.items():
    if start.startswith(prefix):
      return description
  if start.startswith(_PAGES):
    return "an HTML page, which a server sent in place of the file"
  if start.startswith(b"<?xml") and b"<error>" in start:
    return "an error message of a server in place of the file"
  return None


def describe_placeholder_file(path: Path) -> str | None:
  """Does what `describe_placeholder` does, given the file."""
  with path.open("rb") as file:
    return describe_placeholder(file.read(HEAD))
