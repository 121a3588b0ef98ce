"""The study of the hybrid: its verdicts from made-up rows, its rows, and what decoding costs."""

import pytest

from experiments.kda_hybrid import run
from experiments.kda_hybrid.decode import measure_decode
from experiments.synthetic import cache_numbers
from pallas_kernels.common.errors import UserError

SOLVED = {"full": 0.8, "3 kda + 1 full": 0.9, "kda": 0.88, "decay only": 0.5}
UNLEARNT = {"full": 0.45, "3 kda + 1 full": 0.1, "kda": 0.1, "decay only": 0.1}
TIMES = {"full": 5.0, "3 kda + 1 full": 2.0, "kda": 1.1}


def rows_of(recall, times, memory=0.255, unlearnt=()):
  rows = [
    {"task.task": task, "task.layers": layers, "seed": seed}
    | {"accuracy": UNLEARNT[layers] if task in unlearnt else accuracy + 0.01 * seed}
    for task in run.TASKS
    for layers, accuracy in recall.items()
    for seed in (0, 1)
  ]
  bytes_of = {"full": 1.0, "3 kda + 1 full": memory, "kda": 0.01}
  for layers, growth in times.items():
    for context in (1024, 65536):
      long = context > 1024
      row = {"milliseconds": growth if long else 1.0, "bytes": 1e9 * bytes_of[layers]}
      rows.append({"task.layers": layers, "task.context": context} | row)
  return rows


@pytest.mark.parametrize(
  "recall, times, memory, verdict",
  [
    ({}, {}, 0.255, "reproduced"),
    ({"decay only": 0.87}, {}, 0.255, "direction only"),
    ({"decay only": 0.95}, {}, 0.255, "refuted"),
    ({"3 kda + 1 full": 0.7}, {}, 0.255, "refuted"),
    ({}, {"kda": 2.0}, 0.255, "refuted"),
    ({}, {}, 0.4, "refuted"),
  ],
)
def test_the_verdict_follows_the_rows(recall, times, memory, verdict):
  finding = run.conclude(rows_of(SOLVED | recall, TIMES | times, memory))
  assert finding.verdict == verdict
  assert any(line.startswith("a token of kda: 1.00 ms and 10.00 MB") for line in finding.lines)


@pytest.mark.parametrize(
  "recall, times, unlearnt, verdict",
  [
    ({}, {}, ("stack",), "direction only"),
    ({"3 kda + 1 full": 0.7}, {}, ("stack",), "refuted"),
    ({}, {}, run.TASKS, "undecided"),
    ({}, {"kda": 2.0}, run.TASKS, "refuted"),
  ],
)
def test_a_task_that_nothing_learns_is_named_and_left_out(recall, times, unlearnt, verdict):
  rows = rows_of(SOLVED | recall, TIMES | times, unlearnt=unlearnt)
  finding = run.conclude(rows)
  assert finding.verdict == verdict
  assert "stack: no layers have learnt it" in finding.lines
  palindrome = finding.lines[0]
  assert palindrome.endswith("learnt it") == ("palindrome" in unlearnt)
  figure = pytest.importorskip("matplotlib.figure").Figure()
  run.draw(rows, figure)  # of whatever was measured
  assert len(figure.axes) == 3


def test_a_line_of_each_task_says_what_erasing_and_full_attention_do():
  (line, *_) = run.conclude(rows_of(SOLVED | {"3 kda + 1 full": 0.7}, TIMES)).lines
  assert (
    line.startswith("palindrome: erasing helps, +0.380") and "hybrid is worse than full" in line
  )


def test_missing_rows_decide_nothing():
  with pytest.raises(UserError, match="two seeds or more"):
    run.conclude(rows_of({"kda": 0.9}, TIMES))


@pytest.mark.parametrize("task, answers", [("palindrome", 16), ("mqar", 4), ("stack", None)])
def test_each_task_has_its_rows(task, answers):
  config, made = run.make_task(run.answers_config(steps=40, batch=8, length=32), task, "kda", "cpu")
  names = [type(spec.mixer).__name__ for spec in config.model.layer_specs]
  assert names == ["ConvConfig"] + ["KdaConfig"] * 4
  batch = next(made.batches(slice(0, 8)))
  assert batch.inputs_BT.shape == (8, 32) and batch.inputs_BT.max() < 32
  counts = batch.weights_BT.sum(axis=1)
  assert (counts == answers).all() if answers else 8 < counts.sum() < 8 * 8


def test_the_cache_grows_with_the_context_in_the_layers_of_attention_alone():
  hybrid, kda = (run.decode_model(layers, 32) for layers in ("3 kda + 1 full", "kda"))
  assert cache_numbers(hybrid, 64) - cache_numbers(hybrid, 32) == 32 * 2 * 32
  assert cache_numbers(kda, 64) == cache_numbers(kda, 32)


@pytest.mark.slow
def test_a_token_is_timed_with_the_cache_that_it_reads():
  model = run.decode_model("3 kda + 1 full", 32)
  measured = measure_decode(model, 64, "float32")
  assert measured["bytes"] == 4 * cache_numbers(model, 64) and measured["milliseconds"] > 0
