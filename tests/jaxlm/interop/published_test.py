"""Published sizes: their config.json is accepted, and their parameters are counted as published."""

import json
import math
from pathlib import Path

import jax
import pytest

from jaxlm import presets
from jaxlm.config import revise
from jaxlm.interop.hub_config import parse_config
from jaxlm.interop.hub_export import write_config
from jaxlm.interop.weight_names import list_weights
from jaxlm.models import Transformer
from jaxlm.scaling.flops import parameter_count
from pallas_kernels.common.errors import UserError

# The published config.json of each preset, and the "Model size" of the safetensors on the model's
# page of the Hub; a tied head counts once.
PUBLISHED = {
  presets.llama_3_1_8b: ("Llama-3.1-8B", 8_030_261_248),
  presets.llama_3_1_405b: ("Llama-3.1-405B", 405_853_388_800),
  presets.qwen2_5_0_5b: ("Qwen2.5-0.5B", 494_032_768),
  presets.qwen2_5_1_5b: ("Qwen2.5-1.5B-Instruct", 1_543_714_304),
  presets.qwen2_5_7b: ("Qwen2.5-7B", 7_615_616_512),
  presets.qwen3_0_6b: ("Qwen3-0.6B", 596_049_920),
  presets.qwen3_8b: ("Qwen3-8B", 8_190_735_360),
  presets.gemma_2_2b: ("gemma-2-2b", 2_614_341_888),
  presets.gemma_2_9b: ("gemma-2-9b", 9_241_705_984),
}


CONFIGS = Path(__file__).parents[2] / "data" / "published_configs"
# Parameters in billions, all and without the embedding and its head, as the authors state them
# (sources: the README of the folder). None: not stated, or stated for another way of counting.
BILLIONS = {
  "Llama-2-7b-hf": ("6.738415616", None),
  "Llama-2-13b-hf": ("13.01586432", None),
  "Llama-2-70b-hf": ("68.976648192", None),
  "Meta-Llama-3-8B": ("8.030261248", None),
  "Meta-Llama-3-70B": ("70.553706496", None),
  "Llama-3.1-8B": ("8.030261248", None),
  "Llama-3.1-8B-Instruct": ("8.030261248", None),
  "Llama-3.1-70B": ("70.553706496", None),
  "Llama-3.1-405B": ("405.853388800", None),
  "Llama-3.1-70B-Instruct": ("70.553706496", None),
  "Llama-3.2-1B-Instruct": ("1.2358144", None),
  "Llama-3.2-3B": ("3.212749824", None),
  "Qwen2-0.5B": ("0.49", "0.35"),
  "Qwen2-1.5B-Instruct": ("1.54", "1.31"),
  "Qwen2-7B": (None, None),
  "Qwen2-72B": ("72.71", "70.21"),
  "Qwen2.5-0.5B": ("0.49", "0.36"),
  "Qwen2.5-1.5B-Instruct": ("1.54", "1.31"),
  "Qwen2.5-3B": ("3.09", "2.77"),
  "Qwen2.5-7B": ("7.61", "6.53"),
  "Qwen2.5-14B": ("14.7", None),
  "Qwen2.5-32B": ("32.763876352", None),
  "Qwen2.5-72B-Instruct": ("72.7", None),
  "Qwen3-0.6B": ("0.6", "0.44"),
  "Qwen3-1.7B": ("1.7", "1.4"),
  "Qwen3-4B": ("4.0", "3.6"),
  "Qwen3-8B": ("8.2", "6.95"),
  "Qwen3-14B": ("14.8", "13.2"),
  "Qwen3-32B": ("32.8", "31.2"),
  "gemma-2-2b": (None, "2.024517888"),
  "gemma-2-2b-it": (None, "2.024517888"),
  "gemma-2-2b-jpn-it": (None, "2.024517888"),
  "gemma-2-9b": (None, "8.324201984"),
  "gemma-2-27b-it": (None, "26.04748032"),
}


def read_published(name):
  return json.loads((CONFIGS / f"{name}.json").read_text())


def test_every_published_configuration_has_its_counts():
  assert {path.stem for path in CONFIGS.glob("*.json")} == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_published_configurations_are_accepted(name):
  """As their authors publish them; what is written for them reads back equal."""
  values = read_published(name)
  config, dtype = parse_config(values, name)
  assert dtype == values["torch_dtype"]
  written = write_config(config, dtype)
  assert written["model_type"] == values["model_type"]
  assert parse_config(written, name) == (config, dtype)


@pytest.mark.parametrize("name", BILLIONS)
def test_published_parameter_counts(name):
  """Some authors cut decimals off and some round, so one unit of the last decimal is allowed."""
  config, _ = parse_config(read_published(name), name)
  count = parameter_count(config)
  matrices = config.V * config.D * (1 if config.tied else 2)
  for stated, counted in zip(BILLIONS[name], (count.total, count.total - matrices)):
    if stated is not None:
      last_decimal = 10.0 ** -len(stated.partition(".")[2])
      assert abs(counted / 1e9 - float(stated)) <= last_decimal


@pytest.mark.parametrize(
  "name, changes, rule",
  [
    ("Qwen2.5-7B", {"use_mrope": True}, "use_mrope='True': must be false"),
    ("Qwen2.5-7B", {"use_mrope": 0}, "use_mrope='0': must be false"),
    ("Qwen2-7B", {"use_sliding_window": True, "max_window_layers": 27}, None),
    ("gemma-2-27b-it", {"sliding_window_size": 2048}, "sliding_window_size='2048': contradicts"),
    ("gemma-2-27b-it", {"query_pre_attn_scalar": 128}, None),
    ("Llama-3.1-8B", {"rope_theta": 10000.0}, None),
    ("Llama-3.1-8B", {"pretraining_tp": 2, "_attn_implementation": "sdpa"}, "same"),
    ("Qwen3-8B", {"num_experts": 128}, "num_experts='128': unknown, and may change the numbers"),
  ],
)
def test_fields_that_change_numbers_are_read_or_refused(name, changes, rule):
  """A changed field gives another model, an error that names it, or, without effect, the same."""
  published, _ = parse_config(read_published(name), name)
  values = read_published(name) | changes
  if rule in (None, "same"):
    assert (parse_config(values, name)[0] == published) == (rule == "same")
    return
  with pytest.raises(UserError, match=f"{name}: {rule}"):
    parse_config(values, name)


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.__name__)
def test_parameter_counts(preset):
  config = preset().model
  _, published = PUBLISHED[preset]
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published
  assert parameter_count(config).total == published


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.__name__)
def test_presets_are_the_published_configurations(preset):
  model = preset().model
  name, _ = PUBLISHED[preset]
  published, _ = parse_config(read_published(name), name)
  if name == "Qwen2.5-1.5B-Instruct":  # differs from its base in the positions that it states
    assert (published.max_length, model.max_length) == (32768, 131072)
    published = revise(published, max_length=131072)
  assert model == published


def test_the_table_of_weights_is_the_parameter_tree(any_checkpoint):
  """Names and shapes that loading and saving go by, against what the model itself asks for."""
  config = revise(any_checkpoint.config, bias=True, qkv_bias=True, out_bias=True, qk_norm=True)
  shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  found = {
    tuple(key.key for key in path): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(shapes)
  }
  assert found == {
    w.path: (len(w.names), *w.shape) if w.stacked else w.shape for w in list_weights(config)
  }
