"""Timelines say what was simulated."""

from sharding.pipeline import schedules, simulate
from sharding.pipeline.timeline import draw, to_text


def test_text_has_a_bar_for_every_action():
  text = to_text(simulate(schedules.one_f_one_b(2, 2)), width=27)
  assert text.splitlines() == [
    "rank  0 |F0-F1-......X0----...X1----|",
    "rank  1 |...F0-X0----F1-X1----......|",
    "1f1b: 2 ranks, 2 micro-batches, bubble 33.3% of 9, at most 2 live activations",
  ]


def test_figure_has_a_bar_for_every_forward_pass(tmp_path):
  simulations = [simulate(schedules.zb_v(2, 4)), simulate(schedules.dualpipe(2, 4))]
  draw(simulations, tmp_path / "timelines.svg")
  bars = (tmp_path / "timelines.svg").read_text().count("fill: #4c78a8")
  assert bars == 4 * 4 + 2 * 4 + 2  # stages times micro-batches, and two entries of the legend
