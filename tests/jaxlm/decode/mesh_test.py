"""Cached decoding on meshes gives the logits and the texts of one device."""

import functools

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, QuantRule, QuantSpec, RopeConfig, decoder, revise
from jaxlm.config.formats import UniformFormat
from jaxlm.decode import Sampler, generate, generation
from jaxlm.models import Transformer
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CONFIG = decoder(
  V=64, D=16, F=32, N=4, K=2, H=8, layers=2, windows=(4, None), qkv_bias=True, qk_norm=True
)
DYNAMIC = revise(CONFIG, rope=RopeConfig(scaling="dynamic", factor=4.0, original_length=4))
TIED = revise(CONFIG, tied=True, out_bias=True, post_norms=True, cap=5.0)
INT4 = QuantSpec(activation=UniformFormat(), hadamard=8)
ROUNDED = revise(TIED, quant=(QuantRule(match="cache.*keys", spec=INT4),))
MODELS = {
  "plain": Transformer(CONFIG),
  "scanned": Transformer(CONFIG, ComputeConfig(scan="always")),
  "dynamic": Transformer(DYNAMIC),
  "tied, keys in int4": Transformer(ROUNDED),
}
MESHES = {
  "tensor": MeshConfig(data=4, tensor=2),
  "fsdp": MeshConfig(data=1, fsdp=8),
  "data": MeshConfig(data=8),
  "all": MeshConfig(data=2, fsdp=2, tensor=2),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2], [7, 7, 0]]
LENGTHS_B = np.array([5, 16, 1, 9, 2, 7, 12, 3], np.int32)
IDS_BT = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def two_steps(model, params):
  """Logits after the prompts and after one more position, which stands at another place per row."""
  cache = model.init_cache(8, 18)
  first_BV, cache = generation.prefill(model, params, IDS_BT, LENGTHS_B, cache)
  positions_B1 = LENGTHS_B[:, None]
  second_B1V, _ = model.apply(params, IDS_BT[:, :1], positions=positions_B1, cache=cache)
  return first_BV, second_B1V[:, 0]


@functools.cache
def params_of(config):
  return Transformer(config).init(jax.random.key(3))


@functools.cache
def on_one_device(model):
  return jax.device_get(two_steps(model, params_of(model.config)))


def move(config, params):
  """Puts parameters where the current mesh wants them."""
  wanted = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  mesh = jax.sharding.get_mesh()

  def put(w, like):
    sharding = jax.sharding.NamedSharding(mesh, jax.typeof(like).sharding.spec)
    return jax.device_put(np.asarray(w), sharding)

  return jax.tree.map(put, params, wanted)


QUICK = ("plain", "dynamic")  # on the mesh with every axis
CASES = [
  pytest.param(mesh, name, marks=() if mesh == "all" and name in QUICK else pytest.mark.slow)
  for mesh, name in [
    *((mesh, "plain") for mesh in MESHES),
    *(("all", name) for name in MODELS if name != "plain"),
  ]
]


@pytest.mark.parametrize("mesh, name", CASES)
def test_logits_equal_those_of_one_device(mesh, name):
  model = MODELS[name]
  params, want = params_of(model.config), on_one_device(model)
  with jax.set_mesh(make_mesh(MESHES[mesh])):
    got = jax.device_get(two_steps(model, move(model.config, params)))
  chex.assert_trees_all_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor", "data"])
def test_texts_equal_those_of_one_device(mesh):
  """Three prompts, which no mesh divides; drawn and greedy."""
  sampler = Sampler(temperature=2.0, top_k=20, top_p=0.9)
  draw = functools.partial(
    generate, CONFIG, prompt_ids=PROMPTS, max_new=6, sampler=sampler, key=jax.random.key(1)
  )
  params = params_of(CONFIG)
  want = draw(params)
  assert len(set(map(tuple, want.tolist()))) == 3
  with jax.set_mesh(make_mesh(MESHES[mesh])):
    got = draw(move(CONFIG, params))
  np.testing.assert_array_equal(got, want)


def test_the_cache_is_split_over_rows_and_heads():
  with jax.set_mesh(make_mesh(MESHES["all"])):
    cache = jax.jit(lambda: Transformer(CONFIG).init_cache(8, 16))()
  for leaf in jax.tree.leaves(cache):
    R, B, S, K, H = leaf.shape
    assert leaf.addressable_shards[0].data.shape == (R, B // 4, S, K // 2, H)
