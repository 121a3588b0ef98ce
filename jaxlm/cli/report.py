"""Defines `jaxlm report`: one page of all studies, one of all papers that the code implements."""

from __future__ import annotations

from pathlib import Path

import tyro


def report(
  studies: tyro.conf.Positional[Path] = Path("experiments"), out: Path = Path("build/report")
) -> int:
  """Write index.html (all studies) and papers.html (all papers in docstrings) into a folder.

  Both need nothing but themselves: no server, no requests.

  Args:
    studies: folder whose folders hold a study.json each
    out: folder for the pages
  """
  import jaxlm
  from jaxlm.report.page import write_report

  for path in write_report(studies, Path(jaxlm.__file__).parents[1], out):
    print(f"wrote {path}")
  return 0
