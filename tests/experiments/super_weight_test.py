"""The study of super weights: its verdicts from made-up rows, planting, published checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments import small_text
from experiments.super_weight import natural, run
from experiments.super_weight.measuring import FACTORS, PRUNED, prune_largest
from experiments.super_weight.planting import MARKERS, plant_super_weight, widened
from jaxlm.config import decoder
from jaxlm.interop import huggingface
from jaxlm.models import Transformer
from jaxlm.quant.super_weight import SuperWeight, find_super_weights, plant, scale_weights
from jaxlm.scaling.sweep import read_table
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MODEL = decoder(V=300, D=16, F=32, N=2, K=2, H=8, layers=3)


def rows_of(pruned=2.0, others=1.9, rounded=1.9, restored=1.8, first=1, count=1, noise=0.01):
  rows = []
  for seed in range(3):
    wobble = noise * (seed - 1)
    row = {"seed": seed, "found": count, "found before": 0, "found planted": first, "z": 9.0}
    row |= {"value": 4.0, "input spike": 900.0, "output spike": 3600.0, "whole loss": 1.7}
    row |= {"pruned loss": pruned + wobble, "rounded loss": rounded + wobble}
    row |= {"clipped loss": 1.85, "restored loss": restored}
    row |= {f"largest {n} pruned loss": others for n in PRUNED}
    row |= {f"scaled {factor:g} loss": 1.7 for factor in FACTORS}
    rows.append(row)
  return rows


@pytest.mark.parametrize(
  "rows, verdict, why",
  [
    (rows_of(), "reproduced", "matters most"),
    (rows_of(pruned=1.7), "direction only", "other weights matter more"),
    (rows_of(pruned=1.9), "direction only", "other weights matter as much"),
    (rows_of(restored=1.9), "direction only", "does not help int4 for sure"),
    (rows_of(pruned=1.7, restored=2.0), "refuted", "A thousand other weights matter more"),
    (rows_of(first=0), "refuted", "does not show"),
    (rows_of(count=4), "undecided", "goes on after two"),
  ],
)
def test_the_verdict_follows_the_rows(rows, verdict, why):
  finding = run.conclude(rows)
  assert finding.verdict == verdict and why in finding.why, finding


def test_a_published_checkpoint_is_listed_and_decides_nothing():
  row = rows_of(pruned=9.0)[0] | {"seed": None, "task.checkpoint": "some/model", "layer": 2}
  finding = run.conclude([*rows_of(), row | {"row": 5, "column": 7}])
  assert finding.verdict == "reproduced"
  assert "some/model: 1 super weights found, the first in layer 2" in "".join(finding.lines)
  with pytest.raises(UserError, match="seeds=0"):
    run.conclude([row])


@functools.cache
def drawn():
  draw = np.random.default_rng(0)
  shapes = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0))
  return jax.tree.map(lambda w: jnp.asarray(0.3 * draw.normal(size=w.shape), jnp.float32), shapes)


def test_the_largest_weights_are_zeroed_and_super_weights_are_not():
  weight = SuperWeight("layers.1.feedforward.down", 3, 5, 50.0, 0.0, 0.0)
  params = scale_weights(MODEL, drawn(), [weight], 1.0)
  pruned = prune_largest(MODEL, params, [weight], 10)
  assert pruned["stacks"]["0"]["0"]["feedforward"]["down"]["weight"][1, 3, 5] == 50.0
  before, after = (
    np.concatenate([x.ravel() for x in jax.tree.leaves(p["stacks"])]) for p in (params, pruned)
  )
  gone = before[(after == 0) & (before != 0)]
  assert len(gone) == 10 and np.abs(gone).min() >= np.sort(np.abs(before))[-11]
  np.testing.assert_array_equal(pruned["head"]["weight"], params["head"]["weight"])


@pytest.mark.slow
def test_a_planted_weight_changes_no_logit_and_is_found():
  ids_BT = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)
  ids_BT[:, 0] = 299
  planted, weight = plant_super_weight(MODEL, drawn(), jnp.asarray(ids_BT))
  wide = widened(MODEL)
  assert wide.D == MODEL.D + MARKERS + 1
  logits = jax.jit(Transformer(wide).apply)(planted, ids_BT)
  want = jax.jit(Transformer(MODEL).apply)(drawn(), ids_BT)
  np.testing.assert_allclose(logits, want, atol=1e-5 * float(jnp.abs(want).max()))
  (first,) = find_super_weights(wide, planted, ids_BT, ratio=15.0)
  assert (first.name, first.row, first.column) == weight[:3]
  np.testing.assert_allclose(first.output_spike, weight.output_spike, rtol=5e-3)
  without = scale_weights(wide, planted, [weight], 0.0)
  changed = jax.jit(Transformer(wide).apply)(without, ids_BT)
  assert float(jnp.abs(changed - want).max()) > 0.01


def save_checkpoint(folder):
  """Writes a model with a super weight in layer 1, and a tokenizer of single bytes."""
  params = jax.tree.map(lambda w: 0.3 * w, drawn())
  feedforward = params["stacks"]["0"]["0"]["feedforward"]
  for name in ("gate", "up"):
    feedforward[name]["weight"] = feedforward[name]["weight"].at[1, :, 3].mul(60.0)
  huggingface.save(folder, MODEL, plant(MODEL, params, 1, 3, 5, 30.0))
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(["<|endoftext|>"])
  made.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_a_checkpoint_joins_the_table_once(tmp_path, monkeypatch):
  save_checkpoint(tmp_path / "model")
  text = tmp_path / "text.txt"
  text.write_text("".join(f"{i} and {i * i % 97}, " for i in range(2000)))
  config = small_text.base("smoke")
  data = dataclasses.replace(config.data, source=str(text), length=32)
  config = dataclasses.replace(config, data=data, eval_batches=2)
  monkeypatch.setattr(natural, "base", lambda scale: config)
  for _ in range(2):
    natural.add_checkpoint([str(tmp_path / "model"), "--out", str(tmp_path)])
  (row,) = read_table(tmp_path / "table.csv")
  assert row["task.checkpoint"] == str(tmp_path / "model")
  assert row["found"] >= 1 and (row["layer"], row["row"], row["column"]) == (1, 3, 5)
  assert row["restored loss"] != row["rounded loss"] and row["whole loss"] > 0
  assert "seeds=0" in (tmp_path / "README.md").read_text()
