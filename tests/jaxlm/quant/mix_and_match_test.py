"""Other widths of the same codes, of all layers or of each: which, how many, and the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig, QuantRule, QuantSpec, decoder
from jaxlm.config.formats import MatquantFormat, UniformFormat
from jaxlm.config.quant import find_spec
from jaxlm.models import Transformer
from jaxlm.models.parts import list_matmuls
from jaxlm.quant import matquant
from jaxlm.quant.mix_and_match import mean_bits, mix_model, mix_within, mixes, slice_model
from jaxlm.recipes import load_rules
from pallas_kernels.common.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

NESTED = QuantSpec(weight=MatquantFormat(extra=True))
OUTER = QuantRule(match="layers.*[.]down", spec=QuantSpec(weight=UniformFormat(bits=8)))
SMALL = dataclasses.replace(
  decoder(V=32, D=16, F=24, N=4, K=2, H=4, layers=4),
  quant=(OUTER, QuantRule(match=".*feedforward.*|.*mixer.*", spec=NESTED)),
)


def bits_of(config: ModelConfig) -> dict[str, int]:
  names = [name for matmul in list_matmuls(config) for name in matmul.names]
  weights = {name: find_spec(config.quant, name).weight for name in names}
  return {n: w.bits for n, w in weights.items() if isinstance(w, MatquantFormat)}


@pytest.mark.parametrize(
  "order, want",
  [
    ("pyramid", (2, 8, 4, 2)),
    ("reverse pyramid", (8, 2, 2, 4)),
    ("increasing", (2, 2, 4, 8)),
    ("decreasing", (8, 4, 2, 2)),
  ],
)
def test_an_order_says_which_layers_are_wide(order, want):
  all_mixes = mixes(4, order)
  assert len(set(all_mixes)) == 15  # 3 widths over 4 layers
  (mix,) = [mix for mix in all_mixes if sorted(mix) == [2, 2, 4, 8]]
  assert mix == want


def test_a_mix_gives_each_layer_its_bits_and_leaves_other_rules():
  mixed = mix_model(SMALL, (2, 8, 8, 4))
  of_layer = {0: 2, 1: 8, 2: 8, 3: 4}
  bits = bits_of(mixed)
  assert bits == {name: of_layer[int(name.split(".")[1])] for name in bits_of(SMALL)}
  assert len(bits) == 4 * 6 and mixed.quant[0] == OUTER
  assert all(rule.spec.weight.extra for rule in mixed.quant[1:])
  assert set(bits_of(slice_model(SMALL, 3)).values()) == {3}


def test_a_budget_is_kept_and_used_up():
  assert mix_within(SMALL, 4) == (4, 4, 4, 4)
  assert mix_within(SMALL, 3) == (2, 4, 4, 2)
  assert mix_within(SMALL, 6, "decreasing") == (8, 8, 4, 4)
  assert mix_within(SMALL, 2.9) == (2, 4, 2, 2) and mean_bits(SMALL, (2, 4, 2, 2)) == 2.5
  with pytest.raises(UserError, match="budget=1.9: must be at least 2 bits"):
    mix_within(SMALL, 1.9)


def test_bits_are_counted_by_weight():
  """A layer whose nested weights are fewer counts less."""
  rules = (
    QuantRule(match="layers[.]0[.]mixer.*"),
    QuantRule(match="layers.*[.](mixer|feedforward)[.].*", spec=NESTED),
  )
  config = dataclasses.replace(SMALL, quant=rules)
  mixer, feedforward = 2 * (16 * 16 + 16 * 8), 3 * 16 * 24
  want = (8 * feedforward + 2 * 3 * (mixer + feedforward)) / (3 * mixer + 4 * feedforward)
  assert mean_bits(config, (8, 2, 2, 2)) == pytest.approx(want)


def test_logits_of_a_mix_are_those_of_weights_that_were_sliced_before():
  config = dataclasses.replace(SMALL, quant=load_rules("matquant:8"), layers=3)
  params = Transformer(config).init(jax.random.key(0))
  mix, ids = (2, 8, 4), jnp.arange(8)[None]

  @jax.jit
  def run(params):
    sliced = jax.tree.map(lambda w: w, params)
    for part in sliced["stacks"]["0"]["0"]["feedforward"].values():
      part["weight"] = jnp.stack(
        [
          matquant.quantize(w.T, MatquantFormat(bits=bits)).T
          for w, bits in zip(part["weight"], mix)
        ]
      )
    plain = Transformer(dataclasses.replace(config, quant=())).apply(sliced, ids)
    return plain, Transformer(mix_model(config, mix)).apply(params, ids)

  want, got = run(params)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_has_no_nested_weights_or_other_layers_is_refused():
  with pytest.raises(UserError, match="has no rule whose weights are the top bits"):
    slice_model(dataclasses.replace(SMALL, quant=(OUTER,)), 4)
  with pytest.raises(UserError, match=r"bits_L=\(2, 2\): must be 4, one per layer"):
    mix_model(SMALL, (2, 2))
