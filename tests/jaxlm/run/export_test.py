"""Exports work elsewhere: a text starts, goes on and ends in them as in the run."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxlm import presets
from jaxlm.cli import main
from jaxlm.config import MeshConfig, decoder, revise
from jaxlm.data.tokenizer import (
  BPETokenizer,
  ByteTokenizer,
  Tokenizer,
  as_library_tokenizer,
  train_bpe,
)
from jaxlm.decode import Sampler
from jaxlm.interop import huggingface
from jaxlm.models import Transformer
from jaxlm.run.convert import convert, tuning_config, write_checkpoint
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.saved_run import SavedRun

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

GREEDY = Sampler(temperature=0)
TEXT = 'anna said "yes" and left.\nbert saw a fox, é€😀, in the garden.\n'
PROMPTS = ("anna", " bert saw", "", "x  y\n")


def llama_tokenizer() -> BPETokenizer:
  """As Llama 2's: no pre-tokenizer, a space in front, bytes as a way out, and <s> before a text."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
  specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320, special_tokens=specials, show_progress=False
  )
  model.train_from_iterator([TEXT] * 9, trainer)
  values = json.loads(model.to_str()) | {"pre_tokenizer": None}
  values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < 3]
  model = tokenizers.Tokenizer.from_str(json.dumps(values))
  normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
  model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return BPETokenizer(model)


TOKENIZERS = {
  "bytes": ByteTokenizer,
  "bpe": lambda: train_bpe([TEXT] * 9, 270),
  "llama": llama_tokenizer,
}


def untrained(tokenizer: Tokenizer, V: int = 400) -> SavedRun:
  """A run of a model with more ids than its tokenizer, whose greedy texts differ."""
  config = presets.micro()
  model = dataclasses.replace(config.model, V=V)
  params = jax.tree.map(lambda w: 4 * w, Transformer(model).init(jax.random.key(2)))
  config = dataclasses.replace(config, model=model, mesh=MeshConfig(data=1))
  return SavedRun(config, tokenizer, params, 0, (tokenizer.eos,), (tokenizer.eos,))


def continue_all(run: SavedRun) -> list[str]:
  return [run.sample(prompt, sampler=GREEDY, max_new=12) for prompt in PROMPTS]


def test_biases_are_written_in_the_layout_that_keeps_the_tokenizer(tmp_path):
  """In Llama's, with one bias more, of zeros; where that lacks windows, convert says what to do."""
  config = presets.micro()
  model = revise(decoder(D=32, F=32, N=2, K=2, H=16, V=256, layers=1), qkv_bias=True)
  params = jax.eval_shape(Transformer(model).init, jax.random.key(0))
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda w: random.normal(size=w.shape).astype(np.float32), params)
  lines = {}
  for name, window in (("llama", None), ("qwen2", 8)):
    config = dataclasses.replace(config, model=revise(model, window=window))
    run = SavedRun(config, ByteTokenizer(), params, 0, (0,), (0,))
    lines[name] = write_checkpoint(run, tmp_path / "none", tmp_path / name, np.dtype("float32"))
    assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == name
  assert "AutoTokenizer" in lines["qwen2"] and "AutoTokenizer" not in lines["llama"]
  again, weights = huggingface.load(tmp_path / "llama")
  logits = [
    jax.jit(Transformer(config).apply)(params, jnp.arange(24)[None])
    for config, params in ((model, params), (again, weights))
  ]
  chex.assert_trees_all_close(*logits, atol=1e-5)


@pytest.mark.parametrize(
  "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bytes", "bpe"))]
)
def test_an_export_and_its_import_continue_a_text_as_the_run_does(kind, tmp_path):
  run = untrained(TOKENIZERS[kind]())
  texts = continue_all(run)
  assert len(set(texts)) > 1
  write_checkpoint(run, tmp_path / "none", tmp_path / "out", np.dtype("float32"))
  tuning = tuning_config(tmp_path / "out", tmp_path / "again")
  exact = dataclasses.replace(tuning, compute=run.config.compute, mesh=run.config.mesh)
  convert(tmp_path / "out", tmp_path / "again", config=exact)
  convert(tmp_path / "again", tmp_path / "back")
  for name in ("out", "again", "back"):
    other = SavedRun.open(tmp_path / name)
    assert (other.start_ids, other.end_ids) == (run.start_ids, run.end_ids), name
    assert continue_all(other) == texts, name


def test_what_a_folder_says_of_its_text(tmp_path):
  run = untrained(ByteTokenizer(), V=258)
  write_checkpoint(run, tmp_path / "none", tmp_path / "out", np.dtype("float32"))
  config, generation, tokenizer = (
    json.loads((tmp_path / "out" / f"{name}.json").read_text())
    for name in ("config", "generation_config", "tokenizer_config")
  )
  ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
  assert ids.items() <= config.items()
  assert generation == ids | {"suppress_tokens": [256, 257]}
  assert tokenizer["eos_token"] == tokenizer["bos_token"] == "<|endoftext|>"


def test_bytes_as_a_tokenizer_of_the_library():
  model, ours = as_library_tokenizer(ByteTokenizer()), ByteTokenizer()
  every = bytes(range(1, 256))
  for text in (TEXT, "", every.decode("latin-1"), " a  b\t\r\n"):
    assert model.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()
    assert model.encode(text).ids == [0, *ours.encode(text).tolist()]
  for ids in (list(every), [*"é".encode(), 0xC3, 65, 0xE2, 0x82, 66]):
    assert model.decode(ids, skip_special_tokens=False) == ours.decode(ids)


PUBLISHED = {
  "tokenizer_config.json": b'{"tokenizer_class": "X", "eos_token":"</s>", "chat_template":"{{x}}"}',
  "generation_config.json": b'{"eos_token_id": [7, 1], "temperature": 0.6, "top_p": 0.9}',
  "special_tokens_map.json": b'{"eos_token": "</s>"}',
  "chat_template.jinja": b"{% for message in messages %}{{ message }}{% endfor %}",
  "tokenizer.model": b"\0\1\2",
}


@pytest.fixture
def published(checkpoint, tmp_path):
  """A checkpoint with a tokenizer, two ends of its text, and a chat template."""
  folder = tmp_path / "published"
  shutil.copytree(checkpoint("qwen2").folder, folder)
  model = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, []))
  model.decoder = tokenizers.decoders.Fuse()
  model.add_special_tokens(["<s>", "</s>"])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  model.enable_truncation(99)
  model.save(str(folder / "tokenizer.json"))
  for name, content in PUBLISHED.items():
    (folder / name).write_bytes(content)
  values = json.loads((folder / "config.json").read_text())
  ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
  (folder / "config.json").write_text(json.dumps(values | ids))
  return folder


def test_what_a_published_folder_says_of_its_text_passes_through_a_run(published, tmp_path):
  for source, target in (("published", "run"), ("run", "back")):
    assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
  for name in (*PUBLISHED, "tokenizer.json"):
    assert (tmp_path / "back" / name).read_bytes() == (published / name).read_bytes(), name
  values = json.loads((tmp_path / "back" / "config.json").read_text())
  assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 3]
  for name in ("published", "run", "back"):
    opened = SavedRun.open(tmp_path / name)
    assert (opened.start_ids, opened.end_ids) == ((0,), (7, 1)), name


@pytest.mark.parametrize("eos", [2, [2, 3], None])
def test_the_end_of_a_runs_documents_joins_the_published_ends(eos, published, tmp_path):
  (published / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
  for source, target in (("published", "run"), ("run", "back")):
    convert(tmp_path / source, tmp_path / target)
  ends = {"2": (2, 1), "[2, 3]": (2, 3, 1), "None": (1,)}[str(eos)]
  assert SavedRun.open(tmp_path / "run").end_ids == ends
  assert SavedRun.open(tmp_path / "back").end_ids == ends


@pytest.mark.slow
def test_a_run_with_another_tokenizer_keeps_nothing_of_the_published_one(published, tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("ab" * 600)
  shutil.copy(published / "tokenizer.json", tmp_path / "other.json")
  flags = ["--data.source", str(text), "--data.tokenizer", str(tmp_path / "other.json")]
  flags += ["--steps", "11", "--data.length", "16", "--init", str(published)]
  run = tmp_path / "run"
  assert main(["train", "micro", "--run", str(run), "--eval_every", "0", *flags]) == 0
  assert not RunFolder(run).published.exists()
  assert SavedRun.open(run).start_ids == (1,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
  """A run of each kind of tokenizer, trained until it repeats its text, and its export.

  The model of Llama's has biases: the layout that keeps the tokenizer holds them.
  """
  pytest.importorskip("transformers")
  pytest.importorskip("torch")
  folder = tmp_path_factory.mktemp("trained")
  names = ("anna", "bert", "cleo", "dora", "emil", "fritz", "gwen", "hugo")
  lines = [json.dumps({"text": f'{name} said "yes" and left.'}) for name in names * 60]
  (folder / "short.jsonl").write_text("\n".join(lines))
  llama_tokenizer().save(folder)
  tokens = {"bytes": "bytes", "bpe": "bpe:280", "llama": str(folder / "tokenizer.json")}
  for kind, tokenizer in tokens.items():
    flags = ["--data.source", str(folder / "short.jsonl"), "--data.tokenizer", tokenizer]
    flags += ["--steps", "150", "--eval_every", "0", "--model.V", "340"]
    flags += ["--model.pattern.0.mixer.qkv_bias"] if kind == "llama" else []
    assert main(["train", "micro", "--run", str(folder / kind), *flags]) == 0
    assert main(["convert", str(folder / kind), str(folder / f"{kind}_out")]) == 0
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_writes_the_texts_of_the_run_and_ends_where_it_does(kind, trained):
  transformers = pytest.importorskip("transformers")
  out = str(trained / f"{kind}_out")
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  run = SavedRun.open(trained / kind)
  for prompt in ("anna", "dora said", "", 'hugo said "'):
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [*run.start_ids, *run.tokenizer.encode(prompt)]
    (ids,) = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    assert ids[-1] == run.end_ids[0] and len(ids) < 60
    text = run.sample(prompt, sampler=GREEDY, max_new=60)
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + text
    assert text.endswith('"yes" and left.') or text.endswith('yes" and left.')
  hot = model.generate(**inputs, do_sample=True, temperature=9.0, max_new_tokens=40)
  assert {*hot[0].tolist()} <= {*run.tokenizer.list_ids().tolist()}
