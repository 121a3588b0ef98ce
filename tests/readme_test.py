"""What README and the notebook show works as shown."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.reliability.processes import finish, start_python
from jaxlm.cli import main

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(folder: Path, *arguments: str) -> str:
  status, printed = finish(folder, start_python(folder, *arguments), seconds=300)
  assert status == 0, printed
  return printed


def examples() -> list[str]:
  """Returns the Python programs in README."""
  return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def code_lines(example: str) -> int:
  """Returns how many lines of an example are neither blank nor imports."""
  lines = [line for line in example.splitlines() if line]
  return len([line for line in lines if not line.startswith(("from", "import"))])


@pytest.mark.slow
def test_the_python_example_runs(tmp_path):
  example = examples()[0]
  assert code_lines(example) <= 10
  printed = run(tmp_path, "-c", example)
  assert float(re.search(r"held-out text: ([\d.]+) bits per byte", printed)[1]) < 4.5
  records = [json.loads(line) for line in (tmp_path / "runs/example/metrics.jsonl").open()]
  for key in records[0]:
    assert f"`{key}`" in README


@pytest.mark.slow
def test_a_task_of_ones_own_trains_resumes_is_evaluated_and_plotted(tmp_path):
  _, example = examples()
  assert len([line for line in example.splitlines() if line]) < 30
  printed = run(tmp_path, "-c", example)
  assert "resuming at step 400" in printed and "right in 100% of all sums" in printed
  folder = tmp_path / "runs/addition"
  evals = [json.loads(line) for line in (folder / "eval.jsonl").open()]
  assert [record["step"] for record in evals] == list(range(100, 700, 100))
  assert (folder / "loss.png").is_file() and (folder / "checkpoints/00000600").is_dir()


@pytest.mark.slow
def test_the_commands_run_as_written_but_smaller(tmp_path, monkeypatch):
  """The first one as a process of its own."""
  monkeypatch.chdir(tmp_path)
  commands = [
    line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    jaxlm ")
  ]
  others = {"fit", "plan", "compile"}  # need a table, or are tested where they are defined
  assert others < {shlex.split(command)[1] for command in commands}
  commands = [command for command in commands if shlex.split(command)[1] not in others]
  assert [shlex.split(command)[1] for command in commands] == [
    "train",
    "resume",
    "sample",
    "eval",
    "plot",
    "replay",
    "convert",
    "tokenize",
    "checkpoint",
    "describe",
    "train",
    "quantize",
  ]
  smaller = {
    "train": "--steps 4 --model.D 32 --model.pattern.0.feedforward.F 32 "
    "--model.pattern.0.mixer.H 16 --batch 2 --data.length 32 --optimizer.warmup 1 --mesh.data 1",
    "resume": "--steps 6",
    "sample": "--max-new 5",
    "eval": "--batches 1",
    "plot": "",
    "replay": "--step 3",
    "convert": "",
    "tokenize": "--max-bytes 100000",
    "checkpoint": "",
    "describe": "",
    "quantize": "",
  }
  for index, command in enumerate(commands):
    words = shlex.split(command)[1:]
    words += shlex.split(smaller[words[0]])
    if index == 0:
      run(tmp_path, "-m", "jaxlm", *words)
    else:
      assert main(words) == 0, command
  written = [path.name + "/" * path.is_dir() for path in (tmp_path / "runs/mine").iterdir()]
  assert "loss.png" in written
  assert (tmp_path / "out/model.safetensors").is_file()
  assert [name for name in written if f"`{name}`" not in README] == []


# notebook -> what stands in its cells, and what shows the same code in less time
SMALLER = {
  "first_run": {"steps=300": "steps=12"},
  "pipelines": {"steps=60": "steps=12"},
  "scaling_laws": {
    "(fit, 300)": "(fit, 20)",
    "(fit, 300, by": "(fit, 20, by",
    "samples=100": "samples=10",
    "samples=300": "samples=20",
  },
  "sparse_and_linear_attention": {"(320, 120)": "(12, 12)"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_notebooks_run_as_written_but_smaller(name):
  nbformat = pytest.importorskip("nbformat")
  nbclient = pytest.importorskip("nbclient")
  notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
  first = notebook.cells.pop(1)  # the package is installed already
  assert "install" in first.metadata.tags and "jaxlm[plot] @ git+" in first.source
  for text, smaller in SMALLER.get(name, {}).items():
    (cell,) = [cell for cell in notebook.cells if text in cell.source]
    cell.source = cell.source.replace(text, smaller)
  nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
  outputs = [
    output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
  ]
  assert any("image/png" in output.get("data", {}) for output in outputs)
