"""Two made-up studies, one of which has been run, for the tests of the report."""

import json

import numpy as np
import pytest

TEXTS = {
  "name": "valleys",
  "title": "Valleys & hills",
  "source": "arXiv:2203.15556, section 3",
  "claim": "A <script>alert(1)</script> claim with `code`.",
  "published": "0.50",
  "setting": "The setting.",
  "refuted_by": "What refutes it.",
  "cannot_show": "What it cannot show.",
}
RESULT = {
  "scale": "cpu",
  "ours": "a = 0.52",
  "interval": "0.4 to 0.6",
  "verdict": "direction only",
  "why": "The reason.",
  "lines": ["first line", "second line"],
  "table": "table.csv",
  "figure": "figure.png",
  "command": "python -m experiments.valleys.run --cpu",
  "runs": 3,
  "diverged": 0,
  "minutes": 1.5,
  "commit": "abc123",
  "hardware": "2 cores of something",
  "versions": "jax 1",
}


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
  from matplotlib.figure import Figure

  folder = tmp_path_factory.mktemp("studies")
  for name, results in (("valleys", [RESULT]), ("hills", [])):
    study = folder / name
    study.mkdir()
    texts = TEXTS | {"name": name, "source": TEXTS["source"] if results else "a book"}
    (study / "study.json").write_text(json.dumps(texts | {"results": results}))
  losses = [2.5, 10.25, 1.125]
  rows = [f"7,{i},{loss},d{i}" for i, loss in enumerate(losses)]
  (folder / "valleys/table.csv").write_text("\n".join(["model.D,seed,loss,config", *rows]) + "\n")
  figure = Figure(figsize=(2, 1))
  figure.subplots().plot(np.arange(3), losses)
  figure.savefig(folder / "valleys/figure.png")
  return folder
