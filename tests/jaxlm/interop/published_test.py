"""The published sizes: parameter counts as the model cards give them, and configurations that others' tools know."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm import presets
from jaxlm.interop.hub_config import parse_config
from jaxlm.interop.hub_export import write_config
from jaxlm.interop.weight_names import weights
from jaxlm.models import Transformer
from jaxlm.scaling.flops import parameter_count

# "Model size" of the safetensors on each model's page of the Hub; a head that repeats the embedding counts once
PUBLISHED = {
  presets.llama_3_1_8b: ("llama", 8_030_261_248),
  presets.qwen2_5_0_5b: ("qwen2", 494_032_768),
  presets.qwen2_5_1_5b: ("qwen2", 1_543_714_304),
  presets.qwen2_5_7b: ("qwen2", 7_615_616_512),
  presets.qwen3_0_6b: ("qwen3", 596_049_920),
  presets.qwen3_8b: ("qwen3", 8_190_735_360),
  presets.gemma_2_2b: ("gemma2", 2_614_341_888),
  presets.gemma_2_9b: ("gemma2", 9_241_705_984),
}


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.__name__)
def test_parameter_counts(preset):
  config = preset().model
  _, published = PUBLISHED[preset]
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published
  assert parameter_count(config).total == published


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.__name__)
def test_configurations_are_those_of_the_families(preset):
  model = preset().model
  values = write_config(model, "bfloat16")
  assert values["model_type"] == PUBLISHED[preset][0]
  back, dtype = parse_config(values, "config.json")
  assert (back, dtype) == (dataclasses.replace(model, dtype="float32", remat="none"), "bfloat16")


def test_the_table_of_weights_is_the_parameter_tree(any_checkpoint):
  """Names and shapes that loading and saving go by, against what the model itself asks for."""
  config = dataclasses.replace(
    any_checkpoint.config, mlp_bias=True, qkv_bias=True, out_bias=True, qk_norm=True
  )
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))["params"]
  found = {
    tuple(key.key for key in path): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(shapes)
  }
  rows = config.layers // len(config.attention)
  assert found == {w.path: (rows, *w.shape) if w.stacked else w.shape for w in weights(config)}
