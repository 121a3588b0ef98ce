"""Codes in bytes come back, and a packed model is the fake-quantised one, in the bytes it says."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import QuantRule, QuantSpec, decoder
from jaxlm.config.formats import (
  BitnetFormat,
  BlockFormat,
  Fp8Format,
  LsqFormat,
  MatquantFormat,
  ParetoqFormat,
  QuestFormat,
  SparseFormat,
  UniformFormat,
)
from jaxlm.models import Transformer, linear
from jaxlm.quant import apply, packed_matmul, packing, quest
from jaxlm.quant.pack_model import count_bytes, pack_model
from pallas_kernels.common.errors import UnsupportedError, UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 16, 64, 256])
def test_every_code_comes_back_at_odd_lengths_too(levels):
  codes = packing.CodeRange(-(levels // 2), levels)
  every = np.arange(levels, dtype=np.int32) + codes.lowest
  rows = np.stack([np.resize(every, 13), np.resize(every[::-1], 13)])
  lengths = (1, 5, 7, 8, 13)

  @jax.jit
  def pack_and_unpack(rows):
    every = [packing.pack(rows[:, :length], codes) for length in lengths]
    return every, [packing.unpack(packed, codes, n) for packed, n in zip(every, lengths)]

  for length, packed, unpacked in zip(lengths, *pack_and_unpack(rows)):
    assert packed.dtype == jnp.uint8
    size = -(-length // 5) if levels == 3 else -(-length * codes.bits // 8)
    assert packed.shape == (2, size)
    np.testing.assert_array_equal(unpacked, rows[:, :length])


def test_the_layout_of_a_byte():
  four, two, three = (packing.CodeRange(0, levels) for levels in (16, 4, 3))
  np.testing.assert_array_equal(packing.pack(jnp.array([[1, 2, 3]]), four), [[0x21, 0x03]])
  np.testing.assert_array_equal(packing.pack(jnp.array([[3, 2, 1, 0]]), two), [[0b00011011]])
  np.testing.assert_array_equal(packing.pack(jnp.array([[2, 1, 0, 0, 2]]), three), [[167]])


# format: bytes of codes and scales of a row of 128 weights, and for all rows together
SIZES = {
  UniformFormat(bits=4, shared="group", scale_dtype="bfloat16"): (64 + 2, 0),
  UniformFormat(bits=3, grid="affine"): (48 + 4 + 4, 0),
  UniformFormat(bits=8): (128 + 4, 0),
  LsqFormat(bits=2): (32, 4),
  BitnetFormat(): (26, 4),
  ParetoqFormat(bits="1"): (16 + 4, 0),
  ParetoqFormat(bits="ternary"): (26 + 4, 0),
  ParetoqFormat(bits="2"): (32 + 4, 0),
  QuestFormat(levels="int4"): (64 + 4, 0),
  QuestFormat(levels="int4", sparse=True): (32 + 8 + 4, 0),  # 2.5 bits and the scale
  QuestFormat(levels="fp4", hadamard=64): (64 + 4, 0),
  MatquantFormat(bits=2): (32 + 4 + 4, 0),
  BlockFormat(): (64 + 4, 0),  # 4.25 bits
  BlockFormat(elements="nvfp4"): (64 + 8, 4),  # 4.5 bits
  Fp8Format(size=64): (128 + 8, 0),
}


def code_levels(format):
  """Levels that lie in equal steps; 0 of others."""
  unequal = getattr(format, "sparse", False) or getattr(format, "levels", "") == "fp4"
  unequal |= isinstance(format, BlockFormat | Fp8Format)
  return 0 if unequal else packing.code_range(format).levels


@pytest.mark.parametrize("format", SIZES, ids=str)
def test_a_weight_in_bytes_is_the_fake_quantised_weight(format):
  w_ZD = jnp.asarray(np.random.default_rng(0).normal(size=(6, 128)), jnp.float32)
  w_ZD = w_ZD.at[2].set(0.0)
  x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 128)), jnp.float32)
  stays_packed = packed_matmul.can_multiply_packed(format)
  assert stays_packed == (code_levels(format) in (2, 3, 4, 8, 16, 256))

  @jax.jit
  def both_ways(w_ZD):
    learned = apply.init_scales(w_ZD, format) if apply.learned_names(format) else {}
    packed = packing.pack_weight(w_ZD, format, learned)
    back_ZD = packing.unpack_weight(packed, format, 128)
    if isinstance(format, QuestFormat):
      back_ZD = quest.rotate(back_ZD, format)
    spec, y_BTZ = QuantSpec(weight=format), None
    if stays_packed:
      y_BTZ = packed_matmul.packed_matmul(x_BTD, packed, spec, "float32")
    return packed, back_ZD, apply.quantize(w_ZD, format, scales=learned, N=1), y_BTZ

  packed, back_ZD, want_ZD, y_BTZ = both_ways(w_ZD)
  per_row, whole = SIZES[format]
  assert sum(array.nbytes for array in packed.values()) == 6 * per_row + whole
  np.testing.assert_allclose(back_ZD, want_ZD, atol=1e-6)
  if stays_packed:
    np.testing.assert_allclose(y_BTZ, x_BTD @ want_ZD.T, atol=1e-5, rtol=1e-5)


MODEL = decoder(V=32, D=32, F=64, N=4, K=2, H=8, layers=2)
QUEST = QuestFormat(hadamard=32)
MIXED = (
  QuantRule(match=".*mixer[.][qk]", spec=QuantSpec(weight=QUEST, activation=QUEST)),
  QuantRule(match=".*mixer[.]v", spec=QuantSpec(weight=QUEST)),
  QuantRule(match=".*mixer[.]o", spec=QuantSpec(weight=UniformFormat(bits=3, grid="affine"))),
  QuantRule(match=".*gate", spec=QuantSpec(weight=ParetoqFormat(bits="2"))),
  QuantRule(match=".*up", spec=QuantSpec(weight=BlockFormat(elements="nvfp4"))),
  QuantRule(match=".*down", spec=QuantSpec(weight=SparseFormat())),
  QuantRule(match="head", spec=QuantSpec(weight=UniformFormat(bits=8))),
)


@functools.cache
def initial(config):
  return Transformer(config).init(jax.random.key(0))


@pytest.mark.slow
def test_a_packed_model_gives_the_logits_of_the_fake_quantised_one(monkeypatch):
  stayed_packed = []

  def multiply(x_BTD, packed, spec, dtype):
    stayed_packed.append(spec)
    return packed_matmul.packed_matmul(x_BTD, packed, spec, dtype)

  monkeypatch.setattr(linear, "packed_matmul", multiply)
  config = dataclasses.replace(MODEL, quant=MIXED)
  params = initial(config)
  packed_config, packed = pack_model(config, params)
  ids_BT = jnp.arange(8)[None]

  @functools.partial(jax.jit, static_argnums=0)
  def logits(config, params):
    return Transformer(config).apply(params, ids_BT)

  chex.assert_trees_all_close(
    logits(packed_config, packed), logits(config, params), atol=1e-5, rtol=1e-5
  )
  assert {spec.weight for spec in stayed_packed} == {
    rule.spec.weight for rule in MIXED if packed_matmul.can_multiply_packed(rule.spec.weight)
  }
  declared = jax.eval_shape(Transformer(packed_config).init, jax.random.key(0))
  chex.assert_trees_all_equal_shapes_and_dtypes(packed, declared)
  assert "weight" not in packed["stacks"]["0"]["0"]["mixer"]["q"]
  assert "weight" in packed["stacks"]["0"]["0"]["feedforward"]["down"]
  assert "weight" in params["head"]  # the model that was given is as it was


def test_the_bytes_of_a_30m_model_are_those_of_the_formula():
  """4 bits and a bfloat16 scale for 128 weights; embedding and head, 41M of 71M, in 16 bits."""
  spec = QuantSpec(weight=UniformFormat(bits=4, shared="group", scale_dtype="bfloat16"))
  config = decoder(D=640, F=1792, N=5, K=5, H=128, layers=6, V=32000)
  sizes = count_bytes(dataclasses.replace(config, quant=(QuantRule(match="layers.*", spec=spec),)))
  inner = 6 * (4 * 640 * 640 + 3 * 640 * 1792)
  assert sizes["packed"] == inner * 4.125 / 8
  assert sizes["others"] == 2 * (2 * 32000 * 640 + 13 * 640)
  assert sizes["total"] == sizes["packed"] + sizes["others"]
  assert 1 - sizes["total"] / sizes["plain"] == pytest.approx(0.32, abs=0.01)


def test_what_cannot_be_packed_is_refused():
  with pytest.raises(UserError, match="no rule"):
    pack_model(MODEL, {})
  rules = (QuantRule(match="layers[.]0.*"), QuantRule(match="layers.*", spec=MIXED[3].spec))
  config = dataclasses.replace(MODEL, quant=rules)
  with pytest.raises(UnsupportedError, match="packed differently"):
    pack_model(config, initial(MODEL))
  tied = dataclasses.replace(MODEL, tied=True, quant=MIXED[-1:])
  with pytest.raises(UnsupportedError, match="embedding"):
    pack_model(tied, {})
