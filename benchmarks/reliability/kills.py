"""kill -9 at any moment: a run is killed over and over, and must end as if it never had been."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path

from benchmarks.reliability.comparison import last_step, same_end
from benchmarks.reliability.processes import SMALL, finish, run, start, wait_until, write_corpus
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps, set_aside
from jaxlm.checkpoint.manifest import verify
from jaxlm.run.run_folder import RunFolder

STEPS, SAVE_EVERY = 120, 3

# A process is killed at most so many seconds after it enters this function, at one of its first n
# calls: aim -> (module, function, seconds, n).
AIMS = {
  "writing the arrays": ("jaxlm.checkpoint.checkpoint", "Checkpoints.save", 0.15, 3),
  "between arrays and manifest": ("jaxlm.checkpoint.checkpoint", "write_manifest", 0.0, 2),
  "writing the manifest": ("jaxlm.checkpoint.checkpoint", "write_manifest", 0.004, 2),
  "before a rename": (
    "os",
    "replace",
    0.0,
    5,
  ),  # of manifest.json, config.json or metrics.jsonl, or one of Orbax
  "before pruning": ("jaxlm.checkpoint.checkpoint", "prune", 0.0, 2),
  "while pruning": ("shutil", "rmtree", 0.002, 2),
  "while setting aside": ("jaxlm.run.start", "set_aside_after", 0.002, 1),
}
ANY_MOMENT = "any moment"


@dataclasses.dataclass(frozen=True)
class Kill:
  """Says what a run's folder holds after one kill -9."""

  aim: str
  newest: int
  """step of the newest checkpoint with a manifest; -1: none"""
  unsound: int
  """checkpoints with a manifest that do not verify"""
  lost: int
  """1 where a checkpoint was finished before this start and there is no newer or equal one now"""
  repeated: int
  """steps that were done but are not in the newest checkpoint"""


@dataclasses.dataclass(frozen=True)
class Chain:
  """Says how a run ended that was killed several times and then left alone."""

  kills: tuple[Kill, ...]
  same: bool
  """it ended with the curve and the state of the run that nobody killed"""
  aside: int
  """unfinished checkpoints that were set aside"""


def campaign(folder: Path, kills: int, seed: int) -> list[Chain]:
  """Kills runs so many times, each up to 14 times, half of them aimed, at moments from `seed`."""
  draw = random.Random(seed)
  write_corpus(folder / "text")
  status, printed = run(folder, *_train("whole"))
  assert status == 0, printed
  aims = [aim for name in AIMS for aim in (name, ANY_MOMENT)]
  chains: list[Chain] = []
  while kills > 0:
    chain = _chain(folder, f"chain{len(chains)}", aims[:kills], draw)
    chains.append(chain)
    kills -= len(chain.kills)
  return chains


def _train(run: str) -> list[str]:
  every = ["--steps", str(STEPS), "--save_every", str(SAVE_EVERY), "--eval_every", "30"]
  return ["train", "micro", *SMALL, *every, "--run", run]


def _chain(folder: Path, name: str, aims: list[str], draw: random.Random) -> Chain:
  kills = []
  for aim in aims:
    if (kill := _kill(folder, name, aim, draw)) is None:
      break  # it was done first
    kills.append(kill)
  chain = RunFolder(folder / name)
  if not finished_steps(chain.checkpoints) or finished_steps(chain.checkpoints)[-1] < STEPS:
    status, printed = run(folder, *_next(folder, name))
    assert status == 0, printed
  same = same_end(chain, RunFolder(folder / "whole"))
  return Chain(tuple(kills), same, len(set_aside(chain.checkpoints)))


def _next(folder: Path, name: str) -> list[str]:
  """Returns arguments that train what was not begun and resume what was."""
  return ["resume", name] if RunFolder(folder / name).config.exists() else _train(name)


def _kill(folder: Path, name: str, aim: str, draw: random.Random) -> Kill | None:
  """Starts or resumes the run and kills it; None where it ended first."""
  chain = RunFolder(folder / name)
  before = finished_steps(chain.checkpoints)
  if aim == ANY_MOMENT:
    process = start(folder, *_next(folder, name))
    lock = chain.path / "lock"
    wait_until(lambda: lock.exists() and f"process {process.pid} " in lock.read_text(), process)
    time.sleep(draw.uniform(0, 3.5))
    process.kill()
  else:
    module, function, seconds, most = AIMS[aim]
    moment = (module, function, draw.randint(1, most), draw.uniform(0, seconds))
    setup = f"from benchmarks.reliability.kills import die_in\ndie_in{moment}"
    process = start(folder, *_next(folder, name), setup=setup)
  status, printed = finish(folder, process)
  if status == 0:
    return None
  assert status == -signal.SIGKILL, printed
  after = finished_steps(chain.checkpoints)
  newest = max(after, default=-1)
  return Kill(
    aim,
    newest,
    unsound=sum(bool(verify(checkpoint_path(chain.checkpoints, step))) for step in after),
    lost=int(newest < max(before, default=-1)),
    repeated=last_step(chain) - max(newest, 0),
  )


def die_in(module: str, function: str, call: int, seconds: float) -> None:
  """Makes this process kill itself so many seconds after the `call`-th call of the function."""
  owner = importlib.import_module(module)
  *inner, name = function.split(".")
  for part in inner:
    owner = getattr(owner, part)
  original, calls = getattr(owner, name), itertools.count(1)

  def die() -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)

  def wrapped(*args, **kwargs):
    if next(calls) == call:
      threading.Thread(target=die).start() if seconds else die()
    return original(*args, **kwargs)

  setattr(owner, name, wrapped)
