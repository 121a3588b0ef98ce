"""Loading and saving against transformers' own numbers, and bit for bit against the files."""

import dataclasses
import shutil

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, decoder, revise
from jaxlm.interop import huggingface
from jaxlm.interop.hub_config import read_config
from jaxlm.interop.safetensors import MappedFile
from jaxlm.interop.tensor_checks import check_tensors
from jaxlm.interop.weight_files import find_tensors
from jaxlm.interop.weight_names import list_weights
from jaxlm.models import Transformer
from jaxlm.objectives import next_token_loss
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

# Each switch, a wrong value, and the checkpoint whose logits it must change.
WRONG = [
  ("llama", {"norm_eps": 1e-3}),
  ("llama", {"activation": "gelu"}),
  ("llama", {"H": 16, "N": 3, "K": 1}),
  ("llama", {"rope": {"theta": 2e4}}),
  ("llama_rope_llama3", {"rope": {"scaling": "none"}}),
  ("llama_rope_llama3", {"rope": {"factor": 5.0}}),
  ("llama_rope_llama3", {"rope": {"original_length": 64}}),
  ("llama_rope_llama3", {"rope": {"low_freq_factor": 2.0}}),
  ("llama_rope_llama3", {"rope": {"high_freq_factor": 5.0}}),
  ("llama_rope_yarn", {"rope": {"scaling": "linear"}}),
  ("llama_rope_yarn", {"rope": {"attention_factor": 1.0}}),
  ("llama_rope_yarn", {"rope": {"beta_fast": 0.5}}),
  ("llama_rope_yarn", {"rope": {"beta_slow": 0.1}}),
  ("llama_rope_yarn", {"rope": {"truncate": False}}),
  ("qwen2", {"qkv_bias": False}),
  ("qwen3", {"qk_norm": False}),
  ("gemma2", {"norm_offset": 0}),
  ("gemma2", {"post_norms": False}),
  ("gemma2", {"embed_scale": "one"}),
  ("gemma2", {"activation": "silu"}),
  ("gemma2", {"activation": "gelu"}),
  ("gemma2", {"query_width": None}),
  ("gemma2", {"cap": None}),
  ("gemma2", {"logit_cap": None}),
  ("gemma2", {"windows": (None, None)}),
  ("gemma2", {"windows": (None, 8)}),
  ("gemma2", {"windows": (7, None)}),
  ("gemma2", {"windows": (9, None)}),
]


def with_window(spec, window):
  return dataclasses.replace(spec, mixer=dataclasses.replace(spec.mixer, window=window))


def stored(folder):
  """Name -> values of every tensor of a folder, without a copy."""
  entries = find_tensors(folder)
  files = {entry.file: MappedFile(entry.file) for entry in entries.values()}
  return {name: files[entry.file].view(entry) for name, entry in entries.items()}


def assert_same_bits(folder, other):
  left, right = stored(folder), stored(other)
  assert left.keys() == right.keys()
  for name in left:
    assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
    assert left[name].tobytes() == right[name].tobytes(), name


def only_needed(config, params):
  """The parameters that this configuration has, of those of another one."""
  kept = {}
  for weight in list_weights(config):
    branch, found = kept, params
    for key in weight.path[:-1]:
      branch, found = branch.setdefault(key, {}), found[key]
    branch[weight.path[-1]] = found[weight.path[-1]]
  return kept


def test_logits_loss_and_gradients_are_those_of_transformers(any_checkpoint, train_pass, tmp_path):
  c = any_checkpoint
  logits_BTV, loss, grads = train_pass(c.config, c.params, c.ids_BT)
  np.testing.assert_allclose(logits_BTV, c.logits_BTV, rtol=0, atol=1e-4)
  assert loss == pytest.approx(float(c.loss), abs=1e-5)
  huggingface.save(tmp_path / "grads", c.config, grads)
  found = stored(tmp_path / "grads")
  assert found.keys() == c.norms.keys()
  for name, norm in c.norms.items():
    if (name, c.folder.name) != ("model.embed_tokens.weight", "gemma2"):
      assert np.linalg.norm(found[name]) == pytest.approx(norm, rel=1e-3), name


def test_embedding_gradient_is_that_of_transformers_without_its_padding_row(checkpoint):
  """Gemma 2 names a padding id, 0 here, whose row gets a gradient only as an output."""
  c = checkpoint("gemma2")
  model = Transformer(revise(c.config, tied=False))
  embed_VD = c.params["embed"]["weight"]

  @jax.jit
  def gradients(embed_VD, head_DV):
    def loss(embed_VD, head_DV):
      params = c.params | {"embed": {"weight": embed_VD}, "head": {"weight": head_DV}}
      states_BTD = model.apply(params, c.ids_BT[:, :-1], logits=False)
      targets_BT = jnp.asarray(c.ids_BT[:, 1:])
      weights_BT = jnp.ones_like(targets_BT, jnp.float32)
      return next_token_loss(states_BTD, model.head(params), targets_BT, weights_BT)["loss"].mean()

    return jax.grad(loss, argnums=(0, 1))(embed_VD, head_DV)

  as_input_VD, as_output_DV = gradients(embed_VD, embed_VD.T)
  assert (c.ids_BT[:, :-1] == 0).any()
  total_VD = as_input_VD.at[0].set(0) + as_output_DV.T
  assert np.linalg.norm(total_VD) == pytest.approx(c.norms["model.embed_tokens.weight"], rel=1e-3)


@pytest.mark.slow
def test_cached_decoding_gives_the_logits_of_transformers(any_checkpoint):
  """Prompts of lengths around the window of 8, then one position at a time."""
  c = any_checkpoint
  B, T = c.ids_BT.shape
  model = Transformer(c.config)
  step = jax.jit(model.apply)
  for prefilled in (1, 7, 8, 9):
    cache, parts = model.init_cache(B, T), []
    for start, stop in [(0, prefilled), *((t, t + 1) for t in range(prefilled, T))]:
      positions_BT = jnp.broadcast_to(jnp.arange(start, stop)[None], (B, stop - start))
      part_BTV, cache = step(c.params, c.ids_BT[:, start:stop], positions=positions_BT, cache=cache)
      parts.append(part_BTV)
    got_BTV = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(
      got_BTV, c.logits_BTV, rtol=0, atol=1e-4, err_msg=f"prefilled {prefilled}"
    )


@pytest.mark.parametrize(
  "name, wrong", WRONG, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x))
)
def test_every_switch_counts(name, wrong, checkpoint):
  c = checkpoint(name)
  if "rope" in wrong:
    rope = c.config.pattern[0].mixer.rope
    wrong = {"rope": dataclasses.replace(rope, **wrong["rope"])}
  if "windows" in wrong:
    layers = zip(c.config.pattern, wrong["windows"])
    wrong = {"pattern": tuple(with_window(spec, window) for spec, window in layers)}
  config = revise(c.config, **wrong)
  model = Transformer(config, ComputeConfig(attention_implementation="reference"))
  got_BTV = model.apply(only_needed(config, c.params), c.ids_BT)
  assert np.abs(got_BTV - c.logits_BTV).max() > 1e-3


@pytest.mark.parametrize("switch", ["qkv_bias", "out_bias", "bias", "qk_norm", "post_norms"])
def test_a_switch_without_its_weights_does_not_load(switch, checkpoint):
  c = checkpoint("llama")
  entries = find_tensors(c.folder)
  config = revise(c.config, **{switch: True})
  with pytest.raises(ValueError, match="tensors are needed, 21 are there; missing: model.layers.0"):
    check_tensors(config, entries, c.folder, None, None)


def test_both_layouts_of_the_configuration_read_alike(any_checkpoint):
  folder = any_checkpoint.folder
  assert read_config(folder / "config.json") == read_config(folder / "config_v5.json")


def test_load_save_load_is_bit_for_bit(any_checkpoint, tmp_path):
  c = any_checkpoint
  huggingface.save(tmp_path / "saved", c.config, c.params)
  assert_same_bits(tmp_path / "saved", c.folder)
  config, params = huggingface.load(tmp_path / "saved")
  assert config == c.config
  assert jax.tree.structure(params) == jax.tree.structure(c.params)
  chex.assert_trees_all_equal(params, c.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_survives_bit_for_bit(dtype, checkpoint, tmp_path):
  c = checkpoint("qwen2")
  config, params = huggingface.load(c.folder, dtype=dtype)
  assert config == c.config
  chex.assert_type(jax.tree.leaves(params), dtype)
  rounded = jax.tree.map(lambda w: np.asarray(w).astype(jnp.dtype(dtype)), c.params)
  chex.assert_trees_all_equal(params, rounded)
  huggingface.save(tmp_path / "half", config, params)
  again, back = huggingface.load(tmp_path / "half")
  assert again == config
  huggingface.save(tmp_path / "again", again, back)
  assert_same_bits(tmp_path / "half", tmp_path / "again")
  with pytest.raises(
    ValueError, match=r"tensor .* is float32, config.json states float16; --dtype .dtype="
  ):
    edited = tmp_path / "contradiction"
    shutil.copytree(c.folder, edited)
    text = (edited / "config.json").read_text()
    (edited / "config.json").write_text(
      text.replace('"torch_dtype": "float32"', '"torch_dtype": "float16"')
    )
    huggingface.load(edited)
  assert huggingface.load(edited, dtype="float32")[0] == c.config


def test_not_a_number_keeps_its_bits(checkpoint, tmp_path):
  c = checkpoint("llama")
  _, params = huggingface.load(c.folder, dtype="bfloat16")
  odd = np.asarray([0x7FC1, 0xFFA5, 0x7F80, 0x8000, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
  params["norm"]["weight"] = jnp.asarray(np.resize(odd, c.config.D))
  huggingface.save(tmp_path / "odd", c.config, params)
  _, back = huggingface.load(tmp_path / "odd")
  assert np.asarray(back["norm"]["weight"]).tobytes() == np.resize(odd, c.config.D).tobytes()


def test_several_files_with_an_index(checkpoint, tmp_path):
  c = checkpoint("gemma2")
  huggingface.save(tmp_path / "split", c.config, c.params, max_file_bytes=30_000)
  files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  assert_same_bits(tmp_path / "split", c.folder)
  config, params = huggingface.load(tmp_path / "split")
  assert config == c.config
  chex.assert_trees_all_equal(params, c.params)


def test_tied_checkpoint_may_repeat_its_embedding_but_not_another_head(checkpoint, tmp_path):
  c = checkpoint("llama_rope_llama3")
  untied = revise(c.config, tied=False)
  for name, factor in (("same", 1.0), ("other", 1.001)):
    head_DV = factor * c.params["embed"]["weight"].T
    huggingface.save(tmp_path / name, untied, c.params | {"head": {"weight": head_DV}})
    shutil.copy(c.folder / "config.json", tmp_path / name / "config.json")
  config, params = huggingface.load(tmp_path / "same")
  assert config == c.config
  chex.assert_trees_all_equal(params, c.params)
  with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
    huggingface.load(tmp_path / "other")
  ignored = huggingface.Ignored(tensors=("lm_head.weight",))
  chex.assert_trees_all_equal(huggingface.load(tmp_path / "other", ignored=ignored)[1], c.params)


def test_loaded_arrays_may_be_donated(checkpoint):
  """CPU devices with the same piece share its memory; donating one must not change another."""
  c = checkpoint("llama")
  with jax.set_mesh(make_mesh(MeshConfig(data=8))):
    _, params = huggingface.load(c.folder)
    doubled = jax.jit(lambda p: jax.tree.map(lambda w: 2 * w + 1, p), donate_argnums=0)(params)
  for leaf, want in zip(jax.tree.leaves(doubled), jax.tree.leaves(c.params)):
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(shard.data, 2 * np.asarray(want) + 1)


@pytest.mark.parametrize("windows", [(5,), (5, None)], ids=str)
def test_what_no_family_can_express_is_not_saved(windows, tmp_path):
  config = decoder(windows=windows, layers=2)
  with pytest.raises(
    ValueError, match=r"mixer.window=5.*no llama or qwen2 or qwen3 or gemma2 model can have this"
  ):
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
    huggingface.save(tmp_path / "odd", config, shapes)
  assert not (tmp_path / "odd").exists()


def test_saving_refuses_what_does_not_fit(checkpoint, tmp_path):
  c = checkpoint("qwen3")
  with pytest.raises(
    ValueError,
    match=r"params: stacks.0.0.mixer.q.weight of shape=\(2, 48, 64\): must be \(2, 48, 32\)",
  ):
    huggingface.save(tmp_path / "x", revise(c.config, H=8), c.params)
  with pytest.raises(ValueError, match="params: head.weight is missing"):
    pruned = {name: leaf for name, leaf in c.params.items() if name != "head"}
    huggingface.save(tmp_path / "x", c.config, pruned)
  with pytest.raises(ValueError, match="types bfloat16, float32, must be one of"):
    embed_VD = c.params["embed"]["weight"].astype(jnp.bfloat16)
    mixed = c.params | {"embed": {"weight": embed_VD}}
    huggingface.save(tmp_path / "x", c.config, mixed)
  with pytest.raises(ValueError, match="holds a checkpoint or a run already"):
    huggingface.save(c.folder, c.config, c.params)
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "dtype, expected",
  [
    ("bfloat16", jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16),
    (np.dtype(ml_dtypes.bfloat16), jnp.bfloat16),
    (np.dtype("float16"), jnp.float16),
    ("float32", jnp.float32),
    (jnp.float32, jnp.float32),
    (np.float32, jnp.float32),
    (np.dtype("float32"), jnp.float32),
    (None, jnp.float32),
  ],
  ids=repr,
)
def test_a_dtype_is_a_name_or_a_dtype(dtype, expected, checkpoint):
  _, params = huggingface.load(checkpoint("llama").folder, dtype=dtype)
  chex.assert_tree_all_finite(params)
  chex.assert_type(jax.tree.leaves(params), expected)


@pytest.mark.parametrize("dtype", ["float64", jnp.int32, "bf16", "", 3, np.dtype("complex64")])
def test_other_dtypes_are_refused_by_name(dtype, checkpoint):
  with pytest.raises(UserError, match="dtype=.*must be float32, bfloat16 or float16"):
    huggingface.load(checkpoint("llama").folder, dtype=dtype)


def test_loading_runs_no_forward_pass(checkpoint):
  calls = []

  def watch(run, args, kwargs, context):
    calls.append(context.method_name)
    return run(*args, **kwargs)

  with nn.intercept_methods(watch):
    huggingface.load(checkpoint("qwen3").folder)
  assert "declare" in calls and "__call__" not in calls
