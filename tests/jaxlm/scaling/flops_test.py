"""Parameter and FLOP counts against published sizes, hand counts and a traced program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (
  ConvConfig,
  DataConfig,
  KdaConfig,
  LayerSpec,
  MlpConfig,
  ModelConfig,
  NsaConfig,
  TrainConfig,
  decoder,
)
from jaxlm.data.loader import load_text, train_loader
from jaxlm.models import Transformer
from jaxlm.run.text import TextTask
from jaxlm.scaling.flops import parameter_count, train_flops_of_rows, train_flops_per_token
from jaxlm.scaling.mixers import mixing_flops, visible_keys

SMALL = decoder(D=16, F=48, N=4, K=2, H=12, V=40, layers=2, windows=(5, None))


def test_parameters_by_hand():
  # One block: q 16*48, k and v 16*24 each, o 48*16, gate, up and down 16*48 each, two norms of 16.
  block = 768 + 384 + 384 + 768 + 3 * 768 + 32
  counted = parameter_count(SMALL)
  assert counted == (640, 2 * block, 16 + 640)
  assert counted.total == 640 + 2 * block + 656
  tied = parameter_count(dataclasses.replace(SMALL, tied=True))
  assert tied == (640, 2 * block, 16) and tied.total == counted.total - 640


@pytest.mark.parametrize(
  "config, total",
  [
    (
      decoder(D=4096, F=11008, N=32, K=32, H=128, V=32000, layers=32),
      6_738_415_616,
    ),  # Llama 2 7B
    (
      decoder(D=4096, F=14336, N=32, K=8, H=128, V=128256, layers=32),
      8_030_261_248,
    ),  # Llama 3 8B
  ],
)
def test_parameters_of_published_models(config, total):
  assert parameter_count(config).total == total


def test_flops_by_hand():
  config = decoder(D=64, F=168, N=4, K=4, H=16, V=256, layers=3)
  body, head = 145_920, 16_384
  assert train_flops_per_token(config, 128) == 6 * (body + head) + 3 * 6 * 64 * 129
  assert train_flops_per_token(config, 1) == 6 * (body + head) + 3 * 12 * 64
  assert train_flops_per_token(
    dataclasses.replace(config, tied=True), 128
  ) == train_flops_per_token(config, 128)


def test_a_window_limits_the_keys_per_query():
  full = decoder(layers=1)
  one_layer = {window: decoder(layers=1, windows=(window,)) for window in (1, 3, 10, 11)}
  base = train_flops_per_token(full, 10) - 12 * 128 * 5.5
  assert train_flops_per_token(one_layer[1], 10) == pytest.approx(base + 12 * 128)
  assert train_flops_per_token(one_layer[3], 10) == pytest.approx(
    base + 12 * 128 * (1 + 2 + 8 * 3) / 10
  )
  assert train_flops_per_token(one_layer[10], 10) == train_flops_per_token(full, 10)
  assert train_flops_per_token(one_layer[11], 10) == train_flops_per_token(full, 10)


def linear_decoder(config, T):
  """The decoder's matmuls alone, each query meeting only the keys it sees; and arguments for it."""
  mixer = config.pattern[0].mixer
  D, F, N, K, H = config.D, config.pattern[0].feedforward.F, mixer.N, mixer.K, mixer.H
  shapes = {
    "q": (D, N, H),
    "k": (D, K, H),
    "v": (D, K, H),
    "o": (N, H, D),
    "g": (D, F),
    "u": (D, F),
    "d": (F, D),
  }

  def loss(x_TD, blocks, head_DV):
    for spec, w in zip(config.pattern, blocks):
      window = spec.mixer.window or T
      q_TKGH = jnp.einsum("td,dnh->tnh", x_TD, w["q"]).reshape(T, K, N // K, H)
      k_TKH, v_TKH = (
        jnp.einsum("td,dkh->tkh", x_TD, w["k"]),
        jnp.einsum("td,dkh->tkh", x_TD, w["v"]),
      )
      rows = []
      for t in range(T):
        seen = slice(max(0, t + 1 - window), t + 1)
        a_KGS = jnp.einsum("kgh,skh->kgs", q_TKGH[t], k_TKH[seen])
        rows.append(jnp.einsum("kgs,skh->kgh", a_KGS, v_TKH[seen]))
      x_TD = jnp.einsum("tnh,nhd->td", jnp.stack(rows).reshape(T, N, H), w["o"])
      x_TD = (x_TD @ w["g"] + x_TD @ w["u"]) @ w["d"]
    return jnp.sum((x_TD @ head_DV) ** 2)

  blocks = [{name: jnp.ones(shape) for name, shape in shapes.items()} for _ in config.pattern]
  return loss, (jnp.ones((T, D)), blocks, jnp.ones((D, config.V)))


def matmul_flops(jaxpr):
  """2 x output entries x contracted entries, summed over the dots of a traced program."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      total += 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
    elif "jaxpr" in equation.params:
      total += matmul_flops(equation.params["jaxpr"].jaxpr)
  return total


@pytest.mark.parametrize("T", [3, 16])
def test_flops_equal_the_dots_of_a_traced_training_step(T):
  loss, arguments = linear_decoder(SMALL, T)
  step = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)
  assert matmul_flops(step.jaxpr) == T * train_flops_per_token(SMALL, T)


def test_bad_length_is_named():
  with pytest.raises(ValueError, match="length=0: must be at least 1"):
    train_flops_per_token(SMALL, 0)


def test_whole_rows_have_the_flops_of_their_tokens():
  positions_BT = np.tile(np.arange(24), (3, 1))
  flops = train_flops_of_rows(SMALL, positions_BT, np.ones((3, 24), bool))
  assert flops == pytest.approx(3 * 24 * train_flops_per_token(SMALL, 24), rel=1e-12)


def test_packed_rows_count_the_pairs_that_their_mask_allows():
  """Segments of 7, 4 and 9 tokens, then padding, against the mask itself."""
  sizes, T = (7, 4, 9), 24
  segments_T = np.repeat([1, 2, 3, 0], [*sizes, T - sum(sizes)])
  positions_T = np.concatenate([*map(np.arange, sizes), np.zeros(T - sum(sizes), int)])
  back_TT = np.arange(T)[:, None] - np.arange(T)
  mask_TT = (segments_T[:, None] == segments_T) & (back_TT >= 0) & (segments_T[:, None] > 0)
  expected = 6 * sum(sizes) * 16 * 40  # the head
  for spec in SMALL.layer_specs:
    entries = 2 * 16 * 4 * 12 + 2 * 16 * 2 * 12 + 3 * 16 * 48
    pairs = (mask_TT & (back_TT < (spec.mixer.window or T))).sum()
    expected += 6 * entries * sum(sizes) + 12 * 4 * 12 * pairs
  assert train_flops_of_rows(SMALL, positions_T[None], segments_T[None] > 0) == expected
  whole = sum(sizes) * train_flops_per_token(SMALL, T)
  assert expected < whole  # what MFU was wrong by


def test_the_text_task_counts_a_packed_batch(corpus):
  config = TrainConfig(model=SMALL, data=DataConfig(source=str(corpus), length=64, layout="packed"))
  text = load_text(config.data)
  batch = next(train_loader(text, batch=4, seed=0))
  flops = TextTask(config, text).flops(batch)
  assert flops == train_flops_of_rows(SMALL, batch.positions_BT, batch.segment_ids_BT > 0)
  assert flops < batch.weights_BT.sum() * train_flops_per_token(SMALL, 64)


MIXED = {
  "kda": KdaConfig(N=4, K=2, H=16, U=24),
  "gated_delta": KdaConfig(rule="gated_delta", N=4, K=4, H=16, out_gate="silu", conv=0),
  "gla": KdaConfig(rule="gla", N=2, K=2, H=16, gate_rank=5),
  "lightning": KdaConfig(rule="lightning", N=2, K=2, H=16, out_gate="none"),
  "conv": ConvConfig(taps=3),
  "nsa": NsaConfig(N=4, K=2, H=16, U=24, length=8, stride=4, block=16, count=3, window=16),
  "nsa, shared": NsaConfig(
    N=4,
    K=1,
    H=16,
    length=8,
    stride=8,
    block=8,
    count=2,
    compression="linear",
    shared=True,
    gate_hidden=7,
  ),
}


@pytest.mark.parametrize("name", MIXED)
def test_parameters_of_other_mixers_are_those_that_a_model_draws(name):
  spec = LayerSpec(mixer=MIXED[name], feedforward=MlpConfig(F=24))
  config = ModelConfig(D=20, V=40, layers=2, pattern=(spec,))
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0))
  assert parameter_count(config).total == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_flops_of_a_recurrence_and_of_sparse_attention_by_hand():
  keys_X = np.arange(1, 41)  # a row of 40 tokens
  kda = KdaConfig(N=3, K=3, H=16)
  assert mixing_flops(kda, keys_X) == 3 * 40 * 3 * (6 * 16**2 + 3 * 64 * 16 + 64**2)
  assert mixing_flops(KdaConfig(rule="linear", N=1, K=1, H=16), keys_X) == 3 * 40 * (
    4 * 16**2 + 2 * 64 * 16
  )
  assert mixing_flops(ConvConfig(), keys_X) == 0
  nsa = MIXED["nsa"]
  shown = visible_keys(nsa, keys_X)
  # the last token: blocks that start at 0, 4, .. 32; two blocks before its own of 8; 16 keys
  assert [int(x[-1]) for x in shown.values()] == [9, 2 * 16 + 8, 16]
  assert [int(x[6]) for x in shown.values()] == [0, 7, 7]
  pairs = sum(int(x.sum()) for x in shown.values())
  blocks = (40 - 8 + 1) / 4
  compression = 2 * (8 * 16 * 16 + 16 * 16) + 2 * (8 * 24 * 24 + 24 * 24)
  assert mixing_flops(nsa, keys_X) == 6 * 4 * 40 * pairs + 6 * compression * blocks


@pytest.mark.parametrize("name", ["kda", "gated_delta", "conv", "nsa"])
def test_flops_are_most_of_what_the_compiler_counts(name):
  """Wide projections, so that elementwise work and whole tiles of masked products are little."""
  spec = LayerSpec(mixer=MIXED[name], feedforward=MlpConfig(F=512))
  config = ModelConfig(D=256, V=64, layers=1, pattern=(spec,))
  T, lm = 64, Transformer(config)
  params = jax.eval_shape(lm.init, jax.random.key(0))
  lowered = jax.jit(lm.apply).lower(params, jax.ShapeDtypeStruct((1, T), np.int32))
  counted = lowered.compile().cost_analysis()["flops"] / T
  assert 1.0 <= counted / (train_flops_per_token(config, T) / 3) <= 1.2
