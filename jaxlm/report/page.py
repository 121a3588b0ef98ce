"""Writes the two pages as HTML that needs nothing but itself: style, script and pictures inside."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxlm.report.papers import Mention, by_paper, mentions
from jaxlm.report.studies import NOT_RUN, StudyPage, read_studies


def write_report(studies: Path, root: Path, out: Path) -> list[Path]:
  """Writes index.html (studies) and papers.html (papers) into `out`; returns their paths.

  `root` is the checkout whose docstrings are read.
  """
  pages = read_studies(studies)
  out.mkdir(parents=True, exist_ok=True)
  written = {"index.html": studies_page(pages), "papers.html": papers_page(mentions(root), pages)}
  for name, text in written.items():
    (out / name).write_text(text)
  return [out / name for name in written]


def studies_page(pages: Sequence[StudyPage]) -> str:
  """Returns the page of all studies: a sortable table, then each study in full."""
  rows = []
  for page in pages:
    for result in page.results or [{}]:
      link = f'<a href="#{_text(page.texts["name"])}">{_text(page.texts["title"])}</a>'
      rows.append(
        [
          link,
          _text(page.texts["claim"]),
          _text(page.texts["published"]),
          _measured(result) if result else "",
          _badge(result["verdict"] if result else NOT_RUN),
          _text(result["hardware"] if result else ""),
        ]
      )
  columns = ("study", "claim", "published", "ours", "verdict", "hardware")
  body = [
    "<h1>Studies</h1>",
    "<p>Each study states its claim and what would refute it before it is run; the verdict is "
    'computed from its table. <a href="papers.html">Papers that the code implements</a>. '
    "A click on a column's head sorts.</p>",
    _table(columns, rows, "summary"),
    *(_study(page) for page in pages),
  ]
  return _document("Studies", body)


def papers_page(found: Sequence[Mention], pages: Sequence[StudyPage]) -> str:
  """Returns the page of all papers: a row for each place in the code that names one."""
  rows = []
  for paper, places in by_paper(list(found)).items():
    studies = [page for page in pages if paper in page.papers]
    links = ", ".join(
      f'<a href="index.html#{_text(p.texts["name"])}">{_text(p.texts["name"])}</a>' for p in studies
    )
    verdicts = " ".join(_badge(page.verdict) for page in studies)
    for place in places:
      rows.append(
        [
          f'<a href="https://arxiv.org/abs/{paper}">{paper}</a>',
          f"<code>{_text(place.name)}</code><br>{_path(f'{place.file}:{place.line}')}",
          _text(place.place),
          _text(place.sentence),
          _path(place.test),
          links,
          verdicts,
        ]
      )
  columns = ("paper", "code", "equation", "what the docstring says", "test", "study", "verdict")
  count = len({place.paper for place in found})
  body = [
    "<h1>Papers that the code implements</h1>",
    f'<p>{count} papers, read from the docstrings. <a href="index.html">Studies</a>. A click on a '
    "column's head sorts.</p>",
    _table(columns, rows, "papers"),
  ]
  return _document("Papers", body)


def _study(page: StudyPage) -> str:
  texts = page.texts
  parts = [
    f'<section id="{_text(texts["name"])}"><h2>{_text(texts["title"])}</h2>',
    f"<p><b>Claim.</b> {_text(texts['claim'])} ({_papers(texts['source'])})",
    f"<p><b>Published.</b> {_text(texts['published'])}",
    f"<details><summary>Setting, verdicts decided beforehand, limits</summary>"
    f"<p><b>Setting.</b> {_text(texts['setting'])}"
    f"<p><b>Verdicts.</b> {_text(texts['refuted_by'])}"
    f"<p><b>What this cannot show.</b> {_text(texts['cannot_show'])}</details>",
  ]
  for result in page.results:
    parts += _result(page, result)
  if not page.results:
    parts.append(f"<p>{_badge(NOT_RUN)}")
  return "\n".join([*parts, "</section>"])


def _result(page: StudyPage, result: dict[str, Any]) -> list[str]:
  figure = page.figure(result)
  alt = _text(page.texts["title"])
  parts = [
    f"<h3>{_badge(result['verdict'])} {_measured(result)}</h3>",
    f"<p>{_text(result['why'])}",
    f'<figure><img alt="{alt}" src="{figure}"></figure>' if figure else "",
    "<ul>" + "".join(f"<li>{_text(line)}" for line in result["lines"]) + "</ul>",
    f"<p class=command><code>{_text(result['command'])}</code><br>{result['runs']} runs, "
    f"{result['diverged']} diverged, {result['minutes']} minutes; {_text(result['hardware'])}; "
    f"{_text(result['versions'])}; commit {_text(result['commit'])}",
  ]
  names, rows = page.rows(result)
  cells = [[_text(_short(cell)) for cell in row] for row in rows]
  table = _table([_text(name) for name in names], cells, "runs")
  parts.append(f"<details><summary>All {len(rows)} runs</summary>{table}</details>")
  return parts


def _measured(result: dict[str, Any]) -> str:
  interval = f" <small>({_text(result['interval'])})</small>" if result["interval"] else ""
  return _text(result["ours"]) + interval


def _badge(verdict: str) -> str:
  kind = re.sub(r"\W+", "-", verdict.partition(";")[0])
  return f'<span class="verdict {kind}">{_text(verdict)}</span>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
  """Returns a table whose heads are buttons; on a narrow screen it scrolls, or stacks its cells."""
  head = "".join(
    f'<th aria-sort="none"><button type="button">{column}</button></th>' for column in columns
  )
  body = "\n".join(
    "<tr>"
    + "".join(f'<td data-column="{name}">{cell}</td>' for name, cell in zip(columns, row))
    + "</tr>"
    for row in rows
  )
  return (
    f'<div class=scroll><table class="{kind}"><thead><tr>{head}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _text(text: str) -> str:
  """Returns text as HTML; what stands in backticks is code."""
  return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _path(path: str) -> str:
  """Returns a path as HTML that breaks between its parts."""
  return _text(path).replace("/", "/<wbr>")


def _papers(source: str) -> str:
  """Returns a source with its arXiv numbers as links."""
  pattern = r"arXiv:(\d{4}\.\d{4,5})"
  return re.sub(pattern, r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', _text(source))


def _short(cell: str) -> str:
  """Returns a number with six digits, other cells as they are."""
  try:
    number = float(cell)
  except ValueError:
    return cell
  return cell if number.is_integer() and "e" not in cell.lower() else f"{number:.6g}"


def _document(title: str, body: Iterable[str]) -> str:
  files = resources.files("jaxlm.report")
  style, script = ((files / name).read_text() for name in ("style.css", "sort.js"))
  return "\n".join(
    [
      "<!doctype html>",
      '<html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<link rel="icon" href="data:,">',
      f"<title>jaxlm: {title}</title><style>{style}</style></head><body><main>",
      *body,
      f"</main><script>{script}</script></body></html>\n",
    ]
  )
