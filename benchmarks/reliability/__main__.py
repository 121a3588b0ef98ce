"""What a run survives, measured at full size: writes sections of benchmarks/results/reliability.md.

    python -m benchmarks.reliability kills damage cost stops notices displays starved spikes
        repeats exports splits texts

Names of sections choose; the others stay as they are. The slow tests in tests/reliability/ run
smaller versions of the same campaigns.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.reliability import (
  damage,
  displays,
  exports,
  kills,
  notices,
  repeats,
  spikes,
  starved,
  stops,
  texts,
  verify_cost,
)
from benchmarks.reliability.comparison import same_end
from benchmarks.table import environment, table

RESULTS = Path(__file__).parents[1] / "results" / "reliability.md"
HEAD = """# Reliability

Each section is written by `python -m benchmarks.reliability SECTION ...`, which starts real runs of
a model of 11 thousand parameters on CPU and kills, damages or starves them. Numbers are counts
unless they have a unit.
"""


def section_kills(folder: Path) -> str:
  """Kills runs at a hundred moments; returns the section on it."""
  start = time.monotonic()
  chains = kills.campaign(folder, kills=100, seed=0)
  minutes = (time.monotonic() - start) / 60
  by_aim = collections.defaultdict(list)
  for chain in chains:
    for kill in chain.kills:
      by_aim[kill.aim].append(kill)
  rows = []
  for aim in (kills.ANY_MOMENT, *kills.AIMS):
    found = by_aim[aim]
    first = sum(kill.newest < 0 for kill in found)
    sums = [sum(getattr(kill, name) for kill in found) for name in ("lost", "unsound")]
    rows.append([aim, len(found), first, *sums, max(kill.repeated for kill in found)])
  columns = (
    "killed",
    "times",
    "before the first checkpoint",
    "finished checkpoints lost",
    "that do not verify",
  )
  total = sum(len(chain.kills) for chain in chains)
  same, aside = (sum(getattr(chain, name) for chain in chains) for name in ("same", "aside"))
  return f"""\
`kill -9` at {total} moments of {len(chains)} runs of {kills.STEPS} steps that save every
{kills.SAVE_EVERY}; {minutes:.0f} minutes. {environment("jax")}.
Then each run was left alone: {same} of {len(chains)} ended with the loss curve, evaluations,
weights, moving average, optimizer state, key and data position of the run that was never killed,
bit for bit. On the way {aside} unfinished checkpoints were set aside.

{table((*columns, "most steps repeated"), rows)}

Steps are repeated from the newest finished checkpoint: those since, and those of the save under
way.
"""


def section_damage(folder: Path) -> str:
  """Damages each file of a checkpoint; returns the section on it."""
  run = damage.trained(folder)
  cases = damage.campaign(run)
  rows = []
  for kind in damage.KINDS:
    found = [case for case in cases if case.kind == kind]
    rows.append(
      [kind, len(found), sum(case.named for case in found), sum(case.older_used for case in found)]
    )
  resumed = [damage.resumed(folder, run, kind) for kind in damage.KINDS]
  return f"""\
Every file of a checkpoint in turn, {len(cases)} cases. Named: the manifest says which file differs,
and how.

{table(("damage", "files", "named", "older checkpoint found"), rows)}

`jaxlm resume` went on from the older checkpoint, kept the damaged one byte for byte beside the new
one and ended as the undamaged run did, bit for bit, in {sum(resumed)} of {len(resumed)} runs, one
of each kind.
"""


def section_cost(folder: Path) -> str:
  """Restores a state with and without verifying it; returns the section on it."""
  load = os.getloadavg()[0]
  plain, verified = verify_cost.measure(folder, megabytes=200, repeats=21)
  return f"""\
A state of 200 MB is restored in {plain:.3f} s, verified and restored in {verified:.3f} s:
{verified / plain - 1:.0%} more. Medians of 21 in turns, files in the page cache, load average
{load:.1f}. {environment("jax")}.
"""


def section_stops(folder: Path) -> str:
  """Asks endless runs to stop; returns the section on it."""
  rows = []
  for name, stop in stops.campaign(folder).items():
    seconds = "" if "stop_after" in name else f"{stop.seconds:.1f}"
    rows.append(
      [name, " and ".join(map(str, stop.statuses)), stop.last, max(stop.saved, 0), seconds]
    )
  return f"""\
Endless runs that save only when they stop; signals come after the third step. 130 says that the run
can be resumed. Of two processes the second was asked, and the first, which writes, stopped at the
same step. No step is saved as 0.

{table(("asked by", "exit status", "last step", "saved step", "seconds until it had left"), rows)}
"""


def section_starved(folder: Path) -> str:
  """Runs on full and read-only disks; returns the section on it."""
  outcomes = starved.campaign(folder)
  rows = [
    [name, o.status, ", ".join(map(str, o.kept)) or "none", "yes" if o.same else "no"]
    for name, o in outcomes.items()
  ]
  said = "\n".join(f"- {name}: {_last_word(o.said)}" for name, o in outcomes.items() if o.said)
  return f"""\
Runs of {starved.STEPS} steps that save every 5 and keep 2, on small disks of their own.

{table(("tried", "exit status", "checkpoints that verify then", "ended as with room"), rows)}

What they said last about it:

{said.replace(str(folder) + "/", "")}
"""


def section_spikes(folder: Path) -> str:
  """Looks for jumps in noise; returns the section on it."""
  rows = spikes.campaign(count=100_000, every=500)
  columns = ["noise", "jump, in deviations", "jumps noticed", "other steps reported"]
  return f"""\
Losses of mean 3 and noise of standard deviation 0.05, 100,000 steps, a jump every 500; `spike_size`
10.

{table(columns, rows)}
"""


def section_repeats(folder: Path) -> str:
  """Repeats a run, on every mesh too; returns the section on it."""
  runs = repeats.first_run(folder, steps=30)
  equal = same_end(runs.again(), runs.first)
  rows = [["again, from config.json", *(["0 (bit for bit)" if equal else "differs"] * 2)]]
  for mesh in repeats.MESHES:
    other = runs.on_mesh(mesh)
    deviations = [repeats.deviation(other, runs.first, key) for key in ("loss", "grad_norm")]
    rows.append([mesh.describe(), *(f"{value:.1e}" for value in deviations)])
  return f"""\
30 steps of adamw in float32, each run a process of its own; the largest relative difference of any
step. {environment("jax")}.

{table(["run", "loss", "gradient norm"], rows)}
"""


def section_splits(folder: Path) -> str:
  """Holds out parts of many texts; returns the section on it."""
  cases = texts.split_campaign(folder, count=50, seed=0)
  rows = []
  for shape in texts.SHAPES:
    some = [case for case in cases if case.shape == shape]
    missed = sorted(case.missed for case in some)
    rows.append(
      [shape, len(some), f"{missed[len(some) // 2]:.1%}", f"{missed[-1]:.1%}"]
      + [max(case.cut for case in some), sum(case.lost for case in some)]
    )
  columns = ("documents", "texts", "missed by, median", "most", "documents cut, most", "bytes lost")
  return f"""\
Texts of lines of 5 to 120 characters, half of them files and half records, of which `data.holdout`
from 1% to 50% is asked for. Missed by: the difference to the asked bytes, as part of them.

{table(columns, rows)}
"""


def section_texts(folder: Path) -> str:
  """Reads files that are no text; returns the section on it."""
  cases = texts.wrong_campaign(folder)
  named = sum(bool(case.said) for case in cases)
  refused = sum(case.refused for case in cases)
  lost = sum(case.good_text_lost for case in cases)
  firsts = {case.said.partition(": ")[0]: case.said for case in reversed(cases)}
  lines = "\n".join(f"- {line}" for line in reversed(firsts.values()))
  return f"""\
{len(cases)} files that are no text, or hold such records, each in a folder with 999 bytes of good
text. Left out and named in the log: {named}. Bytes of good text lost: {lost}. Refused with
`--data.strict`: {refused}. What the log says of the first of each kind:

{lines}
"""


def _last_word(said: str) -> str:
  lines = said.splitlines()
  return "`" + ([line for line in lines if "saved" in line] or lines)[-1].replace("`", "'") + "`"


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
  "kills": ("Killed at any moment", section_kills),
  "damage": ("Corrupted", section_damage),
  "cost": ("What verifying costs", section_cost),
  "stops": ("Stopped politely", section_stops),
  "notices": ("Told that the end is near", notices.section),
  "displays": ("What only displays fails", displays.section),
  "starved": ("Out of room or rights", section_starved),
  "spikes": ("Spikes of the loss", section_spikes),
  "repeats": ("The same run again", section_repeats),
  "exports": ("Out and in again", exports.section),
  "splits": ("Split", section_splits),
  "texts": ("No text", section_texts),
}
"""name -> (its title, what writes it in a folder of its own)"""


def write_section(title: str, text: str) -> None:
  """Puts a section in the place of the one of that title, or at the end."""
  before = RESULTS.read_text() if RESULTS.exists() else HEAD
  head, *parts = before.split("\n## ")
  sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}
  sections[title] = text.strip()
  RESULTS.write_text(
    "\n".join([head, *(f"## {name}\n\n{text}\n" for name, text in sections.items())])
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("sections", nargs="+", choices=list(SECTIONS))
  logging.getLogger("jaxlm").setLevel(logging.ERROR)  # damage is warned of 200 times
  for name in parser.parse_args().sections:
    title, section = SECTIONS[name]
    with tempfile.TemporaryDirectory() as folder:
      text = section(Path(folder) / name)
    write_section(title, text)
    print(f"{RESULTS}: {name}\n{text}")


if __name__ == "__main__":
  main()
