"""Delta attention layers of a tiny Kimi Linear checkpoint give the states of transformers."""

# B rows, T positions, D model
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (
  ComputeConfig,
  KdaConfig,
  LayerSpec,
  MlpConfig,
  ModelConfig,
  NsaConfig,
)
from jaxlm.interop import huggingface
from jaxlm.interop.hub_export import with_own_tokenizer
from jaxlm.interop.kimi_linear import load_delta_attention
from jaxlm.interop.safetensors import MappedFile
from jaxlm.interop.weight_files import find_tensors
from jaxlm.models.block import Block
from jaxlm.models.mixers.context import Context
from pallas_kernels.common.errors import UserError

FOLDER = Path(__file__).parents[2] / "data" / "hf_tiny" / "kimi_linear"
B, T, D = 2, 40, 48


def read(name):
  entry = find_tensors(FOLDER)[f"model.layers.0.{name}.weight"]
  values = np.array(MappedFile(entry.file).view(entry))
  return jnp.asarray(values.T)


@pytest.fixture(scope="module")
def block():
  """The first layer, whose feed-forward is dense: a function of (states, positions, cache)."""
  mixer, params = load_delta_attention(FOLDER, 0)
  spec = LayerSpec(mixer=mixer, feedforward=MlpConfig(F=64))
  config = ModelConfig(D=D, V=128, layers=1, pattern=(spec,), norm_eps=1e-5)
  tree = {
    "mixer_norm": {"weight": read("input_layernorm")},
    "mixer": params,
    "feedforward_norm": {"weight": read("post_attention_layernorm")},
    "feedforward": {n: {"weight": read(f"mlp.{n}_proj")} for n in ("gate", "up", "down")},
  }
  module = Block(spec, config, ComputeConfig(), (0,))

  @jax.jit
  def run(x_BTD, positions_BT, cache):
    return module.apply({"params": tree}, x_BTD, Context(positions_BT, in_order=True), cache)[:2]

  return module, run


def test_the_first_layer_gives_the_states_of_transformers(block):
  module, run = block
  reference = np.load(FOLDER / "io.npz")
  x_BTD, want_BTD = reference["hidden_after_embed"], reference["hidden_after_layer0"]
  positions_BT = np.broadcast_to(np.arange(T), (B, T))
  np.testing.assert_allclose(run(x_BTD, positions_BT, None)[0], want_BTD, atol=3e-5)
  spec, config = module.spec, module.config
  cache = type(module.bind({}).mixer).init_cache(spec.mixer, config, B, T, "float32", (0,))
  start, parts = 0, []
  for size in (T // 2, T // 2):  # the second piece goes on from the state
    piece = slice(start, start + size)
    y_BTD, cache = run(x_BTD[:, piece], positions_BT[:, piece], cache)
    parts.append(y_BTD)
    start += size
  np.testing.assert_allclose(np.concatenate(parts, axis=1), want_BTD, atol=3e-5)


@pytest.fixture
def copy(tmp_path):
  folder = tmp_path / "kimi"
  shutil.copytree(FOLDER, folder)
  return folder


def edit(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_fields_of_published_files_say_the_same(copy):
  lists = {"kda_layers": [1, 2, 3], "full_attn_layers": [4]}
  sizes = {"num_heads": 3, "head_dim": 12, "short_conv_kernel_size": 4}
  edit(copy, linear_attn_config=lists | sizes, layer_types=None)
  assert load_delta_attention(copy, 2)[0] == load_delta_attention(FOLDER, 2)[0]
  assert load_delta_attention(copy, 2)[0] == KdaConfig(N=3, K=3, H=12)
  with pytest.raises(UserError, match=r"kda_layers=\[1, 2, 3\]: layer 3, counted from 0, is no"):
    load_delta_attention(copy, 3)


@pytest.mark.parametrize(
  "layer, fields, message",
  [
    (3, {}, "layer 3, counted from 0, is no delta attention"),
    (4, {}, "layer=4: .* has 4 layers"),
    (0, {"model_type": "llama"}, "model_type='llama': must be kimi_linear"),
    (0, {"linear_head_dim": 6}, r"of shape \(36, 48\) must be \(18, 48\)"),
    (0, {"linear_conv_kernel_dim": "4"}, "linear_conv_kernel_dim='4': must be of type int"),
  ],
)
def test_what_cannot_be_read_is_refused_by_name(copy, layer, fields, message):
  edit(copy, **fields)
  with pytest.raises(UserError, match=message):
    load_delta_attention(copy, layer)


def test_a_whole_model_is_refused(copy):
  with pytest.raises(UserError, match="model_type='kimi_linear': must be one of llama"):
    huggingface.load(copy)


@pytest.mark.parametrize("mixer", [KdaConfig(), NsaConfig()])
def test_a_model_of_other_mixers_cannot_be_exported(mixer, tmp_path):
  spec = LayerSpec(mixer=mixer, feedforward=MlpConfig(F=64))
  config = ModelConfig(D=D, V=128, layers=1, pattern=(spec,))
  kind = f"a layer is a {type(mixer).__name__}"
  with pytest.raises(UserError, match=f"{kind}, for which the Hub's names are not known"):
    huggingface.save(tmp_path / "out", config, {})
  with pytest.raises(UserError, match=f"{kind}: no llama or .* model has that"):
    with_own_tokenizer(config, {})
