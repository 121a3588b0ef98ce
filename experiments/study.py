"""What all studies share: the flags, a table that is gone on with, and the pages made from it.

A study is a module `experiments/NAME/run.py` that defines a `Study` and calls `main` with it. What
it claims and what would refute it stand there before anything is trained; the verdict is computed
from the table alone by `conclude`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import TrainConfig, check
from jaxlm.scaling.grid import GridRun
from jaxlm.scaling.sweep import Executor, Row, provenance, read_table, write_table
from pallas_kernels.common.errors import UserError, import_extra

HERE = Path(__file__).parent
Scale = Literal["smoke", "cpu", "gpu"]
Verdict = Literal["reproduced", "direction only", "refuted", "undecided"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """Holds what a table says about a claim."""

  ours: str
  interval: str
  verdict: Verdict
  why: str
  lines: tuple[str, ...] = ()
  """further numbers, one sentence or row of text each"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Defines a study; all texts are written before it is run."""

  name: str
  """of its folder in experiments/"""
  title: str
  source: str
  """paper and section, as "arXiv:2203.15556, section 3.2" """
  claim: str
  published: str
  """the numbers that the source gives"""
  setting: str
  """what is trained on what, with which seeds, and how the numbers are taken from it"""
  refuted_by: str
  """which outcome is which verdict"""
  cannot_show: str
  measure: Callable[[Scale, Path, Executor | None], None]
  """trains what the table at this path lacks, by `jaxlm.scaling.sweep`"""
  conclude: Callable[[list[Row]], Finding]
  """raises UserError where the rows are too few to say anything"""
  draw: Callable[[list[Row], Any], None]
  """draws the rows into a matplotlib figure"""


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
  """Runs a study at a scale, or only draws what its tables hold, and writes its pages."""
  flags = _flags(study, arguments)
  folder = flags.out or (Path("runs/smoke") / study.name if flags.smoke else HERE / study.name)
  folder.mkdir(parents=True, exist_ok=True)
  scale: Scale | None = next((s for s in ("smoke", "cpu", "gpu") if getattr(flags, s)), None)
  if scale is not None:
    executor = _executor(flags, folder) if flags.cluster else None
    study.measure(scale, folder / _table(scale), executor)
  results = [
    result(study, folder, s) for s in ("smoke", "cpu", "gpu") if (folder / _table(s)).is_file()
  ]
  texts = {f.name: getattr(study, f.name) for f in dataclasses.fields(study) if f.type == "str"}
  page = json.dumps(texts | {"results": results}, indent=1, ensure_ascii=False)
  write_text(folder / "study.json", page + "\n")
  write_text(folder / "README.md", readme(texts, results))
  for outcome in results:
    print(f"{study.name}, {outcome['scale']}: {outcome['verdict']}. {outcome['why']}")
  print(f"wrote {folder}/README.md")


def measure_points(
  points: Sequence[Mapping[str, Any]], table: Path, measure: Callable[..., Mapping[str, Any]]
) -> None:
  """Adds a row for each point that the table lacks: its values, and what `measure` says of them.

  Is for numbers that need no training: a point has fields "task.NAME" alone, which `measure` takes
  by name. The rows lie in the same table as those of `sweep`.
  """
  rows = {row["config"]: row for row in read_table(table)}
  for point in points:
    run = GridRun.of(TrainConfig(), point)
    if run.digest in rows:
      continue
    began = time.perf_counter()
    row = {**point, "status": "finished", **measure(**run.task_values)}
    seconds = round(time.perf_counter() - began, 3)
    rows[run.digest] = row | {"seconds": seconds} | provenance() | {"config": run.digest}
    write_table(table, list(rows.values()))


def _flags(study: Study, arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog=f"python -m experiments.{study.name}.run")
  parser.description = f"{study.title}. Rows that the table has are not run again."
  scales = parser.add_mutually_exclusive_group(required=True)
  scales.add_argument("--smoke", action="store_true", help="under 2 minutes on 2 cores")
  scales.add_argument("--cpu", action="store_true", help="minutes to an hour, as README says")
  scales.add_argument("--gpu", action="store_true", help="planned for 10 minutes on an H200")
  scales.add_argument("--plot", action="store_true", help="figures and pages from the tables alone")
  parser.add_argument("--out", type=Path, help="folder of table, figure and pages")
  parser.add_argument("--cluster", choices=["slurm", "local"], help="each run a job (extra slurm)")
  parser.add_argument(
    "--job", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of submitit's jobs"
  )
  return parser.parse_args(arguments)


def _executor(flags: argparse.Namespace, folder: Path) -> Executor:
  """Returns submitit's executor; `--job timeout_min=60 slurm_partition=gpu` are its parameters."""
  submitit = import_extra("submitit", "slurm", "running a study on a cluster")
  executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=flags.cluster)
  pairs = [pair.partition("=") for pair in flags.job]
  for name, equals, _ in pairs:
    check(bool(equals), "--job", name, "must be NAME=VALUE")
  executor.update_parameters(**{k: int(v) if v.isdigit() else v for k, _, v in pairs})
  return executor


def _table(scale: Scale) -> str:
  return "table.csv" if scale == "cpu" else f"table_{scale}.csv"


def result(study: Study, folder: Path, scale: Scale) -> dict[str, Any]:
  """Returns what study.json says of one table, and draws its figure."""
  table = folder / _table(scale)
  rows = read_table(table)
  figure_path = table.with_suffix(".png").with_stem(table.stem.replace("table", "figure"))
  try:
    finding = study.conclude([row for row in rows if row["status"] == "finished"])
    figure = import_extra("matplotlib.figure", "plot", "a study's figure").Figure(
      figsize=(9, 4), layout="constrained"
    )
    study.draw([row for row in rows if row["status"] == "finished"], figure)
    label_logarithms(figure)
    figure.savefig(figure_path, dpi=120, metadata={"Software": None})
  except UserError as error:
    finding = Finding(
      ours="", interval="", verdict="undecided", why=f"The table does not say: {error}."
    )
  return {
    "scale": scale,
    **dataclasses.asdict(finding),
    "table": table.name,
    "figure": figure_path.name if figure_path.is_file() else None,
    "command": f"python -m experiments.{study.name}.run --{scale}",
    "runs": len(rows),
    "diverged": sum(row["status"] != "finished" for row in rows),
    "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
    **{name: _distinct(rows, name) for name in ("commit", "hardware", "versions")},
  }


def label_logarithms(figure: Any) -> None:
  """Labels logarithmic axes at 1 and 3 of each decade, since most span hardly more than one."""
  ticker = import_extra("matplotlib.ticker", "plot", "a study's figure")
  for axes in figure.axes:
    for axis in (axes.xaxis, axes.yaxis):
      if axis.get_scale() == "log":
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter(
          lambda value, _: (f"{value:.0e}" if value >= 1e4 else f"{value:g}").replace("e+0", "e")
        )
        axis.set_minor_formatter(ticker.NullFormatter())


def _distinct(rows: Sequence[Row], name: str) -> str:
  return "; ".join(dict.fromkeys(str(row[name]) for row in rows))


def readme(texts: dict[str, str], results: Sequence[dict[str, Any]]) -> str:
  """Returns a study's page in Markdown."""
  parts = [
    f"# {texts['title']}",
    f"{texts['claim']} ({texts['source']})",
    f"**Published.** {texts['published']}",
    f"**Setting.** {texts['setting']}",
    f"**Verdicts, decided beforehand.** {texts['refuted_by']}",
    f"**What this cannot show.** {texts['cannot_show']}",
  ]
  for outcome in results:
    measured = outcome["ours"] + (f" ({outcome['interval']})" if outcome["interval"] else "")
    parts += [
      f"## On {outcome['hardware']}: {outcome['verdict']}",
      *([f"**Measured.** {measured}"] if measured else []),
      outcome["why"],
      "\n".join(f"- {line}" for line in outcome["lines"]),
      *([f"![{texts['title']}]({outcome['figure']})"] if outcome["figure"] else []),
      f"`{outcome['command']}`, {outcome['runs']} runs ({outcome['diverged']} diverged) in "
      f"{outcome['minutes']} minutes, rows in [{outcome['table']}]({outcome['table']}); "
      f"{outcome['versions']}, commit {outcome['commit']}.",
    ]
  if not results:
    parts.append(f"Not run yet: `python -m experiments.{texts['name']}.run --cpu`.")
  parts.append("This page is written by `run.py`; change it there.")
  return "\n\n".join(part for part in parts if part) + "\n"
