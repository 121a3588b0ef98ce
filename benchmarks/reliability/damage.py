"""Every kind of damage at every place of a checkpoint: is it noticed, named, and passed over?"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.reliability.comparison import same_end
from benchmarks.reliability.processes import SMALL, run, write_corpus
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps, newest_sound
from jaxlm.checkpoint.manifest import verify
from jaxlm.run.run_folder import RunFolder

STEPS, SAVE_EVERY = 6, 3


def _flip_a_bit(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


KINDS: dict[str, Callable[[Path], None]] = {
  "a flipped bit": _flip_a_bit,
  "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
  "emptied": lambda path: os.truncate(path, 0),
  "missing": Path.unlink,
}
SAYS = {  # of the file; of manifest.json it is that it cannot be read, or is missing
  "a flipped bit": "have checksum",
  "cut by one byte": "size",
  "emptied": "size 0",
  "missing": "missing",
}


@dataclasses.dataclass(frozen=True)
class Case:
  kind: str
  file: str
  named: bool
  """one fault, which begins with the file and says what differs"""
  older_used: bool
  """the search for a sound checkpoint ends at the older one, and has changed nothing"""


def trained(folder: Path) -> RunFolder:
  """Trains a run with two checkpoints, beside its text."""
  write_corpus(folder / "text")
  every = ["--steps", str(STEPS), "--save_every", str(SAVE_EVERY), "--eval_every", "3"]
  status, printed = run(folder, "train", "micro", *SMALL, *every, "--run", "whole")
  assert status == 0, printed
  return RunFolder(folder / "whole")


def campaign(whole: RunFolder) -> list[Case]:
  """Does each kind of damage to each file of the newest checkpoint, and undoes it."""
  newest = checkpoint_path(whole.checkpoints, STEPS)
  files = sorted(path for path in newest.rglob("*") if path.is_file())
  return [_case(whole, kind, file) for kind in KINDS for file in files]


def _case(whole: RunFolder, kind: str, file: Path) -> Case:
  newest = checkpoint_path(whole.checkpoints, STEPS)
  name = file.relative_to(newest).as_posix()
  with damaged(newest, kind, file):
    faults = verify(newest)
    before = _content(whole.checkpoints)
    older = (
      newest_sound(whole.checkpoints) == STEPS - SAVE_EVERY
      and _content(whole.checkpoints) == before
    )
  assert verify(newest) == []
  says = SAYS[kind] if name != "manifest.json" or kind == "missing" else "manifest.json: "
  named = len(faults) == 1 and faults[0].startswith(f"{name}: ") and says in faults[0]
  return Case(kind, name, named, older)


@contextlib.contextmanager
def damaged(checkpoint: Path, kind: str, file: Path) -> Iterator[None]:
  before = _content(checkpoint)
  KINDS[kind](file)
  try:
    yield
  finally:
    for path in set(_content(checkpoint)) - set(before):
      path.unlink()
    for path, content in before.items():
      if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def _content(folder: Path) -> dict[Path, bytes]:
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resumed(folder: Path, whole: RunFolder, kind: str) -> bool:
  """Returns whether a run with such damage in its weights ends as if it had none, and keeps it."""
  copy = RunFolder(folder / f"resumed from {kind}")
  shutil.copytree(whole.path, copy.path)
  newest = checkpoint_path(copy.checkpoints, STEPS)
  file = max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
  KINDS[kind](file)
  bad = {path.relative_to(newest): content for path, content in _content(newest).items()}
  status, printed = run(folder, "resume", copy.path.name)
  aside = newest.with_name(newest.name + ".unsound")
  kept = {path.relative_to(aside): content for path, content in _content(aside).items()}
  return (
    status == 0
    and f"resuming at step {STEPS - SAVE_EVERY}" in printed
    and kept == bad
    and finished_steps(copy.checkpoints) == [STEPS - SAVE_EVERY, STEPS]
    and verify(newest) == []
    and same_end(copy, whole)
  )
