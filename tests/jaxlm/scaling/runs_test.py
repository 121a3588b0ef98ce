"""Records of runs: what they count, what they refuse, and how tables of others are read."""

import dataclasses

import pytest

from jaxlm import presets
from jaxlm.scaling.flops import parameter_count
from jaxlm.scaling.published import chinchilla, datablations, gemstones, quest
from jaxlm.scaling.runs import Run, check_comparable, column, read_runs, run_of


def test_counts_of_a_run_of_ours():
  config = presets.micro()
  run = run_of(config, loss=2.0, tokens=1e6, bits_per_byte=2.9)
  parts = parameter_count(config.model)
  assert run.parameters("total") == parts.total
  assert run.parameters("body+head") == run.parameters("body") + config.model.D * config.model.V
  assert run.flops > run.six_n_d("body") and run.parameters("effective") * 6e6 == run.flops


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(loss=float("nan")), "loss=nan: must be a positive, finite number"),
    (dict(loss=0.0), "loss=0.0: must be a positive"),
    (dict(tokens=-1.0), "tokens=-1.0"),
    (dict(total=float("inf")), "total=inf: must be a finite number"),
    (dict(unique_tokens=2e9), r"unique_tokens=2000000000.0: must not exceed tokens=1e\+09"),
    (dict(unique_tokens=0.0), "unique_tokens=0.0: must be positive"),
  ],
)
def test_impossible_runs(fields, message):
  with pytest.raises(ValueError, match=message):
    Run(**{"loss": 3.0, "tokens": 1e9, **fields})


def test_counts_that_a_table_does_not_know_are_refused():
  run = Run(loss=3.0, tokens=1e9, body=1e8)
  with pytest.raises(ValueError, match=r"counts='body\+head': this table of runs has body"):
    run.parameters("body+head")
  with pytest.raises(ValueError, match="flops=None: must be known"):
    run.parameters("effective")
  with pytest.raises(ValueError, match="flops=None: is not known of 1 of 1 runs"):
    column([run], "flops")


def test_a_table_of_ones_own(tmp_path):
  table = tmp_path / "runs.csv"
  table.write_text("val,d,n,seed\n3.1,1e9,1e7,2\n2.9,2e9,,0\n")
  columns = {"loss": "val", "tokens": "d", "total": "n", "seed": "seed"}
  first, second = read_runs(table, columns, tokenizer="t")
  assert first == Run(loss=3.1, tokens=1e9, total=1e7, seed=2, tokenizer="t")
  assert second.total is None
  with pytest.raises(ValueError, match="columns='loss_': runs.csv has val, d, n, seed"):
    read_runs(table, columns | {"loss": "loss_"})
  with pytest.raises(ValueError, match="columns='los': must be one of loss, tokens"):
    read_runs(table, {"los": "val"})
  table.write_text("val,d\n3.1,1e9\nnan,1e9\n")
  with pytest.raises(ValueError, match="runs.csv, line 3: loss=nan"):
    read_runs(table, {"loss": "val", "tokens": "d"})
  table.write_text("val,d\n3.1,ten\n")
  with pytest.raises(ValueError, match="runs.csv, line 2: could not convert"):
    read_runs(table, {"loss": "val", "tokens": "d"})
  table.write_text("val,d\n")
  with pytest.raises(ValueError, match="has no rows"):
    read_runs(table, {"loss": "val", "tokens": "d"})
  with pytest.raises(ValueError, match="there is no such file"):
    read_runs(tmp_path / "none.csv", {"loss": "val"})


def test_published_tables_are_whole():
  assert (len(datablations()), len(gemstones()), len(quest())) == (182, 159, 88)
  assert all(run.unique_tokens <= run.tokens for run in datablations())


def test_a_table_without_a_licence_is_checked_by_its_digest(tmp_path):
  other = tmp_path / "svg_extracted_data.csv"
  other.write_text("loss\n")
  with pytest.raises(ValueError, match="has SHA-256 .*, not 193478df4e90"):
    chinchilla(other)


def test_faults_of_a_table_are_named():
  runs = [Run(loss=3.0, tokens=1e9, body=N, head=1e6, learning_rate=1e-3) for N in (1e6, 9e6)]
  rate, head = check_comparable(runs, "body")
  assert rate.startswith("one learning rate for sizes 9 times apart")
  assert head.startswith("N leaves out the head, up to 50% of what costs FLOPs")
  (rate,) = check_comparable(runs, "body+head")
  assert "5 times" in rate
  tuned = [dataclasses.replace(run, learning_rate=1 / run.body) for run in runs]
  assert check_comparable(tuned, "body+head") == []
