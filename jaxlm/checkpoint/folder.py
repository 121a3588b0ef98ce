"""Lists, renames and removes a run's checkpoints by names and manifests alone, without jax.

| name | what |
|---|---|
| `00000100` | checkpoint of step 100; finished if it has a manifest |
| `00000100.unsound` | damaged or unfinished, set aside by a resumed run; never read or removed |
| `00000100.orbax-checkpoint-tmp` | what a killed process was writing |
| `00000100.deleting` | what a killed process was removing |

Anything else in the folder belongs to others, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxlm.checkpoint.hold import held, held_alone, verify_held
from jaxlm.checkpoint.manifest import NAME, refuse_newer
from pallas_kernels.common.errors import UserError

_log = logging.getLogger("jaxlm")
_UNSOUND, _DELETING, _WRITING = ".unsound", ".deleting", ".orbax-checkpoint-tmp"
_STEP = re.compile(r"0[0-9]{7}|[1-9][0-9]{7,}")


def checkpoint_path(folder: Path, step: int) -> Path:
  """Returns where the checkpoint of a step lies, or would lie."""
  return folder / f"{step:08d}"


def size_of(path: Path) -> int:
  """Returns the bytes of all files of a checkpoint."""
  return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def all_steps(folder: Path) -> list[int]:
  """Returns the steps that have a checkpoint, finished or not, ascending."""
  paths = folder.iterdir() if folder.is_dir() else ()
  return sorted(int(path.name) for path in paths if _STEP.fullmatch(path.name) and path.is_dir())


def finished_steps(folder: Path) -> list[int]:
  """Returns the steps whose checkpoint has a manifest, ascending."""
  return [step for step in all_steps(folder) if (checkpoint_path(folder, step) / NAME).exists()]


def newest_sound(folder: Path) -> int:
  """Returns the step of the newest checkpoint that verifies; raises as `hold_newest_sound` does."""
  with hold_newest_sound(folder) as step:
    return step


@contextlib.contextmanager
def hold_newest_sound(folder: Path, before: float = math.inf) -> Iterator[int]:
  """Holds the newest checkpoint of a step below `before` that verifies, and gives its step.

  Others are passed over and logged. The process that writes the run does not prune it meanwhile.
  Raises FileNotFoundError when there is none, UserError for one of a newer or an older format.
  """
  looked_at: list[int] | None = None
  warned: set[str] = set()
  while (steps := [step for step in all_steps(folder) if step < before]) != looked_at:
    looked_at = steps  # a writer may prune these and write others while they are looked at
    for step in reversed(steps):
      path = checkpoint_path(folder, step)
      with held(path) as is_there:
        if is_there and verify_held(path, warned):
          refuse_old_format(path)
          yield step
          return
        if is_there:
          refuse_newer(path)  # it would be taken for damaged, and set aside
  raise FileNotFoundError(errno.ENOENT, "holds no checkpoint that verifies", str(folder))


def refuse_old_format(path: Path) -> None:
  """Raises UserError for a checkpoint whose step and key are not items of their own."""
  if (path / "optimizer").is_dir() and not (path / "step").is_dir():
    raise UserError(
      f"{path}: is of the old checkpoint format (step and key are inside the item `optimizer`), "
      "which this version cannot read; use the version that wrote it, or train anew"
    )


def set_aside_after(folder: Path, step: int) -> None:
  """Renames checkpoints of later steps, unfinished or damaged, which a resumed run writes again."""
  for later in all_steps(folder):
    if later > step:
      path = checkpoint_path(folder, later)
      aside = _free_name(path.with_name(path.name + _UNSOUND))
      path.rename(aside)
      _log.warning("checkpoint %s moved to %s", path.name, aside.name)


def set_aside(folder: Path) -> list[Path]:
  """Returns what `set_aside_after` has renamed so far."""
  return _marked(folder, _UNSOUND)


def remove_leftovers(folder: Path) -> None:
  """Removes what a killed process or a failed save left behind.

  Only for the process that writes to the run, while it is not writing.
  """
  for path in (*_marked(folder, _WRITING), *_marked(folder, _DELETING)):
    shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path, step: int) -> None:
  """Removes a checkpoint, if there is one; killed meanwhile, it leaves no half under that name."""
  path = checkpoint_path(folder, step)
  if path.exists():
    shutil.rmtree(path.rename(_free_name(path.with_name(path.name + _DELETING))))


def prune(folder: Path, keep: int, keep_every: int) -> None:
  """Removes finished checkpoints but the newest `keep` and every multiple of `keep_every`.

  One that another process reads stays until the next time.
  """
  for step in finished_steps(folder)[:-keep]:
    if not keep_every or step % keep_every:
      with held_alone(checkpoint_path(folder, step)) as alone:
        if alone:
          remove(folder, step)


def _marked(folder: Path, mark: str) -> list[Path]:
  """Returns the folders whose names are a step's and then `mark`, sorted."""
  paths = folder.iterdir() if folder.is_dir() else ()
  steps = ((path, *path.name.partition(mark)) for path in paths)
  return sorted(path for path, step, middle, _ in steps if middle and _STEP.fullmatch(step))


def _free_name(path: Path) -> Path:
  names = (path.with_name(f"{path.name}{count or ''}") for count in range(10**6))
  return next(name for name in names if not name.exists())
