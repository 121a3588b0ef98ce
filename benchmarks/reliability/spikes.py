"""Counts false alarms on noise alone, and jumps of the loss of each size that are noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxlm import presets
from jaxlm.run.guard import Guard
from jaxlm.run.run_folder import RunFolder

JUMPS = (0, 4, 6, 8, 12, 16)
NOISES = {
  "normal": lambda draw, count: draw.standard_normal(count),
  "Student's t, 5 degrees": lambda draw, count: draw.standard_t(5, count) * (3 / 5) ** 0.5,
}


def campaign(count: int, every: int) -> list[list[object]]:
  """Returns rows of (noise, jump in deviations, jumps noticed, other steps reported).

  Losses have mean 3 and noise of standard deviation 0.05; every so many steps one jumps.
  """
  rows: list[list[object]] = []
  for name, draw in NOISES.items():
    for jump in JUMPS:
      losses = 3 + 0.05 * draw(np.random.default_rng(0), count)
      jumps = np.arange(every, count, every)
      losses[jumps] += 0.05 * jump
      reported = spikes(losses.tolist())
      noticed = len(set(reported) & set(jumps.tolist())) if jump else 0
      share = f"{noticed} of {len(jumps)}" if jump else "-"
      rows.append([name, jump, share, len(reported) - noticed])
  return rows


def spikes(losses: list[float]) -> list[int]:
  """Returns the steps, counted from 0, whose loss a guard calls a spike."""
  guard = Guard(presets.micro(), RunFolder(Path("none")), 0)
  reported = []
  for step, loss in enumerate(losses):
    if guard.is_spike(step, loss):
      reported.append(step)
    guard.losses[step] = loss
    guard.losses.pop(step - 100, None)
  return reported
