"""Mixers on meshes: decoding, losses and gradients are those of one device."""

# B rows, T positions
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import presets
from jaxlm.config import (
  ConvConfig,
  DataConfig,
  KdaConfig,
  LayerSpec,
  MlpConfig,
  ModelConfig,
  NsaConfig,
  OptimizerConfig,
  PipelineConfig,
  QuantRule,
  QuantSpec,
)
from jaxlm.config.formats import UniformFormat
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer
from jaxlm.run.resolve import check_mesh
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from pallas_kernels.common.errors import UserError
from sharding import MeshConfig, make_mesh
from sharding.rules import shard

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

B, T, V = 8, 16, 40
SIZES = {"length": 4, "stride": 2, "block": 4, "count": 3, "window": 5}
MIXERS = {
  "kda": KdaConfig(N=4, K=2, H=6, U=8),
  "nsa": NsaConfig(N=4, K=2, H=6, U=8, gate_hidden=5, **SIZES),
  "conv": ConvConfig(),
}
PAIRS = [("kda", "conv"), ("nsa", "conv")]
ALL = MeshConfig(data=2, fsdp=2, tensor=2)
DRAW = np.random.default_rng(0)
IDS_BT = DRAW.integers(0, V, (B, T)).astype(np.int32)
TARGETS_BT = DRAW.integers(0, V, (B, T)).astype(np.int32)


def model(*names):
  specs = tuple(LayerSpec(mixer=MIXERS[name], feedforward=MlpConfig(F=16)) for name in names)
  return ModelConfig(D=16, V=V, layers=2, pattern=specs[:1] if len(set(specs)) == 1 else specs)


def training(*names, **fields):
  """A configuration of steps on packed rows of T tokens."""
  config = dataclasses.replace(presets.micro(), model=model(*names), batch=B, **fields)
  optimizer = OptimizerConfig(learning_rate=1e-2, warmup=0, eps=1e-4)
  return dataclasses.replace(config, data=DataConfig(length=T), optimizer=optimizer)


def train_twice(config, mesh):
  """(loss, gradient norm, parameters) after the second of two steps on packed rows."""
  segments_BT = np.broadcast_to(np.repeat([1, 2, 0], [7, 8, 1]), (B, T)).astype(np.int32)
  starts_T = np.repeat([0, 7, 15], [7, 8, 1])
  positions_BT = np.broadcast_to(np.arange(T) - starts_T, (B, T)).astype(np.int32)
  weights_BT = (segments_BT > 0).astype(np.float32)
  batch = Batch(IDS_BT, TARGETS_BT, weights_BT, positions_BT, segments_BT)
  with jax.set_mesh(make_mesh(mesh)):
    task = TextTask(config)
    state = jax.jit(lambda: init_state(config, task))()
    step = jax.jit(make_train_step(config, task))
    batch = Batch(*(shard(jnp.asarray(x), "batch", None) for x in batch))
    for _ in range(2):
      state, metrics = step(state, batch)
    return jax.device_get((metrics["loss"], metrics["grad_norm"], state.params))


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_steps_on_packed_rows_equal_those_of_one_device(names):
  want = train_twice(training(*names), MeshConfig(data=1))
  got = train_twice(training(*names), ALL)
  chex.assert_trees_all_close(got[:2], want[:2], rtol=1e-4)
  chex.assert_trees_all_close(got[2], want[2], atol=3e-4)


@pytest.mark.slow
def test_a_pipeline_of_stages_equals_one_device():
  want = train_twice(training("kda", "kda"), MeshConfig(data=1))
  staged = training("kda", "kda", accumulate=2, pipeline=PipelineConfig(schedule="1f1b"))
  got = train_twice(staged, MeshConfig(data=2, stage=2, tensor=2))
  chex.assert_trees_all_close(got[:2], want[:2], rtol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def decode(lm, params, ids_BT, positions_BT):
  """Logits of a prefill whose rows have different lengths, and of one more position."""
  cache = lm.init_cache(B, ids_BT.shape[1] + 1)
  first_BTV, cache = lm.apply(params, ids_BT, positions=positions_BT, cache=cache)
  next_B1 = jnp.max(positions_BT, axis=1, keepdims=True) + 1
  second_B1V, _ = lm.apply(params, ids_BT[:, :1], positions=next_B1, cache=cache)
  return first_BTV, second_B1V


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_cached_logits_equal_those_of_one_device(names):
  """Of rows that end around a chunk of delta attention; sparse attention has a rounded cache."""
  rounded = tuple(
    QuantRule(match=f"cache.*{part}", spec=QuantSpec(activation=UniformFormat(bits=8)))
    for part in ("selected.keys", "compressed.values")
  )
  lm = Transformer(dataclasses.replace(model(*names), quant=rounded * ("nsa" in names)))
  lengths_B1 = np.array([63, 64, 65, 66, 1, 7, 12, 3])[:, None]
  positions_BT = np.where(np.arange(66) < lengths_B1, np.arange(66), -1).astype(np.int32)
  ids_BT = np.random.default_rng(1).integers(0, V, (B, 66)).astype(np.int32)
  params = lm.init(jax.random.key(3))
  want = jax.device_get(decode(lm, params, ids_BT, positions_BT))
  host = jax.device_get(params)
  with jax.set_mesh(make_mesh(ALL)):
    wanted = jax.eval_shape(lm.init, jax.random.key(0))
    mesh = jax.sharding.get_mesh()
    params = jax.tree.map(
      lambda w, like: jax.device_put(
        w, jax.sharding.NamedSharding(mesh, jax.typeof(like).sharding.spec)
      ),
      host,
      wanted,
    )
    rows = [shard(jnp.asarray(x), "batch", None) for x in (ids_BT, positions_BT)]
    got = jax.device_get(decode(lm, params, *rows))
  seen_BT = positions_BT >= 0
  chex.assert_trees_all_close(got[0][seen_BT], want[0][seen_BT], atol=1e-5)
  chex.assert_trees_all_close(got[1], want[1], atol=1e-5)


@pytest.mark.parametrize(
  "name, mesh, message",
  [
    ("kda", MeshConfig(data=1, tensor=4), r"model.pattern.0.mixer.K=2: must be a multiple of"),
    ("nsa", MeshConfig(data=1, tensor=4), r"model.pattern.0.mixer.K=2: must be a multiple of"),
    ("conv", MeshConfig(data=1, tensor=3), r"model.D=16: must be a multiple of mesh.tensor=3"),
    ("kda", MeshConfig(data=1, context_ring=2), r"context_ring=2: .* is a KdaConfig, which goes"),
    ("nsa", MeshConfig(data=1, context_ulysses=2), r"context_ulysses=2: .* is a NsaConfig, which"),
  ],
)
def test_meshes_that_cannot_split_a_mixer_are_refused_before_training(name, mesh, message):
  config = dataclasses.replace(training(name, name), mesh=mesh, data=DataConfig(length=24))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, V=48))
  with pytest.raises(UserError, match=message):
    check_mesh(config, devices=mesh.tensor * mesh.context_ring * mesh.context_ulysses)
