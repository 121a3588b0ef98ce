"""The study of training in FP8 and FP4: its verdicts from made-up rows, its arms, its blocks."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments.low_precision_training import arms, blocks, run
from jaxlm.config.formats import BlockFormat, Fp8Format
from jaxlm.config.quant import QuantSpec, find_spec
from jaxlm.scaling.grid import GridRun
from jaxlm.scaling.sweep import read_table
from pallas_kernels.common.errors import UserError

GAINS = {"hadamard": 0.1, "stochastic": 0.2, "squares": -0.05, "last layer": 0.4}
"""what each part takes from the loss of 4 bits, in per cent of bf16's"""


def rows_of(fp8=0.1, fp4=1.8, gains=GAINS, noise=0.02):
  """Rows with losses so many per cent above bf16's, and with what two parts do together."""
  rows = []
  for index, (format, parts) in enumerate(arms.ARMS):
    words = parts.split("+")
    above = {"plain": 0.0, "fp8": fp8}.get(format)
    if above is None:
      alike = ("hadamard" in words) == ("stochastic" in words)
      above = fp4 + (0.07 if alike else -0.07) - sum(gains.get(word, 0.0) for word in words)
    for seed in range(3):
      off = above + noise * math.sin(7 * index + 3 * seed) * (index > 0)
      loss = (2 + 0.1 * seed) * (1 + off / 100)
      row = {"task.format": format, "task.parts": parts, "seed": seed, "heldout_loss": loss}
      rows.append(row | {"imbalance": 1.5 if format == "plain" else None})
  for format in blocks.FORMATS:
    for x in blocks.IMBALANCES:
      row = {"task.format": format, "task.imbalance": x, "tiles": 0.1, "squares": 0.1 * (1 + x)}
      rows.append(row)
  return rows


@pytest.mark.parametrize(
  "planted, verdict",
  [
    ({}, "reproduced"),
    ({"fp8": 0.8}, "refuted"),
    ({"fp4": 3.0}, "refuted"),
    ({"gains": {part: -gain for part, gain in GAINS.items()}}, "refuted"),
    ({"fp8": 0.5}, "direction only"),
    ({"fp4": 0.8, "gains": {}}, "undecided"),
  ],
)
def test_the_verdict_follows_the_rows(planted, verdict):
  finding = run.conclude(rows_of(**planted))
  assert finding.verdict == verdict, finding
  assert finding.ours and finding.interval and finding.why
  assert any("spread by 1.50" in line for line in finding.lines)
  assert any("from a spread of 1.00 on" in line and "inf" in line for line in finding.lines)


def test_the_effect_of_a_part_is_found_whatever_pairs_of_parts_do():
  rows = rows_of(noise=0.0)
  for format in arms.FP4:
    for part, gain in GAINS.items():
      np.testing.assert_allclose(run.effect(rows, format, part), [-gain] * 3, atol=1e-9)


def test_a_table_without_an_arm_says_nothing():
  rows = [row for row in rows_of() if row.get("task.parts") != arms.PAIRS[0]]
  with pytest.raises(UserError, match="of mxfp4, hadamard.stochastic"):
    run.conclude(rows)


def test_arms_differ_and_have_the_parts_that_they_name():
  specs = {arm: arms.rules_of(*arm, layers=3, size=32) for arm in arms.ARMS[2:]}
  assert len(set(specs.values())) == len(specs)
  full = specs["nvfp4", arms.RECIPE]
  assert find_spec(full, "layers.2.mixer.q") == find_spec(full, "head") == QuantSpec()
  product = find_spec(full, "layers.1.mixer.q").product
  assert product.weight == BlockFormat(elements="nvfp4", shared="block")
  assert product.gradient == BlockFormat(elements="nvfp4", stochastic=True)
  assert product.hadamard == 16 and product.activation == BlockFormat(elements="nvfp4")
  bare = find_spec(specs["mxfp4", arms.NONE], "layers.2.mixer.q").product
  assert {bare.weight, bare.activation, bare.gradient} == {BlockFormat()} and bare.hadamard == 0
  tiles = find_spec(specs["fp8", "tiles"], "layers.0.mixer.q").product
  assert tiles.weight == Fp8Format(shared="block", size=32)
  assert tiles.gradient == tiles.activation == Fp8Format(size=32)
  square = find_spec(specs["fp8", "square gradients"], "layers.0.mixer.q").product
  assert square.gradient == tiles.weight and square.activation == tiles.activation


def test_squares_lose_small_tokens_and_tiles_do_not():
  even, uneven = (blocks.token_error("fp8", imbalance) for imbalance in (0.0, 5.0))
  assert even["squares"] < 1.1 * even["tiles"] < 0.04
  assert uneven["tiles"] == pytest.approx(even["tiles"], rel=0.01) and uneven["squares"] > 0.9


def test_the_threshold_lies_between_neighbours_or_nowhere():
  assert blocks.threshold([0.0, 1.0, 2.0], [1.0, 1.0, 4.0]) == pytest.approx(1.5)
  assert blocks.threshold([0.0, 1.0], [3.0, 4.0]) == 0.0
  assert blocks.threshold([0.0, 1.0], [1.0, 1.9]) == math.inf


def test_the_committed_table_has_every_row_of_the_plan(monkeypatch):
  rows = {row["config"] for row in read_table(Path(run.__file__).parent / "table.csv")}
  if not rows:
    pytest.skip("the study has not been run")
  planned = []

  def record(config, points, table, **_):
    planned.extend(GridRun.of(config, point).digest for point in points)

  monkeypatch.setattr(run.small_text, "train", record)
  monkeypatch.setattr(run, "measure_points", lambda *_: None)
  run.STUDY.measure("cpu", Path("nowhere"), None)
  assert len(planned) == 3 * len(arms.ARMS) and [d for d in planned if d not in rows] == []
