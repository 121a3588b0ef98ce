"""Text that a model samples from itself begins greedily, goes on at random, and is data."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import DataConfig, MeshConfig, TrainConfig, decoder
from jaxlm.data.loader import load_text
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.models import Transformer
from jaxlm.run import SavedRun, own_text
from jaxlm.run.own_text import sample_documents, write_own_text
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MODEL = decoder(V=256, D=8, F=8, N=1, K=1, H=8, layers=1)
EOS = 0


@pytest.fixture(scope="module")
def params():
  return Transformer(MODEL).init(jax.random.key(0))


@pytest.mark.slow
def test_the_first_token_is_drawn_the_next_are_the_likeliest_and_the_rest_is_sampled(params):
  options = {"count": 16, "length": 12, "start_ids": (EOS,), "end_ids": (EOS,), "greedy": 3}
  first_ids = np.arange(1, 256)

  def draw(seed):
    return sample_documents(MODEL, params, key=jax.random.key(seed), first_ids=first_ids, **options)

  ids_BM = draw(0)
  assert ids_BM.shape == (16, 12) and len(set(ids_BM[:, 0])) > 10
  before_BT = np.concatenate([np.zeros((16, 1), np.int32), ids_BM], axis=1)
  logits_BTV = jax.jit(Transformer(MODEL).apply)(params, before_BT)
  likeliest_BM = np.asarray(jnp.argmax(logits_BTV, axis=-1))[:, :-1]
  ended_BM = np.cumsum(ids_BM == EOS, axis=1) > 0
  going_BM = ~ended_BM
  assert (ids_BM == likeliest_BM)[:, 1:4][going_BM[:, 1:4]].all() and going_BM[:, 1:4].any()
  assert (ids_BM != likeliest_BM)[:, 4:][going_BM[:, 4:]].mean() > 0.5
  assert (ids_BM[ended_BM] == EOS).all()  # an ended document stays so
  np.testing.assert_array_equal(draw(0), ids_BM)
  assert (draw(1) != ids_BM).any()
  with pytest.raises(UserError, match="length=4: must be above 1"):
    sample_documents(
      MODEL, params, key=jax.random.key(0), first_ids=first_ids, **(options | {"length": 4})
    )


@pytest.mark.slow
def test_it_is_written_as_a_source_of_text(params, tmp_path):
  config = TrainConfig(model=MODEL, mesh=MeshConfig(data=1))
  saved = SavedRun(config, ByteTokenizer(), params, 3, (EOS,), (EOS,))
  path, sizes = tmp_path / "own.jsonl", {"documents": 5, "length": 12, "batch": 4}
  assert "5 documents" in write_own_text(saved, path, **sizes)
  texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
  assert len(texts) == 5 and all(texts)
  text = load_text(dataclasses.replace(DataConfig(), source=str(path), holdout=0.5, length=4))
  assert text.store.train.documents + text.store.heldout.documents >= 5
  assert [file.name for file in tmp_path.iterdir()] == ["own.jsonl"]
  with pytest.raises(UserError, match="must not exist"):
    write_own_text(saved, path, **sizes)
  with pytest.raises(UserError, match="must end in .jsonl"):
    write_own_text(saved, tmp_path / "own.txt", **sizes)


@pytest.mark.slow
def test_an_interrupted_call_is_gone_on_with(params, tmp_path, monkeypatch):
  config = TrainConfig(model=MODEL, mesh=MeshConfig(data=1))
  saved = SavedRun(config, ByteTokenizer(), params, 3, (EOS,), (EOS,))
  sizes, path = {"documents": 9, "length": 8, "batch": 4}, tmp_path / "own.jsonl"
  write_own_text(saved, tmp_path / "whole.jsonl", **sizes)
  begun, batches, real = tmp_path / "own.jsonl.unfinished", [], own_text.sample_documents

  def stops_at_the_second(*arguments, **options):
    batches.append(options["count"])
    if len(batches) == 2:
      raise KeyboardInterrupt
    return real(*arguments, **options)

  monkeypatch.setattr(own_text, "sample_documents", stops_at_the_second)
  with pytest.raises(KeyboardInterrupt):
    write_own_text(saved, path, **sizes)
  lines = begun.read_text().splitlines(keepends=True)
  assert len(lines) == 1 + 4 and not path.exists()
  begun.write_text("".join(lines[:4]) + lines[4][:5])  # killed in the middle of a line
  with pytest.raises(UserError, match="was begun by another model or with other settings"):
    write_own_text(saved, path, seed=1, **sizes)
  write_own_text(saved, path, **sizes)
  assert len(batches) == 2 + 3  # the batch of the lost line, and the two others
  assert path.read_text() == (tmp_path / "whole.jsonl").read_text() and not begun.exists()
