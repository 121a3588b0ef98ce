"""Folders that `save` writes give transformers (extra `hf`, and torch) the same numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import RopeConfig, decoder, rearrange
from jaxlm.interop import huggingface
from jaxlm.interop.safetensors import MappedFile
from jaxlm.interop.weight_files import find_tensors
from jaxlm.models import Transformer

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]

BASE = dict(D=48, F=64, N=6, K=2, H=8, V=96, layers=4, max_length=64)
GEMMA = {
  "norm_offset": 1,
  "post_norms": True,
  "embed_scale": "root_width",
  "activation": "gelu_tanh",
  "tied": True,
}
GEMMA |= {
  "windows": (6, None),
  "cap": 3.0,
  "logit_cap": 4.0,
  "query_width": 24.0,
}
BIASES = {"qkv_bias": True, "out_bias": True}
CONFIGS = {
  "llama biases": BIASES | {"bias": True, "activation": "gelu"},
  "llama linear": {"rope": RopeConfig(scaling="linear", factor=3.0), "H": 16},
  "llama dynamic": {
    "rope": RopeConfig(scaling="dynamic", factor=2.0, original_length=16),
    "max_length": 16,
  },
  "llama3": {
    "rope": RopeConfig(theta=1e5, scaling="llama3", factor=4.0, original_length=16),
    "tied": True,
  },
  "llama yarn": {
    "rope": RopeConfig(scaling="yarn", factor=4.0, original_length=16, truncate=False)
  },
  "llama yarn mscale": {
    "rope": RopeConfig(
      scaling="yarn", factor=4.0, original_length=16, mscale=0.7, mscale_all_dim=1.2
    )
  },
  "qwen2 windows": {
    "qkv_bias": True,
    "windows": (None, None, 5, 5),
  },
  "qwen3 biases": BIASES | {"qk_norm": True, "H": 16, "windows": (None, 7)},
  "gemma2": GEMMA | {"H": 16},
  "gemma2 biases": GEMMA | BIASES | {"logit_cap": None, "query_width": 8.0},
}


def random_params(config):
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  draw = np.random.default_rng(0)

  def leaf(path, x):
    scale = (
      0.5
      if path[0].key == "embed"
      else 0.2
      if x.ndim - (path[0].key == "stacks") == 1
      else x.shape[-2] ** -0.5
    )
    mean = 1 - config.norm_offset if "norm" in path[-2].key else 0
    return jnp.asarray(mean + scale * draw.normal(size=x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def their_logits_and_gradients(folder, ids_BT):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  logits_BTV = model(torch.tensor(ids_BT)).logits
  (logits_BTV.square().sum() / 2).backward()
  gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
  return logits_BTV.detach().numpy(), gradients


def assert_transformers_agrees(folder, config, params, ids_BT):
  logits_BTV, gradients = their_logits_and_gradients(folder, ids_BT)

  @jax.jit
  def logits_and_gradients(params):
    got_BTV, pull = jax.vjp(lambda params: Transformer(config).apply(params, ids_BT), params)
    return got_BTV, *pull(got_BTV)  # of half the sum of squares

  got_BTV, grads = logits_and_gradients(params)
  np.testing.assert_allclose(got_BTV, logits_BTV, rtol=0, atol=1e-4)
  huggingface.save(folder / "grads", config, grads)
  entries = find_tensors(folder / "grads")
  file = MappedFile(folder / "grads" / "model.safetensors")
  assert entries.keys() == gradients.keys()
  for name, entry in entries.items():
    error = np.abs(file.view(entry) - gradients[name]).max()
    assert error < 1e-3 * np.abs(gradients[name]).max(), name


@pytest.mark.parametrize("name", CONFIGS)
def test_random_models(name, tmp_path):
  config = rearrange(decoder(**BASE | CONFIGS[name]))
  params = random_params(config)
  huggingface.save(tmp_path / "saved", config, params)
  ids_BT = np.random.default_rng(1).integers(
    1, config.V, (2, 32)
  )  # 0 is Gemma's padding, without input gradient
  assert_transformers_agrees(tmp_path / "saved", config, params, ids_BT)


def test_tiny_checkpoints_saved_again(any_checkpoint, tmp_path):
  c = any_checkpoint
  huggingface.save(tmp_path / "saved", c.config, c.params, max_file_bytes=50_000)
  logits_BTV, _ = their_logits_and_gradients(tmp_path / "saved", c.ids_BT)
  np.testing.assert_allclose(logits_BTV, c.logits_BTV, rtol=0, atol=1e-5)


def test_what_transformers_saves_loads(any_checkpoint, tmp_path):
  c = any_checkpoint
  model = transformers.AutoModelForCausalLM.from_pretrained(c.folder, dtype=torch.float32)
  model.save_pretrained(tmp_path / "theirs")
  config, params = huggingface.load(tmp_path / "theirs")
  assert config == c.config
  chex.assert_trees_all_equal(params, c.params)
