"""Lists the papers that the code implements, from the sources that its docstrings name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGES = ("pallas_kernels", "sharding", "jaxlm")
PAPER = re.compile(r"\barxiv[: ]\s*(\d{4}\.\d{4,5})", re.IGNORECASE)
_PLACE = re.compile(
  r"^[,;]?\s*((?:sections?|eq\.|equations?|tables?|appendix|figures?|algorithms?)\s+"
  r"[\w.]*\w(?:\s*(?:and|to|,)\s*(?:(?:sections?|eq\.|equations?|tables?)\s+)?\d[\w.]*)*)",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Mention:
  """Holds one place in the code that names a paper as its source."""

  paper: str
  """arXiv's number"""
  file: str
  line: int
  name: str
  """of the function, class, constant or module"""
  place: str
  """section or equation, where it is said"""
  sentence: str
  test: str
  """file that tests the module, if there is one"""


def mentions(root: Path) -> list[Mention]:
  """Returns every mention of a paper in docstrings and other strings of a checkout's packages."""
  found = []
  for package in PACKAGES:
    for path in sorted((root / package).rglob("*.py")):
      file = path.relative_to(root).as_posix()
      for line, name, text in _strings(ast.parse(path.read_text()), path.stem):
        text = " ".join(text.split())
        for match in PAPER.finditer(text):
          place = _PLACE.match(text[match.end() :])
          found.append(
            Mention(
              match[1],
              file,
              line,
              name,
              place[1].rstrip(".") if place else "",
              _sentence(text, match.start()),
              _test_of(root, path),
            )
          )
  return sorted(set(found), key=lambda m: (m.paper, m.file, m.line))


def by_paper(found: list[Mention]) -> Mapping[str, list[Mention]]:
  """Returns the mentions of each paper, the newest paper first."""
  papers: dict[str, list[Mention]] = {}
  for mention in found:
    papers.setdefault(mention.paper, []).append(mention)
  return dict(sorted(papers.items(), reverse=True))


def _strings(tree: ast.AST, name: str) -> Iterator[tuple[int, str, str]]:
  """Yields (line, name of what holds it, text) of every string, docstrings included."""
  for node in ast.iter_child_nodes(tree):
    inner = name
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      inner = node.name
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      inner = node.targets[0].id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, name, node.value
    yield from _strings(node, inner)


def _sentence(text: str, at: int) -> str:
  """Returns the sentence around a place in the text."""
  ends = [m.end() for m in re.finditer(r"(?<![A-Z])(?<!\beq)(?<!\bal)\.\s+(?=[A-Z])", text)]
  start = max((end for end in ends if end <= at), default=0)
  stop = min((end for end in ends if end > at), default=len(text))
  return text[start:stop].strip()


@functools.cache
def _test_of(root: Path, path: Path) -> str:
  """Returns the test of a module: its mirror, or the first test that imports it or its package."""
  mirror = root / "tests" / path.relative_to(root).with_name(f"{path.stem}_test.py")
  if mirror.is_file():
    return mirror.relative_to(root).as_posix()
  parts = path.relative_to(root).with_suffix("").parts
  for names in (parts, parts[:-1]):
    module = ".".join(names)
    line = re.compile(rf"^(?:from {re.escape(module)} |import {re.escape(module)}\b)", re.M)
    above = re.compile(rf"^from {re.escape('.'.join(names[:-1]))} import .*\b{names[-1]}\b", re.M)
    near = root / "tests" / path.relative_to(root).parent
    for test in (*sorted(near.rglob("*_test.py")), *sorted((root / "tests").rglob("*_test.py"))):
      text = test.read_text()
      if line.search(text) or above.search(text):
        return test.relative_to(root).as_posix()
  return ""
