"""The study of rotations: its verdicts from made-up rows, and what its rules turn."""

import pytest

from experiments.spinquant import run
from experiments.spinquant.rotating import METHODS, PLACES, place_of, rules_of
from jaxlm.config import decoder
from jaxlm.config.quant import find_spec
from pallas_kernels.common.errors import UserError


def rows_of(hadamard=1.7, learned=1.6, seen=0.0, kurtosis=2.8, noise=0.01, planted=2.0):
  """Returns rows of three seeds with two draws each; `seen` is added on calibration rows."""
  rows = []
  for seed in range(3):
    row = {"seed": seed, "task.draws": 2, "heldout_loss": 1.5, "change by rotations": 1e-5}
    row |= {"before loss": 1.55, "planted loss": planted + 0.02 * seed}
    row |= {"online only loss": 1.9, "folded only loss": 1.8}
    for method in METHODS:
      base = learned if "learned" in method else hadamard
      for index in range(2):
        row[f"{method} {index} loss"] = base + noise * (seed - 1) * (-1) ** index + 0.02 * index
        extra = seen if method == "learned" else 0.0
        row[f"{method} {index} calibration loss"] = base + extra
    for state in ("before", "planted", *METHODS):
      for place in (*PLACES, "largest"):
        row[f"{state} {place} kurtosis"] = kurtosis if state == "Hadamard" else 9.0
    rows.append(row)
  return rows


@pytest.mark.parametrize(
  "rows, verdict, why",
  [
    (rows_of(), "reproduced", "learned ones repair more"),
    (rows_of(seen=0.2), "direction only", "not better on the calibration rows"),
    (rows_of(learned=1.7), "direction only", "within the noise"),
    (rows_of(learned=1.8), "direction only", "not better on the calibration rows"),
    (rows_of(kurtosis=3.1), "direction only", "long tails"),
    (rows_of(hadamard=2.3), "refuted", "lose more"),
    (rows_of(planted=1.71), "undecided", "holds 0"),
  ],
)
def test_the_verdict_follows_the_rows(rows, verdict, why):
  finding = run.conclude(rows)
  assert finding.verdict == verdict and why in finding.why, finding
  assert "R1 to R4, random Hadamard" in "".join(finding.lines)


def test_one_seed_decides_nothing():
  with pytest.raises(UserError, match="seeds=1"):
    run.conclude(rows_of()[:1])


def test_rules_turn_whole_heads_and_whole_feed_forwards():
  model = decoder(V=32, D=16, F=64, N=2, K=2, H=8, layers=2)
  rules = rules_of(model)
  down, gate = (find_spec(rules, f"layers.1.feedforward.{name}") for name in ("down", "gate"))
  assert (down.hadamard, gate.hadamard) == (64, 0)
  assert (find_spec(rules, "cache.0.keys").hadamard, find_spec(rules, "head").weight) == (8, None)
  assert down.weight.bits == gate.activation.bits == 4 and gate.activation.grid == "affine"
  names = ("layers.0.mixer.o", "layers.0.feedforward.down", "layers.0.mixer.k", "head")
  assert [place_of(name) for name in names] == ["heads", "down", "residual", "residual"]
