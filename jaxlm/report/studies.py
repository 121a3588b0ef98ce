"""Reads the studies of a folder as `experiments/study.py` leaves them: study.json and its files."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxlm.config import check
from jaxlm.report.papers import PAPER
from pallas_kernels.common.errors import UserError

NOT_RUN = "not run"
TEXTS = ("name", "title", "source", "claim", "published", "setting", "refuted_by", "cannot_show")
RESULTS = (
  *("scale", "ours", "interval", "verdict", "why", "lines", "table", "figure"),
  *("command", "runs", "diverged", "minutes", "commit", "hardware", "versions"),
)


@dataclasses.dataclass(frozen=True)
class StudyPage:
  """Holds the texts of a study and what its tables said."""

  folder: Path
  texts: dict[str, str]
  results: list[dict[str, Any]]

  @property
  def papers(self) -> list[str]:
    """Returns arXiv's numbers in the study's source."""
    return PAPER.findall(self.texts["source"])

  @property
  def verdict(self) -> str:
    """Returns the verdicts of all scales, or that there is none."""
    return "; ".join(result["verdict"] for result in self.results) or NOT_RUN

  def figure(self, result: dict[str, Any]) -> str:
    """Returns the figure as a data URI, or "" where there is none."""
    if not result["figure"]:
      return ""
    data = (self.folder / result["figure"]).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"

  def rows(self, result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns names and cells of the table's columns that are not the same in every row."""
    with (self.folder / result["table"]).open(newline="") as file:
      names, *rows = csv.reader(file)
    varied = [i for i, name in enumerate(names) if len({row[i] for row in rows}) > 1]
    varied = [i for i in varied if names[i] != "config"]
    return [names[i] for i in varied], [[row[i] for i in varied] for row in rows]


def read_studies(folder: Path) -> list[StudyPage]:
  """Returns the studies in the folders below `folder`; raises UserError for one that is damaged."""
  pages = []
  for path in sorted(folder.glob("*/study.json")):
    try:
      page = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f"{path}: is not JSON: {error}") from error
    missing = [name for name in (*TEXTS, "results") if name not in page]
    results = page.get("results", [])
    missing += [name for name in RESULTS for result in results if name not in result]
    check(not missing, str(path), ", ".join(missing), "missing; run.py --plot writes it anew")
    pages.append(StudyPage(path.parent, {name: page[name] for name in TEXTS}, results))
  check(len(pages) > 0, "studies", str(folder), "has no folder with a study.json")
  return pages
