"""The study of eff: its verdicts from made-up rows, and the published table fitted again."""

import math

import pytest

from experiments.quest_scaling import efficiency, run
from jaxlm.scaling.laws import SumLaw
from jaxlm.scaling.precision import PANFEROV
from pallas_kernels.common.errors import UserError

LAW = SumLaw(E=1.0, A=6.0, B=60.0, alpha=0.25, beta=0.35, counts="body", source="made up")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  monkeypatch.setattr(efficiency, "SAMPLES", 40)


def rows_of(eff, sizes=(2600, 5200, 10300, 20600), noise=1e-3):
  """Returns rows of two seeds, and short runs of the largest size, in which bits cost nothing."""
  rows = []
  for name, worth in ({"16": 1.0} | efficiency.PUBLISHED | eff).items():
    method, _, precision = name.rpartition(" ")
    for N in sizes:
      for ratio in (1.5, 20, 60)[N < max(sizes) :]:
        for seed in (0, 1):
          loss = LAW.loss(N * (1 if ratio < 2 else worth), ratio * N)
          loss *= 1 + noise * math.sin(7 * N + 3 * ratio + 5 * seed + 11 * worth)
          row = {"task.method": method or None, "task.precision": precision, "seed": seed}
          row |= {"heldout_loss": loss, "bits_per_byte": loss, "tokens": ratio * N, "body": N}
          unused = {"head": 1, "embedding": 1, "flops": 1.0, "optimizer.learning_rate": 0.01}
          rows.append(row | unused)
  return rows


@pytest.mark.parametrize(
  "eff, verdict, why",
  [
    ({}, "reproduced", "QuEST most of the methods"),
    ({"LSQ W2A2": 0.1519}, "direction only", "QuEST against LSQ is not decided"),
    ({"QuEST W3A3": 0.5188}, "undecided", "of resamples"),
    ({"QuEST W2A2": 0.6}, "refuted", "Per bit 2 bits are worth most"),
    ({"LSQ W2A2": 0.3, "LSQ W4A4": 0.9}, "refuted", "less than LSQ at 2 and at 4"),
  ],
)
def test_the_verdict_follows_the_rows(eff, verdict, why):
  finding = run.conclude(rows_of(eff))
  assert finding.verdict == verdict and why in finding.why, finding
  assert "eff within 0.01 of the printed values" in finding.lines[0]
  assert any(line.startswith("QuEST W1A1: eff 0.0") for line in finding.lines)


def test_the_published_table_gives_the_published_values():
  ours = efficiency.refit().law.efficiency
  for name, value in PANFEROV.efficiency.items():
    assert ours[name] == pytest.approx(value, abs=0.01), name


def test_runs_that_are_too_short_show_no_gap_and_are_no_part_of_the_law():
  rows = rows_of({}, noise=0.0)
  assert len(efficiency.fit(rows)[0].runs) == len(rows) - 2 * (1 + len(efficiency.PUBLISHED))
  gap = efficiency.gaps(rows, "QuEST W2A2")
  assert list(gap) == [1.5, 20, 60] and gap[1.5] == 0 and gap[20] == pytest.approx(gap[60]) != 0


def test_too_few_sizes_or_cells_decide_nothing():
  rows = rows_of({})
  with pytest.raises(UserError, match="sizes=3: the law needs four"):
    run.conclude([row for row in rows if row["body"] > 3000])
  with pytest.raises(UserError, match="cells='QuEST FP4': are needed"):
    run.conclude([row for row in rows if row["task.precision"] != "FP4"])
