"""The command line on checkpoint folders: convert both ways, train from one, sample from one."""

import dataclasses
import json
import shutil
import string

import chex
import jax
import numpy as np
import pytest
import tokenizers

from jaxlm import presets
from jaxlm.cli import main
from jaxlm.config import DataConfig
from jaxlm.data.loader import load_text, train_loader
from jaxlm.data.tokenizer import train_bpe
from jaxlm.decode import Sampler, generate
from jaxlm.interop import huggingface
from jaxlm.run.convert import FIRST_POSITION, convert
from jaxlm.run.run_folder import RunFolder, read_records
from jaxlm.run.saved_run import SavedRun
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.fixture(scope="module")
def tokenizer():
  """One token per printable ASCII character; a text begins with <s> and ends with </s>."""
  vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *string.printable])}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  model.decoder = tokenizers.decoders.Fuse()
  model.add_special_tokens(["<s>", "</s>"])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  return model


@pytest.fixture
def folder(checkpoint, tokenizer, tmp_path):
  """A checkpoint with its tokenizer.json."""
  path = tmp_path / "published"
  shutil.copytree(checkpoint("qwen2").folder, path)
  tokenizer.save(str(path / "tokenizer.json"))
  return path


def read(path):
  return (path / "model.safetensors").read_bytes()


def test_sampling_from_a_checkpoint_continues_after_its_first_token(folder, checkpoint, capsys):
  c = checkpoint("qwen2")
  assert (
    main(["sample", str(folder), "--prompt", "abc", "--max-new", "12", "--temperature", "0"]) == 0
  )
  prompt_ids = [0, *(2 + string.printable.index(letter) for letter in "abc")]
  tokens = ["<s>", "</s>", *string.printable]
  drawable_V = np.arange(c.config.V) < len(tokens)
  greedy = Sampler(temperature=0.0)
  options = {"max_new": 12, "sampler": greedy, "eos": 1, "drawable_V": drawable_V}
  ids = generate(c.config, c.params, [prompt_ids], **options)[0].tolist()
  kept = ids[: ids.index(1)] if 1 in ids else ids
  assert capsys.readouterr().out == "abc" + "".join(tokens[i] for i in kept) + "\n"


def test_checkpoint_to_run_and_back_is_bit_for_bit(folder, tmp_path, capsys):
  assert main(["convert", str(folder), str(tmp_path / "run")]) == 0
  assert "a run of" in capsys.readouterr().out
  assert main(["convert", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
  before, after = (
    json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back")
  )
  assert huggingface.load(tmp_path / "back")[0] == huggingface.load(folder)[0]
  assert before["model_type"] == after["model_type"]
  assert (tmp_path / "back" / "tokenizer.json").is_file()
  left, right = (huggingface.load(path)[1] for path in (folder, tmp_path / "back"))
  chex.assert_trees_all_equal(left, right)
  assert (
    main(["convert", str(tmp_path / "run"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
  )
  halves = jax.tree.leaves(huggingface.load(tmp_path / "half")[1])
  assert {leaf.dtype for leaf in halves} == {jax.numpy.dtype("bfloat16")}
  assert len(read(tmp_path / "half")) < 0.6 * len(read(tmp_path / "back"))


def test_converting_refuses(folder, tmp_path, capsys):
  assert main(["convert", str(folder), str(folder)]) == 2
  assert "must be a new or empty folder" in capsys.readouterr().err
  with pytest.raises(UserError, match="dtype='bfloat16': weights of a run are float32"):
    convert(folder, tmp_path / "x", dtype="bfloat16")
  assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "x")]) == 2
  assert f"{tmp_path / 'absent'}: no such folder; a model on the Hub" in capsys.readouterr().err
  (folder / "tokenizer.json").unlink()
  assert main(["convert", str(folder), str(tmp_path / "x")]) == 2
  assert "tokenizer.json" in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_a_run_begins_where_its_loader_does(corpus):
  config = DataConfig(source=str(corpus), length=16, holdout=0.3)
  assert train_loader(load_text(config), batch=2, seed=0).get_state() == FIRST_POSITION


@pytest.mark.slow
def test_training_goes_on_from_the_weights(folder, corpus, tmp_path, capsys):
  """A learning rate of almost nothing leaves the weights and the loss."""
  flags = [
    "--run",
    str(tmp_path / "run"),
    "--steps",
    "2",
    "--data.source",
    str(corpus),
    "--data.length",
    "32",
  ]
  flags += ["--data.holdout", "0.3", "--optimizer.learning-rate", "1e-9", "--optimizer.warmup", "0"]
  assert main(["train", "micro", "--init", str(folder), *flags]) == 0
  run = SavedRun.open(tmp_path / "run")
  config, params = huggingface.load(folder)
  assert run.config.model == config and run.step == 2
  chex.assert_trees_all_close(run.params, params, atol=1e-6)
  losses = [
    json.loads(line)["loss"]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] > 4
  assert main(["resume", str(tmp_path / "run"), "--steps", "3"]) == 0
  assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
  assert huggingface.load(tmp_path / "out")[0] == config


def test_a_converted_run_starts_from_the_tuning_preset_and_the_flags(folder, corpus, tmp_path):
  flags = ["--data.source", str(corpus), "--optimizer.learning_rate", "2e-5"]
  assert main(["convert", str(folder), str(tmp_path / "run"), *flags]) == 0
  config = RunFolder(tmp_path / "run").read_config()
  preset = presets.tuning(huggingface.load(folder)[0])
  tokenizer = str(folder / "tokenizer.json")
  assert config == dataclasses.replace(
    preset,
    run=str(tmp_path / "run"),
    init=str(folder),
    data=dataclasses.replace(preset.data, source=str(corpus), tokenizer=tokenizer),
    optimizer=dataclasses.replace(preset.optimizer, learning_rate=2e-5),
  )
  assert config.compute.dtype == "bfloat16" and config.data.length == 4096


@pytest.mark.parametrize(
  "flags, field",
  [
    ("--model.norm_eps 1e-3", "model.norm_eps: 1e-06 -> 0.001"),
    ("--data.tokenizer bytes", "tokenizer.json -> bytes"),
    ("--init elsewhere", "published -> elsewhere"),
  ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(folder, tmp_path, capsys, flags, field):
  assert main(["convert", str(folder), str(tmp_path / "run"), *flags.split()]) == 2
  printed = capsys.readouterr().err
  assert "contradict the checkpoint" in printed and field in printed
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_converted_run_goes_on_and_learns(folder, corpus, tmp_path):
  """With flags at the conversion, and at its first resume: nothing is trained yet."""
  convert_flags = ["--data.source", str(corpus), "--data.holdout", "0.3", "--eval_every", "0"]
  assert main(["convert", str(folder), str(tmp_path / "run"), *convert_flags]) == 0
  flags = ["--steps", "120", "--data.length", "32", "--batch", "8", "--mesh.data", "1"]
  flags += ["--optimizer.learning_rate", "1e-3", "--compute.dtype", "float32"]
  assert main(["resume", str(tmp_path / "run"), *flags]) == 0
  losses = [record["loss"] for record in read_records(RunFolder(tmp_path / "run").metrics)]
  assert losses[-1] < 0.5 * losses[0]


def test_a_tokenizer_with_more_ids_than_the_checkpoint_is_refused(
  checkpoint, corpus, tmp_path, capsys
):
  train_bpe([corpus.read_text() if corpus.is_file() else "a b"], 257).save(tmp_path)
  flags = ["--run", str(tmp_path / "run"), "--data.source", str(corpus), "--data.holdout", "0.3"]
  flags += ["--data.tokenizer", str(tmp_path / "tokenizer.json")]
  assert main(["train", "micro", "--init", str(checkpoint("qwen2").folder), *flags]) == 2
  assert "has 257 ids, more than the V=128 of init=" in capsys.readouterr().err


@pytest.mark.parametrize("others, hint", [((), ""), (("tokenizer.model",), "makes one of token")])
def test_a_checkpoint_without_a_usable_tokenizer_is_not_trained_on_bytes(
  others, hint, checkpoint, corpus, tmp_path, capsys
):
  folder = shutil.copytree(checkpoint("qwen2").folder, tmp_path / "published")
  for name in others:
    (folder / name).write_text("pieces")
  flags = ["--run", str(tmp_path / "run"), "--data.source", str(corpus)]
  assert main(["train", "micro", "--init", str(folder), *flags]) == 2
  printed = capsys.readouterr().err
  assert "published: there is no tokenizer.json" in printed and hint in printed
  assert "or name one by --data.tokenizer FILE" in printed and not (tmp_path / "run").exists()
  (folder / "tokenizer.json").write_text('{"version": "1.0"}')
  assert main(["train", "micro", "--init", str(folder), *flags]) == 2
  assert "tokenizer.json': not a tokenizer.json" in capsys.readouterr().err


def test_fields_and_tensors_to_ignore_are_named_on_every_command(
  folder, corpus, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(values | {"mup_scale": 2.0}))
  data = ["--data.source", str(corpus), "--data.holdout", "0.3"]
  commands = (
    ["sample", str(folder), "--max_new", "1"],
    ["convert", str(folder), "run", *data],
    ["train", "micro", "--init", str(folder), "--run", "new", *data],
  )
  for command in commands:
    assert main(command) == 2
    assert "--ignore_config mup_scale reads the rest without it" in capsys.readouterr().err
  for command in commands[:2]:
    assert main([*command, "--ignore_config", "mup_scale"]) == 0, command
  assert RunFolder(tmp_path / "run").read_config().ignore_config == ("mup_scale",)


def test_a_conversion_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
  before = sorted(tmp_path.rglob("*"))

  def fail(*arguments):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("jaxlm.checkpoint.checkpoint.write_manifest", fail)
    assert main(["convert", str(folder), str(tmp_path / "new/run")]) == 1
  assert sorted(tmp_path.rglob("*")) == before
  convert(folder, tmp_path / "run")
  before = sorted(tmp_path.rglob("*"))
  monkeypatch.setattr("jaxlm.interop.huggingface._write_json", fail)
  assert main(["convert", str(tmp_path / "run"), str(tmp_path / "new/checkpoint")]) == 1
  assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_is_measured_on_the_text_that_is_named(folder, tmp_path, capsys):
  assert main(["eval", str(folder)]) == 2
  assert "data.source='': a checkpoint has no text of its own" in capsys.readouterr().err
  (tmp_path / "text.txt").write_text("one two three " * 500)
  flags = ["--data.source", str(tmp_path / "text.txt"), "--data.length", "16", "--batches", "1"]
  assert main(["eval", str(folder), *flags]) == 0
  assert "held-out loss" in capsys.readouterr().out
  with pytest.raises(UserError, match="has no text of its own"):
    SavedRun.open(folder).evaluate()


@pytest.mark.slow
def test_a_special_token_beyond_the_weights_is_never_drawn_and_no_fault(folder, tmp_path):
  """As of published models to whose tokenizer somebody added a token for padding."""
  model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  fillers = [f"<filler{index}>" for index in range(60)]
  model.add_special_tokens(fillers)
  model.save(str(folder / "tokenizer.json"))
  assert model.get_vocab_size() > huggingface.load(folder)[0].V == 128
  convert(folder, tmp_path / "run")
  for name in (folder, tmp_path / "run"):
    SavedRun.open(name).sample("a <filler59>", sampler=Sampler(temperature=9.0), max_new=3)
  model.add_tokens(["an ordinary one"])
  model.save(str(folder / "tokenizer.json"))
  with pytest.raises(UserError, match="has 163 ids, more than model.V=128"):
    SavedRun.open(folder)
