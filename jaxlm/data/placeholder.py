"""Recognises files that stand where another file should be, by their first bytes."""

from __future__ import annotations

import codecs
from typing import NamedTuple

HEAD = 1024
"""Bytes that `find_placeholder` needs to see."""


class Placeholder(NamedTuple):
  """Says what a file is in the place of the one that was asked for."""

  kind: str
  """what such files are, in the plural"""
  description: str
  """what it is, and what to do about it"""


HTML_PAGES = "HTML pages"
_POINTERS = "pointers to files that are elsewhere"
_LFS = Placeholder(_POINTERS, "a Git LFS pointer (`git lfs pull` fetches the file)")
_ANNEX = Placeholder(_POINTERS, "a git-annex pointer (`git annex get` fetches the file)")
_PAGE = Placeholder(HTML_PAGES, "an HTML page")
_EMPTY = Placeholder("damaged files", "an empty file, as a download leaves that was cut off")
_ERROR = Placeholder("error messages of a server", "an error message of a server")
_STARTS = {
  b"version https://git-lfs.": _LFS,
  b"/annex/objects/": _ANNEX,
  b"<!doctype html": _PAGE,
  b"<html": _PAGE,
}


def find_placeholder(head: bytes) -> Placeholder | None:
  """Returns what a file with these first bytes is in the place of another; None for other content.

  That is a pointer of Git LFS or git-annex, an HTML page or an error message of a server, or an
  empty file.
  """
  if not head:
    return _EMPTY
  start = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").lower()
  if start.startswith(b"<?xml") and b"<error>" in start:
    return _ERROR
  return next((what for prefix, what in _STARTS.items() if start.startswith(prefix)), None)
