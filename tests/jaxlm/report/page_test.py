"""The pages of `jaxlm report`: whole, self-contained, escaped, and linked with each other."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxlm.cli import main
from jaxlm.report.page import write_report

ROOT = Path(__file__).parents[3]
VOID = {"meta", "link", "br", "wbr", "img"}
CLOSED_BY_NEXT = {"p", "li"}


class Page(HTMLParser):
  """Collects elements, links, texts by element, and whether all elements are closed in order."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.starts, self.faults, self.texts = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.starts.append((tag, dict(attributes)))
    if tag not in VOID | CLOSED_BY_NEXT:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in CLOSED_BY_NEXT and (not self.open or self.open.pop() != tag):
      self.faults.append((tag, self.getpos()))

  def handle_data(self, data):
    self.texts.append(data)

  def attributes(self, tag, name):
    return [found[name] for kind, found in self.starts if kind == tag and name in found]


@pytest.fixture(scope="module")
def pages(studies, tmp_path_factory):
  paths = write_report(studies, ROOT, tmp_path_factory.mktemp("report"))
  return {path.name: Page(path.read_text()) for path in paths}


def test_every_element_is_closed_and_nothing_is_fetched(pages):
  for page in pages.values():
    assert not page.faults and not page.open
    sources = page.attributes("img", "src")
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.attributes("link", "href") == ["data:,"] and not page.attributes("script", "src")
    for style in page.texts:
      assert "url(" not in style and "@import" not in style
    assert page.attributes("meta", "content") == ["width=device-width, initial-scale=1"]
    for link in page.attributes("a", "href"):
      local = link.startswith("#") or link.partition("#")[0] in pages
      assert local or link.startswith("https://arxiv.org/abs/")


def test_a_study_shows_claim_numbers_verdict_figure_table_and_command(pages):
  page = pages["index.html"]
  text = "".join(page.texts)
  for part in ("Valleys & hills", "A <script>alert(1)</script> claim with code", "0.50"):
    assert part in text
  for part in ("a = 0.52", "(0.4 to 0.6)", "direction only", "The reason.", "second line"):
    assert part in text
  for part in ("experiments.valleys.run --cpu", "abc123", "2 cores of something", "not run"):
    assert part in text
  assert len(page.attributes("img", "src")) == 1 and len(page.attributes("section", "id")) == 2
  heads = text[text.index("All 3 runs") :]
  assert "10.25" in heads and "model.D" not in heads and "config" not in heads.partition("for")[0]


def test_every_head_sorts(pages):
  for page in pages.values():
    heads = page.attributes("th", "aria-sort")
    assert heads and set(heads) == {"none"}
    assert len(page.attributes("button", "type")) == len(heads)
    assert any("aria-sort" in text for text in page.texts)


def test_papers_name_file_equation_test_study_and_verdict(pages):
  page = pages["papers.html"]
  text = " ".join("".join(page.texts).split())
  for part in ("jaxlm/scaling/laws.py", "equation 1.5", "tests/jaxlm/scaling/laws_test.py"):
    assert part in text
  assert "https://arxiv.org/abs/2203.15556" in page.attributes("a", "href")
  assert "index.html#valleys" in page.attributes("a", "href") and "direction only" in text
  assert "index.html#hills" not in page.attributes("a", "href")


def test_the_command_writes_both_and_refuses_what_it_cannot_read(studies, tmp_path, capsys):
  assert main(["report", str(studies), "--out", str(tmp_path / "out")]) == 0
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "papers.html"]
  assert main(["report", str(tmp_path / "none")]) == 2
  assert "has no folder with a study.json" in capsys.readouterr().err
  (tmp_path / "bad").mkdir()
  whole = json.loads((studies / "valleys/study.json").read_text())
  del whole["claim"], whole["results"][0]["commit"]
  (tmp_path / "bad/study.json").write_text(json.dumps(whole))
  assert main(["report", str(tmp_path)]) == 2
  assert "='claim, commit': missing" in capsys.readouterr().err


def test_the_projects_own_studies_are_readable(tmp_path):
  index, _ = write_report(ROOT / "experiments", ROOT, tmp_path)
  page = Page(index.read_text())
  assert not page.faults
  assert {"isoflop", "data_constrained"} <= set(page.attributes("section", "id"))
