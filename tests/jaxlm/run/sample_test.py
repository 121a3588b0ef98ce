"""Sampling text: ids without text are never drawn, and weights that are NaN are named."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from jaxlm import presets
from jaxlm.cli import main
from jaxlm.config import MeshConfig
from jaxlm.data.tokenizer import BPETokenizer, ByteTokenizer, train_bpe
from jaxlm.decode import NoDistribution, Sampler
from jaxlm.models import Transformer
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.saved_run import SavedRun

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


def saved_run(tokenizer, V, scale=1.0):
  config = presets.micro()
  model = dataclasses.replace(config.model, V=V)
  params = Transformer(model).init(jax.random.key(0))
  config = dataclasses.replace(config, model=model, mesh=MeshConfig(data=1))
  params = jax.tree.map(lambda w: scale * w, params)
  ends = (tokenizer.eos,)
  return SavedRun(config, tokenizer, params, 0, ends, ends)


def bpe_with_a_gap():
  model = json.loads(train_bpe(["one two three"] * 9, 259).model.to_str())
  model["added_tokens"].append(dict(model["added_tokens"][0], id=300, content="<extra>"))
  return json.dumps(model).encode()


@pytest.mark.parametrize("kind", ["bytes", "gap"])
def test_ids_without_text_are_never_drawn(kind, monkeypatch):
  """Of weights that were never trained, all ids are about as likely."""
  tokenizer = ByteTokenizer() if kind == "bytes" else BPETokenizer.parse(bpe_with_a_gap(), "gap")
  run = saved_run(tokenizer, V=512)
  decoded = list[int]()
  decode = type(tokenizer).decode
  monkeypatch.setattr(
    type(tokenizer), "decode", lambda self, ids: decoded.extend(ids) or decode(self, ids)
  )
  for seed in range(4):
    run.sample("one", sampler=Sampler(temperature=5.0), max_new=200, seed=seed)
  assert len(decoded) > 100 and set(decoded) <= set(tokenizer.list_ids().tolist())


@pytest.mark.slow
def test_weights_that_are_nan_are_named():
  run = saved_run(ByteTokenizer(), V=256)
  weight_VD = run.params["embed"]["weight"].at[3, 2].set(np.nan)
  bad = dataclasses.replace(run, params=run.params | {"embed": {"weight": weight_VD}})
  with pytest.raises(NoDistribution, match="the weights embed.weight hold 1 values that are NaN"):
    bad.sample("\3", sampler=Sampler(), max_new=2)
  huge_D = {"weight": np.full_like(run.params["norm"]["weight"], 3e38)}
  huge = dataclasses.replace(run, params=run.params | {"norm": huge_D})
  with pytest.raises(NoDistribution, match="all weights are finite: an activation overflows"):
    huge.sample("one", sampler=Sampler(), max_new=2)


def test_the_command_says_that_weights_are_nan(monkeypatch, capsys):
  run = saved_run(ByteTokenizer(), V=256, scale=np.nan)
  monkeypatch.setattr(SavedRun, "open", lambda *_, **__: run)
  assert main(["sample", "run", "--prompt", "the", "--max_new", "3"]) == 1
  printed = capsys.readouterr()
  assert "NaN" in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_continuation_is_decoded_behind_its_prompt(monkeypatch):
  """The decoder of this tokenizer drops a space that a text begins with."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="</s>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
  model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
  trainer = tokenizers.trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
  model.train_from_iterator(["golden coins under the fox"], trainer)
  tokenizer = BPETokenizer(model)
  run = saved_run(tokenizer, V=512)
  whole, prompt = "golden coins under the fox", "golden coins"
  new_ids = tokenizer.encode(whole)[len(tokenizer.encode(prompt)) :]
  assert tokenizer.decode(new_ids) == "under the fox"
  monkeypatch.setattr("jaxlm.run.saved_run.generate", lambda *_, **__: [np.append(new_ids, 0)])
  assert prompt + run.sample(prompt, sampler=Sampler(), max_new=9) == whole


def test_evaluating_weights_that_are_nan_says_so(monkeypatch, tmp_path, capsys):
  run = saved_run(ByteTokenizer(), V=256, scale=np.nan)
  monkeypatch.setattr(SavedRun, "open", lambda *_, **__: run)
  RunFolder(tmp_path / "run").create(run.config)
  (tmp_path / "text.txt").write_text("some words\n" * 400)
  flags = ["--data.source", str(tmp_path / "text.txt"), "--batches", "1"]
  assert main(["eval", str(tmp_path / "run"), *flags]) == 1
  assert "the held-out loss is nan; the weights embed.weight hold" in capsys.readouterr().err
