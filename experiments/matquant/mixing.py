"""Mixes of widths over the layers: their rows, their curve, and what each order costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.small_text import signed
from jaxlm.quant.mix_and_match import Order, mixes
from jaxlm.scaling.intervals import interval
from jaxlm.scaling.sweep import Row

ORDERS: tuple[Order, ...] = ("pyramid", "reverse pyramid", "increasing", "decreasing")
Mix = tuple[int, ...]
"""bits of each layer"""


def describe(rows: list[Row]) -> list[str]:
  """Returns what each order costs beside the pyramid at equal bits, and the pyramid's curve."""
  losses = losses_of(rows)
  lines = []
  for order in ORDERS[1:]:
    mixed = [mix for own, mix in losses if own == order and len(set(mix)) > 1]
    gaps = [losses[order, mix] - losses["pyramid", _as_pyramid(mix)] for mix in mixed]
    gap = interval(np.mean(gaps, axis=0).tolist())
    lines.append(f"Mix'n'Match, {order} over pyramid at equal bits: {signed(gap)}")
  curve = curve_of(rows)
  return [*lines, "pyramid: " + ", ".join(f"{b:g} bits {loss:.3f}" for b, loss in curve.items())]


def losses_of(rows: list[Row]) -> dict[tuple[str, Mix], np.ndarray]:
  """Returns (order, mix) -> loss of each seed, from few bits to many."""
  mixed = sorted(
    (row for row in rows if row.get("task.order")),
    key=lambda row: (row["mean_bits"], row["task.mix"], row["task.seed"]),
  )
  losses: dict[tuple[str, Mix], list[float]] = {}
  for row in mixed:
    mix = tuple(int(bits) for bits in row["task.mix"].split("-"))
    losses.setdefault((row["task.order"], mix), []).append(row["mix_loss"])
  return {key: np.array(values) for key, values in losses.items()}


def curve_of(rows: list[Row]) -> dict[float, float]:
  """Returns mean bits -> loss of the best pyramid, mean over seeds."""
  curve: dict[float, float] = {}
  for (order, mix), values in losses_of(rows).items():
    if order == "pyramid":
      bits = float(np.mean(mix))
      curve[bits] = min(float(values.mean()), curve.get(bits, math.inf))
  return curve


def _as_pyramid(mix: Mix) -> Mix:
  """Returns the pyramid with as many layers of each width."""
  return next(m for m in mixes(len(mix), "pyramid") if sorted(m) == sorted(mix))


def draw(rows: list[Row], axes: Any) -> None:
  """Draws the loss of every mix over its mean bits, and the pyramid's curve."""
  losses = losses_of(rows)
  for order, mark in zip(ORDERS, "o^<>"):
    own = {mix: values.mean() for (name, mix), values in losses.items() if name == order}
    bits = [np.mean(mix) for mix in own]
    axes.plot(bits, list(own.values()), mark, label=order, markersize=4, alpha=0.7)
  curve = curve_of(rows)
  axes.plot(list(curve), list(curve.values()), "k-", linewidth=0.8)
  axes.set(xlabel="mean bits of a weight", ylabel="loss of mixes, nats per byte")
  axes.legend(frameon=False, fontsize=7)
