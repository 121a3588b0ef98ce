"""Configurations and command lines that nobody would write: a message each, never a traceback.

Drawn are a configuration of a preset as JSON, of which a few values are replaced, renamed, removed
or nested elsewhere, and command lines of real flags with values from the same store. A seed gives
the same cases again.
"""

import contextlib
import io
import json
import random
import re
import types

import pytest

from jaxlm import cli, presets, run
from jaxlm.config import TrainConfig
from jaxlm.config_json import from_dict, to_dict

WHOLE = [0, 1, -1, 2, 3, 7, 16, 255, 2**31, -(2**63), 10**400]
REAL = [0.0, -0.0, 0.5, 1.0, 1e-30, 1e308, -1e308, float("inf"), float("nan")]
WORDS = [
  "",
  " ",
  "0",
  "-1",
  "1e9",
  "many",
  "bytes",
  "full",
  "adamw",
  "skip",
  "\0",
  "\ud800",
  "ü",
  "bpe:",
  "bpe:300",
]
ODD = ["bpe:٣", "3h", "h", "²s", "../../x", "-", "--", "=" * 99, True, False, None]
NESTED = [[], [1], ["full"], ["full", 3], [[]], {}, {"D": 3}]
VALUES = [*WHOLE, *REAL, *WORDS, *ODD, *NESTED]
NAMED = re.compile(
  r"^[\w.]+="
)  # a message begins with the field and its value, or with what it is about
ABOUT = ("mesh ", "preset ", "command ", "run=")


def paths(values: dict, path: tuple = ()) -> list[tuple]:
  """Returns the path of every field; a layer of a list of layers is a number on the way."""
  found = []
  for name, value in values.items():
    found.append((*path, name))
    if isinstance(value, dict):
      found += paths(value, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
      for place, layer in enumerate(value):
        found += paths(layer, (*path, name, str(place)))
  return found


def group_of(values: dict, path: tuple) -> dict:
  for name in path[:-1]:
    values = values[int(name)] if isinstance(values, list) else values[name]
  return values


def tampered(draw: random.Random, whole: str, every: list[tuple]) -> dict:
  """A copy with one to four fields changed."""
  values = json.loads(whole)
  for _ in range(draw.randint(1, 4)):
    path = draw.choice(every)
    with contextlib.suppress(
      KeyError, TypeError, AttributeError, IndexError, ValueError
    ):  # a group that an earlier change took away
      group = group_of(values, path)
      action = draw.random()
      if action < 0.8:
        group[path[-1]] = draw.choice(VALUES)
      elif action < 0.9:
        name = list(path[-1])
        name.insert(draw.randrange(len(name) + 1), draw.choice("aeiou_."))
        group["".join(name)] = group.pop(path[-1])
      else:
        del group[path[-1]]
  return values


def fuzz_configs(count: int, seed: int) -> tuple[int, int]:
  """Returns (taken, refused) of so many configurations; only ValueError counts as refused."""
  draw = random.Random(seed)
  whole = to_dict(presets.micro())
  every, whole = paths(whole), json.dumps(whole)
  taken = refused = 0
  for _ in range(count):
    values = tampered(draw, whole, every)
    try:
      config = from_dict(TrainConfig, values)
    except ValueError as error:
      refused += 1
      assert NAMED.match(str(error)) or str(error).startswith(ABOUT), str(error)
    else:
      taken += 1
      assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
  return taken, refused


def command_line(draw: random.Random, flags: list[str]) -> list[str]:
  """Draws a command with a few flags: some misspelt, some without a value or with a wrong one."""
  command = draw.choice([*["train"] * 8, *cli.COMMANDS, "trian", "", "--help", "-h"])
  first = draw.choice(
    [*["micro"] * 6, "tiny", "mikro", "", "runs/none", "a:b", ":", "x.json", "--steps", "os:getcwd"]
  )
  words = [command, first]
  for _ in range(draw.randint(0, 4)):
    flag = draw.choice(flags)
    if draw.random() < 0.2:
      at = draw.randrange(len(flag))
      flag = flag[:at] + draw.choice("aeiou-._=") + flag[at + draw.randint(0, 1) :]
    words += [flag, *(str(draw.choice(VALUES)) for _ in range(draw.choice([0, 1, 1, 1, 1, 2])))]
  return words


def fuzz_command_lines(count: int, seed: int, monkeypatch) -> dict[int, int]:
  """Returns how many command lines ended with each exit status.

  No training starts, and nothing but SystemExit escapes.
  """
  done = types.SimpleNamespace(finished=True, step=1, saved=1, lost_trackers=())
  monkeypatch.setattr(run, "train", lambda config: done, raising=False)
  draw, statuses = random.Random(seed), {}
  flags = ["--" + ".".join(path) for path in paths(to_dict(presets.micro())) if path != ("run",)]
  flags += [
    "--no-model.tied",
    "--help",
    "--run",
    "--prompt",
    "--max_new",
    "-n",
    "--batches",
    "--dtype",
    "--out",
    "--step",
  ]
  for _ in range(count):
    words = command_line(draw, flags)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
      try:
        status = cli.main(words)
      except SystemExit as stop:
        status = stop.code or 0
      except Exception as error:
        raise AssertionError(f"{words}: {error!r}") from error
    assert status in (0, 1, 2) and "Traceback" not in printed.getvalue(), words
    assert status == 0 or printed.getvalue().strip(), words
    statuses[status] = statuses.get(status, 0) + 1
  return statuses


def test_configurations_quickly():
  taken, refused = fuzz_configs(1500, seed=0)
  assert taken > 50 and refused > 1000


@pytest.mark.slow
def test_30_000_configurations():
  taken, refused = fuzz_configs(30_000, seed=1)
  assert taken + refused == 30_000 and taken > 1_000


@pytest.mark.slow
def test_2_000_command_lines(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  statuses = fuzz_command_lines(2_000, 2, monkeypatch)
  assert sum(statuses.values()) == 2_000 and statuses[0] > 50 and statuses[2] > 1_000
  assert not list(tmp_path.iterdir())
