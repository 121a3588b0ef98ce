"""Keys and values are rounded as rules say; a rotation alone changes nothing."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (
  ComputeConfig,
  ConvConfig,
  KdaConfig,
  LayerSpec,
  NsaConfig,
  QuantRule,
  QuantSpec,
  RopeConfig,
  decoder,
  revise,
)
from jaxlm.config.formats import BlockFormat, LsqFormat, QuestFormat, UniformFormat
from jaxlm.models import Transformer
from jaxlm.models.parts import list_matmuls
from jaxlm.quant.cache import empty, hold, read, round_heads
from jaxlm.quant.describe import describe, describe_cache
from jaxlm.recipes import load_rules
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

SMALL = decoder(V=32, D=16, F=24, N=4, K=2, H=8, layers=2)
INT2, INT4 = UniformFormat(bits=2, grid="affine"), UniformFormat(bits=4)


def cached(part="keys", layer="[0-9]+", **spec):
  return QuantRule(match=f"cache[.]{layer}[.]{part}", spec=QuantSpec(**spec))


def of_mixer(mixer):
  spec = LayerSpec(mixer=mixer, feedforward=SMALL.pattern[0].feedforward)
  return dataclasses.replace(SMALL, pattern=(spec,))


def with_rules(*rules, config=SMALL):
  return dataclasses.replace(config, quant=rules)


def test_rotated_queries_and_keys_give_the_same_logits_and_rounded_ones_do_not():
  one_layer = dataclasses.replace(SMALL, layers=1)
  ids_BT = np.random.default_rng(0).integers(0, 32, (2, 12))
  lists = [
    (),
    (cached(hadamard=8),),
    (cached(activation=INT2),),
    (cached("values", activation=INT2),),
  ]

  @jax.jit
  def logits(key):
    params = Transformer(one_layer).init(key)
    models = [Transformer(with_rules(*rules, config=one_layer)) for rules in lists]
    return [model.apply(params, ids_BT) for model in models]

  want, turned, *rounded = logits(jax.random.key(0))
  chex.assert_trees_all_close(turned, want, atol=1e-5)
  for got in rounded:
    assert np.abs(got - want).max() > 1e-2


FORMATS = [
  INT2,
  UniformFormat(bits=3),
  UniformFormat(bits=8, shared="group", size=4, scale_dtype="bfloat16"),
  QuestFormat(levels="int4", hadamard=8),
  QuestFormat(levels="fp4", hadamard=0),
  BlockFormat(elements="mxfp8_e4m3"),
]
BYTES = [2 + 4 + 4, 3 + 4, 8 + 2 * 2, 4 + 4, 4 + 4, 32 + 1]


@pytest.mark.parametrize("format, size", list(zip(FORMATS, BYTES)), ids=map(str, FORMATS))
def test_what_is_held_in_bytes_is_what_training_sees(format, size):
  """Every head of every position has scales of its own."""
  H = 32 if isinstance(format, BlockFormat) else 8
  x_BTKH = np.random.default_rng(1).normal(size=(1, 5, 2, H)).astype(np.float32)
  spec = QuantSpec(activation=format)

  @jax.jit
  def both(x_BTKH):
    held = hold(x_BTKH, spec)
    return held, read(held, spec, H, "float32"), round_heads(x_BTKH, spec)

  held, got, want = both(x_BTKH)
  assert sum(leaf.nbytes for leaf in held.values()) == 5 * 2 * size
  assert {leaf.shape[:3] for leaf in held.values()} == {(1, 5, 2)}
  chex.assert_trees_all_close(got, want, atol=1e-5)
  assert np.abs(want - x_BTKH).max() > 1e-4
  x_BTKH[:, 3, 1] *= 100
  changed = np.asarray(both(x_BTKH)[1] != got).any(axis=(0, 3))
  assert changed[3, 1] and changed.sum() == 1
  like = empty(x_BTKH.shape, spec, "float32")
  chex.assert_trees_all_equal_shapes_and_dtypes(held, like)


@pytest.mark.slow
def test_a_cache_in_bytes_gives_the_logits_of_the_pass_without_one():
  """Layers of one stack with different formats have caches of their own, each in its bytes."""
  config = with_rules(cached("keys", "1", activation=INT2, hadamard=8), cached(activation=INT4))
  model = Transformer(config)
  ids_BT = np.random.default_rng(0).integers(0, 32, (2, 6))

  @jax.jit
  def both(key):
    params = model.init(key)
    first, cache = model.apply(params, ids_BT[:, :5], cache=model.init_cache(2, 8))
    last, cache = model.apply(params, ids_BT[:, 5:], positions=jnp.full((1, 1), 5), cache=cache)
    return jnp.concatenate([first, last], axis=1), model.apply(params, ids_BT), cache

  got, want, cache = both(jax.random.key(0))
  chex.assert_trees_all_close(got, want, atol=1e-5)
  keys = [run["0"].k_BSKH["codes"] for run in cache["0"]]
  assert [leaf.shape for leaf in keys] == [(1, 2, 8, 2, 4), (1, 2, 8, 2, 2)]
  assert {leaf.dtype for leaf in keys} == {jnp.dtype("uint8")}


@pytest.mark.parametrize(
  "rules, config, message",
  [
    ([cached("value")], SMALL, "matches none"),
    ([cached(layer="2")], SMALL, "matches none"),
    ([cached(weight=INT2)], SMALL, "quant.weight"),
    ([cached(activation=LsqFormat())], SMALL, "not learned"),
    ([cached(activation=UniformFormat(shared="tensor"))], SMALL, "one head of one position"),
    ([cached(activation=BlockFormat(elements="nvfp4"))], SMALL, "one head of one position"),
    ([cached("values", hadamard=8)], SMALL, "only keys are rotated"),
    (
      [cached(activation=INT2)],
      revise(SMALL, rope=RopeConfig(scaling="dynamic", factor=4.0, original_length=8)),
      "matches none",
    ),
    ([cached(activation=INT2)], of_mixer(KdaConfig(N=2, K=2, H=8)), "matches none"),
    (
      [cached("state", "1", activation=INT2)],
      of_mixer(KdaConfig(N=2, K=2, H=8)),
      "cache.1.state",
    ),
    ([cached(".*", activation=INT2)], of_mixer(ConvConfig()), "cache.0.inputs"),
    (
      [cached("selected.keys", hadamard=8), cached("compressed.keys", activation=INT2)],
      of_mixer(NsaConfig(N=2, K=1, H=8)),
      "rotated alike",
    ),
  ],
)
def test_what_cannot_be_meant_is_refused(rules, config, message):
  with pytest.raises(UserError, match=message):
    list_matmuls(with_rules(*rules, config=config))


def test_inputs_are_not_pruned():
  with pytest.raises(UserError, match="only weights are pruned"):
    cached(activation=QuestFormat(sparse=True))


def test_the_table_says_what_is_kept_in_how_many_bytes():
  rules = load_rules("spinquant:4:8:4:8")
  lines = describe(with_rules(*rules), "bfloat16")
  assert [" ".join(line.split()) for line in lines[-3:]] == [
    "cache K x H kept bytes",
    "cache.0-1.keys 2 x 8 Hadamard-8 int4 affine per row 24",
    "cache.0-1.values 2 x 8 int4 affine per row 24",
  ]
  assert not any("cache" in line for line in describe(with_rules(), "float32"))
  assert describe_cache(with_rules(), ComputeConfig()) == []
  (line,) = describe_cache(with_rules(*rules), ComputeConfig(), 10)
  assert line == "cache of a row of 10 positions: 960 bytes, of 2,560 in float32 (37.5%)"


def test_native_sparse_attention_keeps_blocks_positions_and_a_window_in_bytes():
  mixer = NsaConfig(N=4, K=2, H=8, length=4, stride=2, block=8, count=3, window=6)
  config = with_rules(cached(".*[.]keys", activation=INT4), config=of_mixer(mixer))
  lines = describe(config, "float32")[-7:]
  assert "cache.0-1.compressed.keys 2 x 8 int4 symmetric per row 16" in map(
    lambda line: " ".join(line.split()), lines
  )
  keys, values, raw = (24 + 50 + 6) * 16, (24 + 50 + 6) * 64, 4 * 128
  (line,) = describe_cache(config, ComputeConfig(), 50)
  assert f"{2 * (keys + values + raw + 4):,} bytes" in line
