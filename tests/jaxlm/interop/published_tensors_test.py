"""Tensors as published files hold them: buffers, mixed types, quantized ones, other files."""

import json
import shutil

import chex
import ml_dtypes
import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.interop import huggingface, safetensors
from jaxlm.interop.safetensors import MappedFile
from jaxlm.interop.weight_files import find_tensors
from pallas_kernels.common.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"
PLACEHOLDERS = {
  "a Git LFS pointer": LFS,
  "an HTML page": b"\n <!DOCTYPE html>\n<html><head><title>Sign in</title>",
  "an empty file": b"",
  "an error message of a server": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
}


@pytest.fixture
def folder(checkpoint, tmp_path):
  """A copy of a checkpoint that is not tied."""
  return shutil.copytree(checkpoint("llama").folder, tmp_path / "model")


def rewrite(folder, changes):
  """Writes a folder's tensors again, with changed and additional ones."""
  entries = find_tensors(folder)
  file = MappedFile(folder / "model.safetensors")
  arrays = {name: file.view(entry).copy() for name, entry in entries.items()} | changes
  shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
  safetensors.write(folder / "model.safetensors", shapes, arrays.__getitem__)


@pytest.mark.parametrize(
  "name",
  [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.masked_bias",
    "model.causal_mask",
  ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_buffers_of_any_type_are_let_through(name, dtype, folder, checkpoint):
  rewrite(folder, {name: np.ones((4, 2), dtype)})
  config, params = huggingface.load(folder)
  assert config == checkpoint("llama").config
  chex.assert_trees_all_equal(params, checkpoint("llama").params)


def test_buffers_may_be_missing_from_the_index_or_from_the_files(checkpoint, tmp_path):
  c = checkpoint("llama")
  huggingface.save(tmp_path / "split", c.config, c.params, max_file_bytes=50_000)
  index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
  first = min(index["weight_map"].values())
  index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = first
  index["metadata"] = {"total_size": 3, "total_parameters": None}
  (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
  chex.assert_trees_all_equal(huggingface.load(tmp_path / "split")[1], c.params)


def test_other_tensors_are_named_with_the_flag_that_leaves_them_out(folder, checkpoint):
  rewrite(folder, {"v_head.summary.weight": np.ones((1, 4), np.float32)})
  flag = r"belongs to no parameter .*--ignore_tensors v_head.summary.weight reads the rest"
  with pytest.raises(UserError, match=flag):
    huggingface.load(folder)
  for pattern in ("v_head.summary.weight", "v_head.*"):
    _, params = huggingface.load(folder, ignored=huggingface.Ignored(tensors=(pattern,)))
    chex.assert_trees_all_equal(params, checkpoint("llama").params)
  for pattern in ("model.norm.weight", "w_head.*"):
    with pytest.raises(UserError, match="ignore_tensors=.*matches no tensor besides"):
      huggingface.load(folder, ignored=huggingface.Ignored(tensors=("v_head.*", pattern)))


def test_mixed_types_are_named_with_the_flag_that_loads_them(folder, checkpoint, tmp_path):
  norm = np.asarray(checkpoint("llama").params["norm"]["weight"])
  rewrite(folder, {"model.norm.weight": norm.astype(ml_dtypes.bfloat16)})
  with pytest.raises(UserError, match=r"norm.weight is bfloat16, .*--dtype \(dtype= in Python"):
    huggingface.load(folder)
  _, params = huggingface.load(folder, "float32")
  rounded = norm.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(params["norm"]["weight"], rounded)


def test_a_tied_head_may_repeat_the_embedding_in_another_type(checkpoint, tmp_path):
  c = checkpoint("llama_rope_llama3")
  folder = shutil.copytree(c.folder, tmp_path / "model")
  embed_VD = np.asarray(c.params["embed"]["weight"])
  rewrite(folder, {"lm_head.weight": embed_VD.astype(ml_dtypes.bfloat16)})
  chex.assert_trees_all_equal(huggingface.load(folder)[1], c.params)
  rewrite(folder, {"lm_head.weight": (1.1 * embed_VD).astype(ml_dtypes.bfloat16)})
  with pytest.raises(UserError, match="--ignore_tensors lm_head.weight takes the embedding"):
    huggingface.load(folder)


def test_quantized_weights_are_called_that(folder):
  entries = find_tensors(folder)
  q = "model.layers.0.self_attn.q_proj.weight"
  rewrite(folder, {q: np.zeros(entries[q].shape, ml_dtypes.float8_e4m3fn)})
  for dtype in (None, "float32"):
    with pytest.raises(UserError, match="q_proj.weight is float8_e4m3fn .quantized"):
      huggingface.load(folder, dtype)


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_in_the_place_of_another_is_called_what_it_is(kind, name, folder):
  (folder / name).write_bytes(PLACEHOLDERS[kind])
  with pytest.raises(UserError, match=f"{name}: is {kind}"):
    huggingface.load(folder)


def test_every_command_that_reads_weights_names_a_pointer(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "other.txt").write_text("some words\n" * 99)
  (folder / "tokenizer.json").write_bytes(PLACEHOLDERS["an HTML page"])
  commands = (
    ["sample", "model"],
    ["eval", "model", "--data.source", "other.txt"],
    ["convert", "model", "out"],
    ["train", "micro", "--init", "model", "--run", "new"],
  )
  for command in commands:
    assert main(command) == 2
    assert "model/tokenizer.json: is an HTML page" in capsys.readouterr().err
  (folder / "model.safetensors").write_bytes(LFS)
  shutil.copy(tokenizer_file(tmp_path), folder / "tokenizer.json")
  for command in commands:
    assert main(command) == 2
    assert "model/model.safetensors: is a Git LFS pointer" in capsys.readouterr().err
  assert {path.name for path in tmp_path.iterdir()} == {"model", "other.json", "other.txt"}


def tokenizer_file(folder):
  import tokenizers

  model = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1}, []))
  model.add_special_tokens(["</s>"])
  model.save(str(folder / "other.json"))
  return folder / "other.json"


def test_an_adapter_is_called_that(tmp_path):
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(UserError, match=r"holds an adapter \(LoRA\), not a model; merge it"):
    huggingface.is_checkpoint(tmp_path)
