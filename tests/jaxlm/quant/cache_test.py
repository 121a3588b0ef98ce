"""Keys and values are rounded as rules say; a rotation alone changes nothing."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import KdaConfig, LayerSpec, QuantRule, QuantSpec, RopeConfig, decoder, revise
from jaxlm.config.formats import BlockFormat, LsqFormat, UniformFormat
from jaxlm.models import Transformer
from jaxlm.models.parts import list_matmuls
from jaxlm.quant import uniform
from jaxlm.quant.cache import quantize_heads
from jaxlm.quant.describe import describe
from jaxlm.recipes import load_rules
from pallas_kernels.common.errors import UserError

SMALL = decoder(V=32, D=16, F=24, N=4, K=2, H=8, layers=2)
INT2 = UniformFormat(bits=2, grid="affine")


def cached(part="keys", layer="[0-9]+", **spec):
  return QuantRule(match=f"cache[.]{layer}[.]{part}", spec=QuantSpec(**spec))


def with_rules(*rules, config=SMALL):
  return dataclasses.replace(config, quant=rules)


def test_rotated_queries_and_keys_give_the_same_logits_and_rounded_ones_do_not():
  params = jax.jit(Transformer(SMALL).init)(jax.random.key(0))
  ids_BT = np.random.default_rng(0).integers(0, 32, (2, 12))

  def logits(*rules):
    return jax.jit(Transformer(with_rules(*rules)).apply)(params, ids_BT)

  want = logits()
  chex.assert_trees_all_close(logits(cached(hadamard=8)), want, atol=1e-5)
  for rule in (cached(activation=INT2), cached("values", activation=INT2)):
    assert np.abs(logits(rule) - want).max() > 1e-2


def test_every_head_of_every_position_has_its_own_scale():
  draw = np.random.default_rng(1)
  q, k, v = (draw.normal(size=(1, 5, n, 8)).astype(np.float32) for n in (4, 2, 2))
  rules = (cached("values", "1", activation=INT2), cached(activation=INT2))
  for layer, v_want in ((0, v), (1, uniform.quantize(v, INT2))):
    q_got, k_got, v_got = quantize_heads(q, k, v, rules, [layer])
    chex.assert_trees_all_close(q_got, q)
    chex.assert_trees_all_close((k_got, v_got), (uniform.quantize(k, INT2), v_want))
  k[:, 3, 1] *= 100
  changed = np.asarray(quantize_heads(q, k, v, rules, [0])[1] != k_got).any(axis=(0, 3))
  assert changed[3, 1] and changed.sum() == 1


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
    (
      [cached(activation=INT2)],
      dataclasses.replace(
        SMALL,
        pattern=(
          LayerSpec(mixer=KdaConfig(N=2, K=2, H=8), feedforward=SMALL.pattern[0].feedforward),
        ),
      ),
      "matches none",
    ),
  ],
)
def test_what_cannot_be_meant_is_refused(rules, config, message):
  with pytest.raises(UserError, match=message):
    list_matmuls(with_rules(*rules, config=config))


def test_the_table_says_what_is_kept():
  lines = describe(with_rules(*load_rules("spinquant:4:8:4:8")), "bfloat16")
  assert [" ".join(line.split()) for line in lines[-3:]] == [
    "cache K x H kept, in bfloat16",
    "cache.0-1.keys 2 x 8 Hadamard-8 int4 affine per row",
    "cache.0-1.values 2 x 8 int4 affine per row",
  ]
  assert not any("cache" in line for line in describe(with_rules(), "float32"))
