"""Every preset initialises, trains, decodes and loads on CPU, TPU and GPU: traced, not run."""

# B batch, T positions
import contextlib
import functools
import inspect
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxlm import presets
from jaxlm.config import ComputeConfig, TrainConfig, decoder
from jaxlm.data.packing import Batch
from jaxlm.decode.generation import generate_tokens
from jaxlm.decode.sampling import Sampler
from jaxlm.interop import huggingface
from jaxlm.models import Transformer
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from pallas_kernels.attention import cudnn
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import log_once
from sharding import MeshConfig

PRESETS = {
  name: function
  for name, function in inspect.getmembers(presets, inspect.isfunction)
  if function.__module__ == presets.__name__
  and not inspect.signature(function).parameters
  and not name.startswith("_")
}
DEVICES = {
  "v5p": AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu"),
  "h100": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
  "a100": AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu"),
}
# chip -> the loss of large vocabularies; elsewhere xla
LOSS_KERNELS = {"v5p": "pallas_tpu", "h100": "pallas_gpu"}
# (preset, platform) -> what training attends by; elsewhere xla
FUSED = {
  ("tiny", "tpu"): "splash",
  ("small", "tpu"): "splash",
  ("llama_3_1_8b", "tpu"): "splash",
  ("gemma_2_2b", "tpu"): "splash",
  ("qwen2_5_0_5b", "tpu"): "splash",
  ("llama_3_1_8b", "gpu"): "cudnn",
  ("qwen2_5_0_5b", "gpu"): "cudnn",
}
QUICK = [("micro", "v5p"), ("tiny", "v5p"), ("qwen2_5_0_5b", "h100"), ("qwen2_5_0_5b", "a100")]


@contextlib.contextmanager
def traced_for(chip):
  """A mesh of one device of another platform, on which nothing can run."""
  names = tuple(MeshConfig().sizes())
  kinds = (AxisType.Explicit,) * len(names)
  with jax.sharding.use_abstract_mesh(
    AbstractMesh((1,) * len(names), names, kinds, abstract_device=DEVICES[chip])
  ):
    yield


@pytest.fixture
def with_cudnn(monkeypatch):
  """There is no GPU here: what jax asks cuDNN for is told instead."""
  from jax._src.cudnn import fused_attention_stablehlo as library

  monkeypatch.setattr(cudnn, "has_cudnn", lambda: True)
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)


def trace_everything(config: TrainConfig, packed: bool = False) -> None:
  """Traces init, train step, prefill and decode step, and what `huggingface.load` compares with."""
  task, model = TextTask(config), Transformer(config.model, config.compute)
  state = jax.eval_shape(lambda: init_state(config, task))
  shape = (config.batch, config.data.length)
  ids, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
  batch = Batch(ids, ids, weights, *((ids, ids) if packed else (None, None)))
  after, metrics = jax.eval_shape(make_train_step(config, task), state, batch)
  assert jax.tree.structure(after) == jax.tree.structure(state) and metrics["loss"].shape == ()
  key = jax.eval_shape(lambda: jax.random.key(0))
  assert jax.eval_shape(model.init, key).keys() == state.params.keys()
  static = {"sampler": Sampler(), "buffer": 5, "max_new": 5, "eos": (-1,)}
  generate = functools.partial(generate_tokens.__wrapped__, model, **static)
  prompts, lengths = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((2, 7), (2,)))
  generation = jax.eval_shape(generate, state.params, prompts, lengths, key=key)
  assert generation.ids_BM.shape == (2, 5)
  logits_BTV = jax.eval_shape(model.apply, state.params, prompts)
  assert logits_BTV.dtype == jnp.float32


def check_preset(name: str, chip: str, caplog) -> None:
  platform, config = DEVICES[chip].platform, PRESETS[name]()
  log_once.cache_clear()
  with traced_for(chip), caplog.at_level(logging.INFO):
    trace_everything(config)
  loss = LOSS_KERNELS.get(chip, "xla") if config.model.V > 4096 else "xla"
  if (name, chip) == ("llama_3_1_405b", "v5p"):
    loss = "xla"  # rows of 16,384 numbers leave no room in VMEM for a block of the vocabulary
  lines = (re.sub(r" \(.*\)", "", line) for line in caplog.messages)  # without the reason
  losses = {line for line in lines if line.startswith("linear_cross_entropy runs")}
  assert losses == {f"linear_cross_entropy runs {loss} on {platform}"}
  taken = {line for line in caplog.messages if line.startswith("attention runs")}
  fused = FUSED.get((name, platform))
  assert any(line == f"attention runs {fused} on {platform}" for line in taken) == bool(fused)
  assert any(line.startswith("attention runs xla") for line in taken)  # decoding, at the least


@pytest.mark.parametrize("name, chip", QUICK)
def test_some_presets_on_other_platforms(name, chip, with_cudnn, caplog):
  check_preset(name, chip, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("chip", DEVICES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_on_every_platform(name, chip, with_cudnn, caplog):
  check_preset(name, chip, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("chip", DEVICES)
def test_packed_rows_and_without_cudnn(chip):
  with traced_for(chip):
    trace_everything(presets.qwen2_5_0_5b(), packed=True)


def test_packed_rows_and_default_positions_take_the_fused_kernel_and_other_orders_are_refused():
  model = decoder(V=256, D=128, F=128, N=2, K=2, H=64, layers=1)
  compute = ComputeConfig(attention_implementation="splash")
  task = TextTask(TrainConfig(model=model, compute=compute))
  ids, weights = (jax.ShapeDtypeStruct((2, 128), dtype) for dtype in (np.int32, np.float32))
  with traced_for("v5p"):
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(task.model.init, key)
    for rows in (Batch(ids, ids, weights), Batch(ids, ids, weights, ids, ids)):
      assert "loss" in jax.eval_shape(task.objective, params, {}, rows, key)
    assert jax.eval_shape(task.model.apply, params, ids).shape == (2, 128, 256)
    with pytest.raises(UnsupportedError, match="'splash': .* takes no q_positions_BT"):
      jax.eval_shape(lambda params, ids: task.model.apply(params, ids, positions=ids), params, ids)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_published_weights_load_whatever_the_platform(platform, family, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  config, params = huggingface.load(family.folder)
  assert jax.tree.structure(params) == jax.tree.structure(family.params) and config == family.config
