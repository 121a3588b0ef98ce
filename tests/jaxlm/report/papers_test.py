"""Papers are found in docstrings and other strings, with what stands around them."""

from jaxlm.report.papers import by_paper, mentions

MODULE = '''"""Does a thing (arXiv:2101.00001, section
3.2). Another thing follows arXiv 2202.00002, equations 4 and 5, and eq. 6 of a book.
"""

LAW = make(1.0, source="arXiv:2101.00001, table 2; as printed")

class Layer:
  """Has nothing."""

  def loss(self):
    """Returns E (Arxiv:2303.00003)."""
    return "no paper 2404.00004"
'''


def test_what_is_found(tmp_path):
  (tmp_path / "jaxlm/part").mkdir(parents=True)
  (tmp_path / "tests/jaxlm/part").mkdir(parents=True)
  (tmp_path / "jaxlm/part/thing.py").write_text(MODULE)
  found = mentions(tmp_path)
  assert [(m.paper, m.name, m.place, m.line) for m in found] == [
    ("2101.00001", "thing", "section 3.2", 1),
    ("2101.00001", "LAW", "table 2", 5),
    ("2202.00002", "thing", "equations 4 and 5", 1),
    ("2303.00003", "loss", "", 11),
  ]
  assert found[0].sentence == "Does a thing (arXiv:2101.00001, section 3.2)."
  assert list(by_paper(found)) == ["2303.00003", "2202.00002", "2101.00001"]
  assert {m.test for m in found} == {""}


def test_the_test_of_a_module_is_its_mirror_or_who_imports_it(tmp_path):
  (tmp_path / "jaxlm/part").mkdir(parents=True)
  (tmp_path / "tests/jaxlm/part").mkdir(parents=True)
  for name in ("one", "two", "three"):
    (tmp_path / f"jaxlm/part/{name}.py").write_text('"""See arXiv:2101.00001."""\n')
  (tmp_path / "tests/jaxlm/part/one_test.py").write_text("from jaxlm.part.two import f\n")
  found = {m.file: m.test for m in mentions(tmp_path)}
  one = "tests/jaxlm/part/one_test.py"
  assert found == {
    "jaxlm/part/one.py": one,
    "jaxlm/part/two.py": one,
    "jaxlm/part/three.py": "",
  }
