"""Writes the report: every case on every chip, as JSON, a Markdown table and an SVG chart."""

from __future__ import annotations

import dataclasses
import datetime
import html
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from pallas_kernels.common.checks import check, check_choice
from pallas_kernels.common.chips import CORES
from pallas_kernels.common.errors import MissingExtraError
from pallas_kernels.schedule.analysis import UNITS, analyse
from pallas_kernels.schedule.case import Case
from pallas_kernels.schedule.cases import cases

PACKAGES = ("jax", "jaxlib", "libtpu", "tokamax")
LIMITS = (
  "Read from the compiler's static schedule, nothing was run. It cannot see the latency of copies "
  "and stalls on them, conflicts of VMEM banks, loops and conditional regions whose counts depend "
  "on data, copies that a kernel starts itself, or what XLA does around a kernel. A region that "
  "multiplies counts at every grid step: where a kernel skips it at some, more FLOPs are counted "
  "than are useful, and the time is an upper bound. Estimated is the largest of the cores', HBM's "
  "and the copies' time; roofline is the larger of useful FLOPs / peak and needed bytes / "
  "bandwidth."
)


def report(
  folder: str | pathlib.Path, chips: Sequence[str] = (), match: str = ""
) -> list[dict[str, Any]]:
  """Analyses, prints and returns every case whose name contains `match`, on `chips` (none: all).

  Writes schedule.json, schedule.md and schedule.svg to `folder`. A case that does not compile for
  a chip, or whose schedule cannot be read, has the reason in place of numbers. Raises UserError for
  unknown chips and a `match` without cases, MissingExtraError without libtpu.
  """
  chips = tuple(chips) or tuple(CORES)
  for chip in chips:
    check_choice("chips", chip, tuple(CORES))
  every = tuple(cases())
  chosen = [case for case in every if match in case.name]
  check(bool(chosen), "match", match, f"names none of {[case.name for case in every]}")
  if importlib.util.find_spec("libtpu") is None:
    raise MissingExtraError(
      "schedules come from TPU's compiler, and it is not installed: pip install libtpu"
    )
  print(table([]))
  rows = []
  for chip in chips:
    for case in chosen:
      if case.chips and chip not in case.chips:
        continue
      rows.append(row(case, chip))
      print(table(rows).splitlines()[-1], flush=True)
  below = f"{unit_table(rows)}\n\n{closing(rows)}"
  print(f"\n{below}")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  about = dict(
    date=datetime.date.today().isoformat(),
    versions=versions(),
    limits=LIMITS,
    not_run=not_run(),
    rows=rows,
  )
  (folder / "schedule.json").write_text(json.dumps(about, indent=1) + "\n")
  heading = f"{about['date']}, {', '.join(f'{k} {v}' for k, v in versions().items())}"
  (folder / "schedule.md").write_text(
    f"# TPU kernels by schedule\n\n{heading}\n\n{table(rows)}\n\n{below}\n"
  )
  (folder / "schedule.svg").write_text(chart(rows))
  return rows


def not_run() -> dict[str, str]:
  """Returns the comparators that are not in the table, and why."""
  installed = importlib.util.find_spec("tokamax") is not None
  return {} if installed else {"tokamax linear_cross_entropy": "tokamax is not installed"}


def closing(rows: Iterable[dict[str, Any]]) -> str:
  """Returns what stands below the table: limits, what is not in it, notes on single kernels."""
  notes = dict.fromkeys(f"{r['name']}: {note}." for r in rows for note in r.get("notes", ()))
  return "\n\n".join(
    [LIMITS, *(f"Not run: {name}, {why}." for name, why in not_run().items()), *notes]
  )


def versions(*packages: str) -> dict[str, str]:
  """Returns the versions of these packages (none: those that a schedule depends on)."""
  version_of = {}
  for package in packages or PACKAGES:
    try:
      version_of[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      version_of[package] = "not installed"
  return version_of


def row(case: Case, chip: str) -> dict[str, Any]:
  """Returns one line of the table: the case, and either the finding's numbers or the error."""
  about = dict(name=case.name, shape=case.shape, chip=chip)
  if case.prepare is not None:
    case.prepare()
  try:
    options: dict[str, Any] = {"flops": case.flops, "kernel": case.kernel, "trips": case.trips}
    findings = analyse(case.fn, case.args, chip, **options)
  except (ImportError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return about | dict(error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
  if len(findings) != 1:
    return about | dict(error=f"{len(findings)} kernels match {case.kernel!r}")
  return about | dataclasses.asdict(findings[0])


COLUMNS = (
  ("kernel", lambda r: r["name"]),
  ("shape", lambda r: r["shape"]),
  ("chip", lambda r: r["chip"]),
  ("Mcycles", lambda r: f"{r['cycles'] / 1e6:.2f}"),
  ("MXU use", lambda r: f"{r['mxu_use']:.1%}"),
  ("of peak", lambda r: f"{r['of_peak']:.1%}"),
  ("counted / useful FLOPs", lambda r: f"{r['counted_flops'] / r['flops']:.2f}"),
  ("of roofline", lambda r: f"{r['of_roofline']:.1%}"),
  ("est. ms", lambda r: f"{r['us'] / 1e3:.2f}"),
  ("HBM ms", lambda r: f"{r['hbm_us'] / 1e3:.2f}"),
  ("HBM GB", lambda r: f"{r['hbm_bytes'] / 1e9:.2f}"),
  ("spills / step", lambda r: f"{r['spills']:.0f}"),
  ("VMEM MiB", lambda r: f"{r['vmem_bytes'] / 2**20:.1f}"),
)


def table(rows: Iterable[dict[str, Any]]) -> str:
  """Returns the rows as a Markdown table."""
  lines = [" | ".join(name for name, _ in COLUMNS), " | ".join("---" for _ in COLUMNS)]
  for r in rows:
    cells = [get(r) for _, get in COLUMNS[:3]]
    cells += [r["error"]] if "error" in r else [get(r) for _, get in COLUMNS[3:]]
    lines.append(" | ".join(cells))
  return "\n".join(f"| {line} |" for line in lines)


def unit_table(rows: Iterable[dict[str, Any]]) -> str:
  """Returns what each unit does in the rows' kernels, and the limit that follows, in Markdown."""
  binding = ("MXU", "VALU", "EUP", "HBM")
  titles = {"MXU": "matrix units", **UNITS, "HBM": "HBM"}
  head = ["kernel", "chip", *titles.values(), "scheduled", "of the limit"]
  lines = [head, ["---"] * len(head)]
  for r in rows:
    if "error" not in r:
      busy = r["unit_cycles"]
      limit = max(busy[unit] for unit in binding)
      cells = [f"{busy[unit] / 1e6:.3f}" for unit in titles] + [f"{r['cycles'] / 1e6:.3f}"]
      lines.append([r["name"], r["chip"], *cells, f"{limit / r['cycles']:.0%}"])
  caption = (
    "Million cycles that each kind of unit of a core would take alone for what the kernel executes "
    "(loads and stores with those of spilled registers). The limit is the largest of matrix units, "
    "vector operations, exponentials and HBM."
  )
  return "\n".join([caption, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def chart(rows: Sequence[dict[str, Any]]) -> str:
  """Returns an SVG of the shares of peak as horizontal bars, a group for each kernel."""
  measured = sorted((r for r in rows if "error" not in r), key=lambda r: r["name"])
  names = list(dict.fromkeys(r["name"] for r in measured))
  parts, y = [], 30
  for name in names:
    parts.append(f'<text x="10" y="{y}" font-weight="bold">{html.escape(name)}</text>')
    for r in (r for r in measured if r["name"] == name):
      y += 18
      width = 400 * min(r["of_peak"], 1)
      parts.append(f'<text x="70" y="{y}" text-anchor="end">{r["chip"]}</text>')
      parts.append(f'<rect x="80" y="{y - 11}" width="{width:.0f}" height="13" fill="#4477aa"/>')
      label = f"{r['of_peak']:.0%} of peak, {r['us'] / 1e3:.2f} ms"
      parts.append(f'<text x="{86 + width:.0f}" y="{y}">{label}</text>')
    y += 28
  style = 'font-family="sans-serif" font-size="12"'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" {style}>\n'
    + "\n".join(parts)
    + "\n</svg>\n"
  )
