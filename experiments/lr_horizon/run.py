"""The best learning rate falls with the training horizon at a fixed batch (arXiv:2409.19913)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.small_text import SETTING, base, minimum, select, shape, train
from experiments.study import Finding, Scale, Study, main
from jaxlm.config import check
from jaxlm.scaling.intervals import interval
from jaxlm.scaling.sweep import Executor, Row

PLANS: dict[Scale, tuple[dict, list[int], list[float], int]] = {
  "smoke": (shape(8, 1), [16, 48, 144], [0.004, 0.016, 0.064], 2),
  "cpu": (shape(24, 1), [76, 304, 1216, 4864], [0.002, 0.004, 0.008, 0.016, 0.032, 0.064], 3),
  "gpu": (shape(128, 8), [125, 500, 2000], [0.001, 0.002, 0.004, 0.008, 0.016, 0.032], 3),
}
"""model, steps, learning rates, seeds"""


def measure(scale: Scale, table: Path, executor: Executor | None) -> None:
  model, steps, rates, seeds = PLANS[scale]
  points = [
    model | {"steps": horizon, "optimizer.learning_rate": rate, "seed": seed}
    for horizon in steps
    for rate in rates
    for seed in range(seeds)
  ]
  train(base(scale, warmup=10), points, table, executor=executor)


def best_rates(rows: list[Row]) -> dict[int, list[float]]:
  """Returns the best learning rate of each seed for every horizon where all seeds have one."""
  best = {}
  for steps in sorted({row["steps"] for row in rows}):
    minima = []
    for seed in sorted({row["seed"] for row in rows}):
      line = select(rows, steps=steps, seed=seed)
      minima.append(
        minimum([r["optimizer.learning_rate"] for r in line], [r["heldout_loss"] for r in line])
      )
    if all(vertex.inside for vertex in minima):
      best[steps] = [vertex.x for vertex in minima]
  return best


def conclude(rows: list[Row]) -> Finding:
  best = best_rates(rows)
  check(len(best) >= 3, "horizons", len(best), "three with an interior minimum are needed")
  tokens = {row["steps"]: row["tokens"] for row in rows}
  log_D = np.log([tokens[steps] for steps in best])
  slopes = np.polyfit(log_D, np.log(list(best.values())), 1)[0]
  mean, low, high = interval(slopes)
  if low <= -0.32 <= high and high < 0:
    verdict, why = "reproduced", "The interval of the exponent lies below 0 and holds -0.32."
  elif high < 0:
    verdict, why = "direction only", "The best rate falls, but not with an exponent of -0.32."
  elif low > 0:
    verdict, why = "refuted", "The best rate rises with the horizon."
  else:
    verdict, why = "undecided", "The interval of the exponent holds 0."
  lines = [
    f"D = {tokens[steps]:.3g} bytes: best learning rate {np.exp(np.mean(np.log(rates))):.4f} "
    f"(seeds {', '.join(f'{rate:.4f}' for rate in rates)})"
    for steps, rates in best.items()
  ]
  ours, between = f"exponent {mean:.3f}", f"{low:.3f} to {high:.3f}, 95 % over {len(slopes)} seeds"
  return Finding(ours=ours, interval=between, verdict=verdict, why=why, lines=tuple(lines))


def draw(rows: list[Row], figure: Any) -> None:
  losses, line = figure.subplots(1, 2)
  for steps in sorted({row["steps"] for row in rows}):
    of_horizon = select(rows, steps=steps)
    rates = sorted({row["optimizer.learning_rate"] for row in of_horizon})
    means = [
      np.mean([r["heldout_loss"] for r in select(of_horizon, optimizer_learning_rate=x)])
      for x in rates
    ]
    losses.plot(rates, means, ".-", label=f"{of_horizon[0]['tokens']:.2g}")
  losses.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats per byte")
  losses.legend(title="training bytes", frameon=False, loc="upper center", ncols=2)
  losses.set_ylim(top=losses.get_ylim()[1] + 0.4)
  tokens = {row["steps"]: row["tokens"] for row in rows}
  best = best_rates(rows)
  log_D = np.log([tokens[steps] for steps in best])
  log_rates = np.log(list(best.values())).T
  for log_rates_of_seed in log_rates:
    line.plot(np.exp(log_D), np.exp(log_rates_of_seed), "k.")
  slope, _ = np.polyfit(log_D, log_rates.mean(0), 1)
  for exponent, style, name in ((slope, "k-", "fit"), (-0.32, "k:", "published")):
    fitted = log_rates.mean() + exponent * (log_D - log_D.mean())
    line.plot(np.exp(log_D), np.exp(fitted), style, label=f"{name}: D^{exponent:.2f}")
  line.set(xscale="log", yscale="log", xlabel="training bytes D", ylabel="best learning rate")
  ticks = [0.006, 0.01, 0.02, 0.03]
  line.set_yticks(ticks, [f"{rate:g}" for rate in ticks])
  line.minorticks_off()
  line.legend(frameon=False)


STUDY = Study(
  name="lr_horizon",
  title="The best learning rate over the training horizon",
  source="arXiv:2409.19913, section 3",
  claim="At a fixed batch, the best peak learning rate falls with the number of training tokens.",
  published="LR* = B D^-0.32 for models up to 2.7 billion parameters and 800 billion tokens.",
  setting=f"{SETTING} One model (D 24, one layer, 13 thousand parameters with the head; on a GPU D "
  "128, 8 layers), horizons of 7.8e4 to 5.0e6 bytes (64 times), 6 rates from 0.002 to 0.064, 3 "
  "seeds for weights and data order; batch 1,024 bytes, warm-up 10 steps. A parabola in ln LR "
  "through the rates within 1.5 of the best gives each seed's LR* at each horizon, a line in ln D "
  "its exponent; the interval is Student's t over seeds.",
  refuted_by="Reproduced: the 95 % interval lies below 0 and holds -0.32. Direction only: below 0 "
  "without -0.32. Refuted: above 0. Undecided: it holds 0, or fewer than three horizons have their "
  "minimum inside the grid.",
  cannot_show="That the exponent holds for large models: published ones vary with size and batch, "
  "and along the jointly best batch the rate rises with D (arXiv:2503.04715).",
  measure=measure,
  conclude=conclude,
  draw=draw,
)

if __name__ == "__main__":
  main(STUDY)
