"""The one contraction with a weight: precision, gradients, names, and who declares parameters."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, ModelConfig, TrainConfig, decoder
from jaxlm.data.packing import Batch
from jaxlm.models import Transformer, roles
from jaxlm.models.block import Block
from jaxlm.models.linear import Linear, matmul
from jaxlm.run.text import TextTask
from jaxlm.train.accumulate import accumulated_gradients
from sharding import make_mesh
from sharding.batches import globalize

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

AXES, OUT = (None, "mlp"), ("batch", "length", "act_mlp")
BASE = decoder(V=32, D=16, F=24, N=4, K=2, H=4, layers=4, windows=(4, None))
FULL, WINDOW = BASE.pattern[1], BASE.pattern[0]
WIDE = dataclasses.replace(FULL, feedforward=dataclasses.replace(FULL.feedforward, F=40))
UNEVEN = dataclasses.replace(BASE, layers=7, prefix=(WIDE, WIDE), remainder=(WINDOW,))


def drawn(*shape, dtype=np.float32):
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_are_those_of_the_product(dtype):
  kind = np.dtype(jnp.dtype(dtype))
  x_BTD, w_DF, dy_BTF = (
    drawn(2, 3, 8, dtype=kind),
    drawn(8, 5, dtype=kind),
    drawn(2, 3, 5, dtype=kind),
  )
  y_BTF, pull = jax.vjp(lambda x, w: matmul(x, w, AXES, OUT, dtype), x_BTD, w_DF)
  dx_BTD, dw_DF = pull(dy_BTF)
  wide = [x.astype(np.float64) for x in (x_BTD, w_DF, dy_BTF)]
  want = (
    np.einsum("btd,df->btf", wide[0], wide[1]),
    np.einsum("btf,df->btd", wide[2], wide[1]),
    np.einsum("btd,btf->df", wide[0], wide[2]),
  )
  got = (y_BTF, dx_BTD, dw_DF)
  chex.assert_type(got, kind)
  # each is one rounding away from the exact result
  tolerance = 1e-6 if dtype == "float32" else float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2
  for a, b in zip(got, want):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=1.01 * tolerance, atol=1e-6)


def test_in_bfloat16_every_product_takes_bfloat16_and_adds_up_in_float32():
  x_BTD, w_DF = drawn(2, 3, 8, dtype=ml_dtypes.bfloat16), drawn(8, 5, dtype=ml_dtypes.bfloat16)

  def summed(x_BTD, w_DF):
    return jnp.sum(matmul(x_BTD, w_DF, AXES, OUT, "bfloat16"))

  program = jax.jit(jax.value_and_grad(summed, argnums=(0, 1))).lower(x_BTD, w_DF).as_text()
  dots = [line for line in program.splitlines() if "dot_general" in line]
  assert len(dots) == 3  # forward, and backward to x and to w
  for line in dots:
    arguments, result = line.split("->")
    assert "f32" not in arguments and "f32" in result, line


MESHES = [MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=MeshConfig.describe)
def test_bfloat16_gradients_on_a_mesh_are_those_of_one_device(mesh):
  config = TrainConfig(
    batch=16,
    accumulate=2,
    model=decoder(V=32, D=16, F=24, N=4, K=2, H=4, layers=2, qkv_bias=True),
    compute=ComputeConfig(dtype="bfloat16", scan="always"),
    data=DataConfig(length=16),
  )
  task = TextTask(config)
  ids_BT = np.random.default_rng(0).integers(0, 32, (16, 17)).astype(np.int32)
  batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], np.ones((16, 16), np.float32))

  @jax.jit
  def gradients(params, batch):
    def objective(params, batch, key):
      return task.objective(params, {}, batch, key)

    return accumulated_gradients(objective, params, batch, jax.random.key(0), 2)[0]

  def on(mesh):
    with jax.set_mesh(make_mesh(mesh)):
      params = jax.jit(task.init)(jax.random.key(0)).params
      return jax.device_get(gradients(params, globalize(batch, config.batch)))

  one, many = on(MeshConfig(data=1)), on(mesh)
  chex.assert_trees_all_equal_shapes_and_dtypes(many, one)
  for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one)):
    # the devices' sums are rounded to bfloat16 apart
    assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)


def names_of_linears(config: ModelConfig) -> list[tuple[str, ...]]:
  """Returns the names of every contraction with a weight in one forward pass by scans."""
  names: list[tuple[str, ...]] = []

  def watch(run, args, kwargs, context):
    if isinstance(context.module, Linear) and context.method_name == "__call__":
      names.append(context.module.names)
    return run(*args, **kwargs)

  model = Transformer(config, ComputeConfig(scan="always"))
  with nn.intercept_methods(watch):
    jax.eval_shape(
      lambda key: model.apply(model.init(key), jnp.zeros((1, 4), int)), jax.random.key(0)
    )
  return names


def test_every_contraction_names_its_layers():
  names = names_of_linears(UNEVEN)
  flat = [name for several in names for name in several]
  parts = [f"mixer.{name}" for name in "qkvo"] + [
    f"feedforward.{name}" for name in ("gate", "up", "down")
  ]
  assert sorted(flat) == sorted(
    [f"layers.{layer}.{part}" for layer in range(7) for part in parts] + ["head"]
  )
  # one scan over the prefix, one over the pattern, and the last layer
  assert ("layers.0.mixer.q", "layers.1.mixer.q") in names
  assert ("layers.2.mixer.q", "layers.4.mixer.q") in names
  assert ("layers.6.mixer.q",) in names


def test_roles_are_those_of_the_parameters():
  config = dataclasses.replace(UNEVEN, tied=False, post_norms=True)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  named = roles(config)
  chex.assert_trees_all_equal_structs(named, params)
  assert named["embed"]["weight"] == "embedding" and named["head"]["weight"] == "head"
  block = named["stacks"]["1"]["0"]
  assert block["mixer"]["q"]["weight"] == "matrix"
  assert block["mixer_norm"]["weight"] == block["feedforward_post_norm"]["weight"] == "norm"


@pytest.mark.parametrize("scan, calls", [("never", 7), ("always", 4)])
def test_parameters_come_from_the_configuration_alone(scan, calls):
  """No forward pass in init and roles; one in apply: per layer, or per block of a scan."""
  forward, model = [], Transformer(UNEVEN, ComputeConfig(scan=scan))

  def watch(run, args, kwargs, context):
    if isinstance(context.module, Block) and context.method_name == "__call__":
      forward.append(context.module.layers)
    return run(*args, **kwargs)

  with nn.intercept_methods(watch):
    params = model.init(jax.random.key(0))
    jax.eval_shape(model.init, jax.random.key(0))
    roles(UNEVEN)
    model.init_cache(2, 8)
    assert not forward
    jax.eval_shape(model.apply, params, jnp.zeros((2, 8), jnp.int32))
  assert len(forward) == calls
