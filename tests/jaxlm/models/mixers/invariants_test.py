"""What every mixer must keep: caches, pieces, padding, segments and causality change no logits."""

# B rows, T positions, D model
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (
  AttentionConfig,
  ComputeConfig,
  ConvConfig,
  KdaConfig,
  LayerSpec,
  MlpConfig,
  ModelConfig,
  NsaConfig,
  QuantRule,
  QuantSpec,
)
from jaxlm.config.formats import UniformFormat
from jaxlm.models import Transformer
from jaxlm.models.mixers import MIXERS
from jaxlm.models.mixers.context import Context
from pallas_kernels.common.errors import UnsupportedError
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

B, T, V = 6, 69, 40  # a chunk of delta attention has 64 positions
SIZES = {"length": 4, "stride": 2, "block": 8, "count": 3, "window": 6}
NSA = NsaConfig(N=4, K=2, H=6, U=10, gate_hidden=5, **SIZES)
KDA = KdaConfig(N=4, K=2, H=6, U=10)


def model(*mixers, layers=None):
  pattern = tuple(LayerSpec(mixer=mixer, feedforward=MlpConfig(F=24)) for mixer in mixers)
  return ModelConfig(D=16, V=V, layers=layers or len(mixers), pattern=pattern)


HYBRID = model(KDA, NSA, ConvConfig(), AttentionConfig(N=2, K=1, H=8, rope=None))
MODELS = {
  "hybrid": HYBRID,
  "delta rules": model(
    KdaConfig(rule="gated_delta", N=2, K=2, H=8, out_gate="silu"),
    KdaConfig(rule="delta", N=2, K=2, H=8, negative_eigenvalues=True, conv=0, out_gate="none"),
    KdaConfig(N=2, K=1, H=8, decay_bound=-5.0, gate_rank=3),
  ),
  "decays alone": model(
    KdaConfig(rule="gla", N=2, K=1, H=8),
    KdaConfig(rule="lightning", N=2, K=2, H=8),
    KdaConfig(rule="linear", N=2, K=2, H=8),
  ),
  "sparse and window": dataclasses.replace(
    model(
      NsaConfig(N=2, K=1, H=6, compression="linear", shared=True, rope=None, **SIZES),
      NsaConfig(N=2, K=2, H=8, U=6, compression="mean", **SIZES),
      AttentionConfig(N=2, K=1, H=8, window=5),
    ),
    quant=(
      QuantRule(match="cache.1.*keys", spec=QuantSpec(activation=UniformFormat(), hadamard=8)),
      QuantRule(match="cache.[12].*values", spec=QuantSpec(activation=UniformFormat(bits=8))),
    ),
  ),
}
CASES = [pytest.param(name, marks=[] if name == "hybrid" else pytest.mark.slow) for name in MODELS]
IDS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
ALL_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
WHOLE_BT = np.ones((B, T), np.int32)
ENDS_B = np.array([0, 7, 20, 63, 64, T - 1])
"""positions whose gradients are looked at, one in each row"""


@functools.cache
def init(config):
  """Weights large enough that logits differ, with norms, taps and gates that are no defaults."""
  params = jax.device_get(Transformer(config).init(jax.random.key(1)))
  draw = np.random.default_rng(1)
  noise = lambda w: w * draw.uniform(0.6, 1.6, w.shape) + 0.1 * draw.normal(size=w.shape)  # noqa: E731
  return jax.tree.map(lambda w: noise(w).astype(np.float32), params)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, ids_BT, positions_BT, segment_ids_BT):
  options = {"positions": positions_BT, "segment_ids": segment_ids_BT, "in_order": True}
  return Transformer(config).apply(params, ids_BT, **options)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, ids_BT, positions_BT, segment_ids_BT):
  """Logits, and the gradient of each row's logits at ENDS_B by the states of all positions."""
  lm = Transformer(config)
  context = Context(positions_BT, segment_ids_BT, in_order=True)

  def chosen(x_BTD):
    for index in range(len(config.stacks)):
      x_BTD, _, _ = lm.run_stack(index, params["stacks"][str(index)], x_BTD, context)
    logits_BTV = lm.finish(params, x_BTD)
    ends = logits_BTV[jnp.arange(B), ENDS_B] * jnp.linspace(1, 2, V)[None]
    return jnp.sum(ends), logits_BTV

  (_, logits_BTV), gradient_BTD = jax.value_and_grad(chosen, has_aux=True)(lm.embed(params, ids_BT))
  return logits_BTV, gradient_BTD


@functools.partial(jax.jit, static_argnums=0)
def cached(config, params, ids_BT, positions_BT, cache):
  return Transformer(config).apply(params, ids_BT, positions=positions_BT, cache=cache)


def assert_equal_logits(config, got, want):
  """A key or value between two steps of a rounded cache may fall to either, in another program."""
  np.testing.assert_allclose(got, want, atol=0.03 if config.quant else 1e-4)
  assert np.mean(np.abs(got - want) > 1e-4) < 0.1


def empty(config):
  return jax.device_get(Transformer(config).init_cache(B, T))


@functools.cache
def full(config):
  return jax.device_get(forward(config, init(config), IDS_BT, ALL_BT, WHOLE_BT))


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_single_steps_equal_the_full_pass(name):
  """Rows prefill 1, 7, 20, 63, 64 and 65 positions and decode the others; ended rows pad."""
  config, lengths_B = MODELS[name], np.array([1, 7, 20, 63, 64, 65])
  positions_BT = np.where(ALL_BT < lengths_B[:, None], ALL_BT, -1)
  logits_BTV, cache = cached(config, init(config), IDS_BT, positions_BT, empty(config))
  logits_BTV, want_BTV = np.array(logits_BTV), full(config)
  while (lengths_B < T).any():
    at_B = np.where(lengths_B < T, lengths_B, -1)
    next_B1 = np.take_along_axis(IDS_BT, at_B[:, None], axis=1)
    step_B1V, cache = cached(config, init(config), next_B1, at_B[:, None], cache)
    going = at_B >= 0
    logits_BTV[going, at_B[going]] = np.asarray(step_B1V)[going, 0]
    lengths_B = np.minimum(lengths_B + 1, T)
  assert_equal_logits(config, logits_BTV, want_BTV)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "sparse and window"])
def test_prefill_in_pieces_equals_prefill_at_once(name):
  config, cache, pieces = MODELS[name], empty(MODELS[name]), []
  for start in range(0, T, T // 3):  # 0, 23, 46: within blocks, chunks and windows
    piece = slice(start, start + T // 3)
    arrays = (IDS_BT[:, piece], ALL_BT[:, piece])
    logits_BTV, cache = cached(config, init(config), *arrays, cache)
    pieces.append(logits_BTV)
  assert_equal_logits(config, np.concatenate(pieces, axis=1), full(config))


@pytest.mark.parametrize("name", CASES)
def test_padding_before_and_between_tokens_changes_nothing(name):
  config, draw = MODELS[name], np.random.default_rng(2)
  lengths_B = np.array([T, 40, 1, 64, 23, 5])
  positions_BT = np.full((B, T), -1, np.int32)
  for row, length in zip(positions_BT[1:], lengths_B[1:]):
    columns = np.arange(T - length, T) if length != 40 else np.sort(draw.permutation(T)[:40])
    row[columns] = np.arange(length)
  positions_BT[0] = np.arange(T)
  ids_BT = np.where(positions_BT >= 0, np.take_along_axis(IDS_BT, positions_BT, axis=1), 3)
  logits_BTV, _ = cached(config, init(config), ids_BT, positions_BT, empty(config))
  moved_BTV = np.array(full(config))
  for row in range(B):
    moved_BTV[row, : lengths_B[row]] = np.asarray(logits_BTV)[row, positions_BT[row] >= 0]
  assert_equal_logits(config, moved_BTV, full(config))


def packed_rows():
  """Returns starts [T] of four documents and padding, and ids, positions, segments [B, T]."""
  sizes = (5, 33, 1, 22)
  segments_T = np.repeat([1, 2, 3, 4, 0], [*sizes, T - sum(sizes)])
  starts_T = np.repeat(np.cumsum([0, *sizes]), [*sizes, T - sum(sizes)])
  segments_BT = np.broadcast_to(segments_T, (B, T)).astype(np.int32)
  positions_BT = np.broadcast_to(np.arange(T) - starts_T, (B, T)).astype(np.int32)
  ids_BT = IDS_BT[:, np.arange(T) - starts_T]  # each document is the start of the row
  return starts_T, (ids_BT, positions_BT, segments_BT)


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_equal_the_separate_sequences(name):
  config = MODELS[name]
  starts_T, rows = packed_rows()
  want_BTV = full(config)[:, np.arange(T) - starts_T]
  assert_equal_logits(config, np.asarray(forward(config, init(config), *rows)), want_BTV)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_reaches_another_document(name):
  config = MODELS[name]
  _, rows = packed_rows()
  _, gradient_BTD = run(config, init(config), *rows)
  segments_T = rows[2][0]
  reached_BT = np.abs(np.asarray(gradient_BTD)).max(-1) > 0
  visible_BT = (segments_T == segments_T[ENDS_B][:, None]) & (np.arange(T) <= ENDS_B[:, None])
  assert not (reached_BT & ~visible_BT).any()
  assert reached_BT[np.arange(B), ENDS_B].all() and reached_BT.sum() > B


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_reaches_a_later_position(name):
  config = MODELS[name]
  logits_BTV, gradient_BTD = run(config, init(config), IDS_BT, ALL_BT, WHOLE_BT)
  np.testing.assert_allclose(logits_BTV, full(config), atol=1e-4)
  reached_BT = np.abs(np.asarray(gradient_BTD)).max(-1) > 0
  assert not (reached_BT & (np.arange(T) > ENDS_B[:, None])).any()
  assert reached_BT[-1].sum() > T // 2  # the last position does depend on much of the row


def test_tokens_that_do_not_follow_the_cache_give_nan():
  """A recurrence cannot go back, or over a gap; the row stays undefined from there on."""
  config, cache = HYBRID, empty(HYBRID)
  step = functools.partial(cached, config, init(config))
  _, cache = step(IDS_BT[:, :1], np.zeros((B, 1), np.int32), cache)
  at_B1 = np.array([[1], [2], [0], [1], [1], [-1]], np.int32)
  logits_B1V, cache = step(IDS_BT[:, 1:2], at_B1, cache)
  bad_B = np.isnan(logits_B1V).all(axis=(1, 2))
  np.testing.assert_array_equal(bad_B, [False, True, True, False, False, False])
  at_B1 = np.array([[2], [1], [1], [2], [2], [1]], np.int32)
  logits_B1V, _ = step(IDS_BT[:, 2:3], at_B1, cache)
  np.testing.assert_array_equal(np.isnan(logits_B1V).any(axis=(1, 2)), bad_B)


@pytest.mark.parametrize("dtype, wide", [("float32", 4), ("bfloat16", 2)])
def test_caches_hold_as_many_bytes_as_their_formulas(dtype, wide):
  """States are float32, and each row of a recurrent cache has an int32 for its next position."""
  rows, length = 3, 50
  blocks = (length - 4) // 2 + 1
  numbers = {
    KDA: 4 * (4 * 6 * 10) + wide * 3 * (2 * 2 * 6 + 4 * 10) + 4,
    NSA: wide * (blocks + 4 + length + 6) * 2 * (6 + 10) + 4,
    ConvConfig(taps=3): wide * 2 * 16 + 4,
    AttentionConfig(N=2, K=1, H=8, rope=None): wide * 2 * length * 8,
  }
  for mixer, of_row in numbers.items():
    init_cache = MIXERS[type(mixer)].init_cache
    cache = jax.eval_shape(lambda m=mixer, f=init_cache: f(m, HYBRID, rows, length, dtype, (0,)))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert stored == rows * of_row, mixer


@pytest.mark.parametrize("mixer", [KDA, NSA, ConvConfig()], ids=["kda", "nsa", "conv"])
def test_what_goes_through_whole_rows_says_so_when_traced(mixer):
  lm = Transformer(model(mixer))
  ids_BT = jax.ShapeDtypeStruct((8, 16), np.int32)
  params = jax.eval_shape(lm.init, jax.random.key(0))
  apply = functools.partial(jax.eval_shape, lm.apply, params, ids_BT)
  with pytest.raises(UnsupportedError, match=r"promise in_order=True"):
    apply(positions=jax.ShapeDtypeStruct((1, 16), np.int32))
  for mesh in (MeshConfig(data=1, context_ring=2), MeshConfig(data=1, context_ulysses=2)):
    with jax.set_mesh(make_mesh(mesh)):
      params = jax.eval_shape(lm.init, jax.random.key(0))
      with pytest.raises(UnsupportedError, match=r"on one device; .*=2 must be 1"):
        jax.eval_shape(lm.apply, params, ids_BT)


@pytest.mark.slow
def test_scan_equals_the_python_loop():
  config = model(KDA, layers=2)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(scan, params):
    lm = Transformer(config, ComputeConfig(scan=scan, remat="full" if scan == "always" else "none"))
    return jax.value_and_grad(lambda params: jnp.sum(jnp.cos(lm.apply(params, IDS_BT))))(params)

  looped, scanned = (jax.device_get(gradients(s, init(config))) for s in ("never", "always"))
  scales = jax.tree.map(lambda g: max(1, np.abs(g).max()), looped)
  looped, scanned = (jax.tree.map(np.divide, x, scales) for x in (looped, scanned))
  chex.assert_trees_all_close(looped, scanned, atol=1e-4, rtol=0)
