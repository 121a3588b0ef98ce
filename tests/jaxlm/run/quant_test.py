"""Runs with rules: the table at the start, what the first step refuses, and rules for the rest."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoint.folder import checkpoint_path
from jaxlm.cli import main
from jaxlm.config import MeshConfig, QuantRule, QuantSpec
from jaxlm.config.formats import LsqFormat, UniformFormat
from jaxlm.data.loader import load_text
from jaxlm.models import Transformer
from jaxlm.presets import micro
from jaxlm.quant import apply, lsq, uniform
from jaxlm.quant.scales import learned_scales
from jaxlm.recipes import load_rules
from jaxlm.run import SavedRun, train
from jaxlm.run.quantize import heldout_ids
from jaxlm.run.restore import restore_or_init
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.text import TextTask
from pallas_kernels.common.errors import UserError
from sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

RULES = (QuantRule(match="layers.*", spec=QuantSpec(weight=UniformFormat(bits=8))),)


def config_of(path, corpus, rules, steps=1):
  config = micro()
  return dataclasses.replace(
    config,
    steps=steps,
    batch=2,
    mesh=MeshConfig(data=1),
    eval_every=0,
    eval_batches=1,
    run=str(path),
    model=dataclasses.replace(config.model, quant=rules, D=16, V=257),
    data=dataclasses.replace(config.data, source=str(corpus), length=16),
    optimizer=dataclasses.replace(config.optimizer, warmup=0),
  )


@pytest.mark.slow
def test_a_run_says_its_formats_and_goes_on_under_other_rules(tmp_path, corpus, capsys):
  path = tmp_path / "run"
  train(config_of(path, corpus, RULES))
  printed = capsys.readouterr().out
  assert "matmuls: layers.0-1.mixer.q" in printed and "float32 * int8 symmetric per row" in printed
  folder = RunFolder(path)
  lines = json.loads(folder.environment.read_text())[-1]["matmuls"]
  assert lines[1].startswith("layers.0-1.mixer.q") and lines[-1].startswith("head")
  values = json.loads(folder.config.read_text())
  values["model"]["quant"][0]["spec"]["weight"]["bits"] = 4
  folder.config.write_text(json.dumps(values))
  assert main(["resume", str(path), "--steps", "2"]) == 0
  printed = capsys.readouterr().out
  assert "float32 * int4 symmetric per row" in printed
  assert "differs from the start before" in printed and "bits: 8 -> 4" in printed


def test_a_gradient_that_is_all_zero_ends_the_first_step(tmp_path, corpus, monkeypatch):
  plain = uniform.quantize

  def underflows(x, format):
    return jnp.zeros_like(x) if format.bits == 5 else plain(x, format)

  monkeypatch.setattr(uniform, "quantize", underflows)
  spec = QuantSpec(gradient=UniformFormat(bits=5))
  path = tmp_path / "run"
  with pytest.raises(
    UserError, match=r"layers.0.mixer.k, layers.1.mixer.k: the gradient of its weight is all zero"
  ):
    train(config_of(path, corpus, (QuantRule(match=".*mixer[.]k", spec=spec),)))
  assert not path.exists()


def test_a_rule_that_decides_nothing_ends_a_run_before_it_starts(tmp_path, corpus):
  rules = (QuantRule(match="layers[.]9.*"),)
  with pytest.raises(UserError, match="matches none of the names"):
    train(config_of(tmp_path / "run", corpus, rules))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_learned_scales_start_from_the_first_batch_and_are_packed_and_sampled(
  tmp_path, corpus, capsys
):
  """From training through bytes to text, by the commands."""
  flags = "--steps 1 --batch 2 --eval_every 0 --eval_batches 1 --mesh.data 1 --optimizer.warmup 0"
  flags += f" --data.length 16 --data.source {corpus} --run {tmp_path / 'run'}"
  flags += " --quantize lsq:4:8 --optimizer.learning_rate 1e-9 --ema 0.9"
  assert main(["train", "micro", *flags.split()]) == 0
  saved = SavedRun.open(tmp_path / "run")
  steps = saved.params["stacks"]["0"]["0"]["feedforward"]["down"]["activation_step"]
  assert steps.shape == (2, 1) and (0 < steps).all()
  normal = apply.init_scales(apply.unit_normal(), LsqFormat(bits=8))["step"]
  assert (steps < 0.5 * float(normal[0])).all()  # these inputs are small, and were looked at
  capsys.readouterr()
  assert main(["quantize", str(tmp_path / "run"), str(tmp_path / "small")]) == 0
  printed = capsys.readouterr().out
  assert "LSQ int8 symmetric per tensor * LSQ int4 symmetric per tensor" in printed
  assert "packed weights: 18,432 in 9,272 bytes" in printed  # 14 steps of 4 bytes
  losses = []
  for name in ("run", "small"):
    assert main(["eval", str(tmp_path / name), "--batches", "1"]) == 0
    losses.append(capsys.readouterr().out.partition("held-out loss ")[2][:6])
  assert losses[0] == losses[1]
  assert main(["sample", str(tmp_path / "small"), "--max_new", "2"]) == 0
  assert main(["describe", str(tmp_path / "run"), "--recipe", "int4:16"]) == 0
  printed = capsys.readouterr().out
  assert "5.000 bits each" in printed and "whole model:" in printed
  assert "layers.1" in printed and "normal values have 3" in printed


@pytest.mark.slow
def test_scales_of_rules_that_are_new_start_where_a_run_goes_on(tmp_path, corpus, capsys):
  """What the checkpoint has is restored: weights, average, moments, key and place in the text."""
  path, flags = tmp_path / "run", ["--mesh.data", "1", "--steps"]
  train(dataclasses.replace(config_of(path, corpus, (), steps=2), ema=0.9))
  capsys.readouterr()
  folder = RunFolder(path)
  config = dataclasses.replace(folder.read_config(), steps=4)
  checkpoint = checkpoint_path(folder.checkpoints, 2)
  rules = load_rules("lsq:4:8")
  quantized = dataclasses.replace(config, model=dataclasses.replace(config.model, quant=rules))
  text = load_text(config.data)
  with jax.set_mesh(make_mesh(config.mesh)):
    before, batches = restore_or_init(config, TextTask(config, text), checkpoint)
    after, same = restore_or_init(quantized, TextTask(quantized, text), checkpoint)
  assert same.get_state() == batches.get_state()
  names = learned_scales(quantized.model)
  assert all(name in capsys.readouterr().out for name in list(names)[:1])

  def split(state):
    leaves = jax.tree_util.tree_leaves_with_path(state._replace(key=jax.random.key_data(state.key)))
    named = {jax.tree_util.keystr(key): np.asarray(x) for key, x in leaves}
    new = {name for name in named if "_step" in name}
    return {n: x for n, x in named.items() if n not in new}, {n: named[n] for n in new}

  (old, none), (kept, new) = split(before), split(after)
  chex.assert_trees_all_equal(kept, old)
  assert not none and len(new) == 4 * len(names)  # parameters, average and two moments
  for name, value in new.items():
    assert (value == 0).all() if ".opt_state" in name else (value > 0).all(), name
  down = after.params["stacks"]["0"]["0"]["feedforward"]["down"]
  want = [lsq.init_scales(w.T, LsqFormat(bits=4))["step"] for w in down["weight"]]
  chex.assert_trees_all_close(down["weight_step"], jnp.stack(want))
  assert (down["activation_step"] < 0.1).all()  # of the batch, whose values are small there

  assert main(["resume", str(path), *flags, "3", "--quantize", "lsq:4:8"]) == 0
  assert "scales that the checkpoint lacks start anew: stacks.0.0" in capsys.readouterr().out
  assert main(["resume", str(path), *flags, "4"]) == 0
  assert "start anew" not in capsys.readouterr().out
  for recipe, words in (("lsq:2:8", "int4 symmetric per tensor -> LSQ int2"), ("int8", "-> none")):
    assert main(["resume", str(path), *flags, "5", "--quantize", recipe]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_calibration_keeps_the_logits_closer_than_rounding_to_the_nearest(tmp_path, corpus, capsys):
  path = tmp_path / "run"
  train(config_of(path, corpus, ()))
  assert main(["quantize", str(path), str(tmp_path / "a"), "--text", str(corpus)]) == 2
  assert "is for --method gptq, awq and omniquant" in capsys.readouterr().err
  flags = ["--method", "gptq"]
  assert main(["quantize", str(path), str(tmp_path / "a"), "--recipe", "lsq:4:4", *flags]) == 2
  assert "equally spaced levels that are not learned" in capsys.readouterr().err
  saved = SavedRun.open(path)
  ids_BT = heldout_ids(saved)

  def logits(saved):
    return jax.jit(Transformer(saved.config.model).apply)(saved.params, ids_BT)

  want = logits(saved)
  for recipe, methods in (("int4:16", ("gptq", "awq")), ("affine:2", ("omniquant",))):
    errors = []
    for method in ("nearest", *methods):
      target = tmp_path / f"{recipe[:3]}_{method}"
      assert main(["quantize", str(path), str(target), "--recipe", recipe, "--method", method]) == 0
      errors.append(float(jnp.linalg.norm(logits(SavedRun.open(target)) - want)))
    assert max(errors[1:]) < 0.98 * errors[0], (methods, errors)


def test_a_recipe_that_does_not_exist_is_named(capsys):
  assert main(["describe", "micro", "--recipe", "qest:4"]) == 2
  assert "nearest: quest" in capsys.readouterr().err
  assert main(["describe", "micro", "--recipe", "int4:a"]) == 2
  assert main(["describe", "micro", "--recipe", "int8"]) == 0
  assert "int8 symmetric per row" in capsys.readouterr().out
