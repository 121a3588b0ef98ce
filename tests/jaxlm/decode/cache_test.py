"""Cached decoding equals the full forward pass."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from jaxlm.config import ComputeConfig, QuantRule, QuantSpec, RopeConfig, decoder, revise
from jaxlm.config.formats import UniformFormat
from jaxlm.decode import generation
from jaxlm.models import Transformer
from pallas_kernels.common.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

T, B = 13, 2
PLAIN = decoder(V=32, D=16, F=24, N=4, K=2, H=4, layers=4, windows=(4, None))
ONE_LAYER = {
  window: decoder(V=32, D=16, F=24, N=4, K=2, H=4, layers=1, windows=(window,))
  for window in (4, None)
}
# the layers of PLAIN and one more: one stack before the pattern, one after it
FULL, WINDOW = PLAIN.pattern[1], PLAIN.pattern[0]
UNEVEN = dataclasses.replace(PLAIN, layers=5, prefix=(FULL, FULL), remainder=(WINDOW,))


def rope(config, scaling, **options):
  return revise(config, rope=RopeConfig(scaling=scaling, factor=4.0, **options))


INT4 = UniformFormat(bits=4, grid="affine")
CACHED_INT4 = (
  QuantRule(match="cache.*keys", spec=QuantSpec(activation=INT4, hadamard=4)),
  QuantRule(match="cache[.](0|3).values", spec=QuantSpec(activation=INT4)),
)
CONFIGS = {
  "window and full layers": PLAIN,
  "prefix and remainder": UNEVEN,
  "yarn, int4 cache": dataclasses.replace(
    rope(PLAIN, "yarn", original_length=8), quant=CACHED_INT4
  ),
  "dynamic, within its length": rope(PLAIN, "dynamic", original_length=T),
  "dynamic, one layer, beyond": rope(ONE_LAYER[None], "dynamic", original_length=4),
  "dynamic, one window layer, beyond": rope(ONE_LAYER[4], "dynamic", original_length=4),
}
IDS_BT = np.random.default_rng(0).integers(0, 32, (B, T)).astype(np.int32)


def model_of(config, dtype="float32"):
  """Returns the model; PLAIN by scan, others by a Python loop."""
  return Transformer(
    config, ComputeConfig(dtype=dtype, scan="always" if config == PLAIN else "never")
  )


@functools.cache
def init(config):
  return Transformer(config).init(jax.random.key(1))


@functools.partial(jax.jit, static_argnums=0)
def full(config, params, ids_BT):
  return model_of(config).apply(params, ids_BT)


@functools.partial(jax.jit, static_argnums=0)
def cached(config, params, ids_BT, positions, cache):
  return model_of(config).apply(params, ids_BT, positions=positions, cache=cache)


@functools.partial(jax.jit, static_argnums=0)
def prefill(config, params, ids_BT, lengths_B):
  cache = model_of(config).init_cache(len(ids_BT), T)
  return generation.prefill(model_of(config), params, ids_BT, lengths_B, cache)


def run_in_pieces(config, pieces, room=T + 2):
  """Logits of each piece of IDS_BT, all written into one cache."""
  cache = jax.device_get(model_of(config).init_cache(B, room))
  start, outs = 0, []
  for size in pieces:
    positions = np.broadcast_to(np.arange(start, start + size), (B, size))
    logits_BTV, cache = cached(
      config, init(config), IDS_BT[:, start : start + size], positions, cache
    )
    outs.append(np.asarray(logits_BTV))
    start += size
  return outs


def full_logits(config, lengths):
  """Logits [B, V] at the last of `length` positions; under dynamic scaling by a pass for each."""
  if config.pattern[0].mixer.rope.scaling != "dynamic":
    logits_BTV = full(config, init(config), IDS_BT)
    return [np.asarray(logits_BTV[:, length - 1]) for length in lengths]
  return [np.asarray(full(config, init(config), IDS_BT[:, :length])[:, -1]) for length in lengths]


@pytest.mark.parametrize(
  "name",
  [
    "window and full layers",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("prefix and remainder", "yarn, int4 cache")
    ),
  ],
)
def test_prefill_and_single_steps_equal_the_full_pass_for_every_split(name):
  """Row i prefills i + 1 of the T positions and decodes the others; ended rows are padding."""
  config = CONFIGS[name]
  ids_BT = np.repeat(IDS_BT[:1], T, axis=0)
  want_TV = np.asarray(full(config, init(config), IDS_BT)[0])
  lengths_B = np.arange(1, T + 1)
  logits_BV, cache = prefill(config, init(config), ids_BT, lengths_B)
  for _ in range(T):
    chex.assert_trees_all_close(np.asarray(logits_BV), want_TV[lengths_B - 1], atol=1e-4)
    position_B = np.where(lengths_B < T, lengths_B, -1)
    next_B1 = ids_BT[np.arange(T), position_B][:, None]
    logits_B1V, cache = cached(config, init(config), next_B1, position_B[:, None], cache)
    logits_BV = np.where((position_B >= 0)[:, None], logits_B1V[:, 0], logits_BV)
    lengths_B = np.minimum(lengths_B + 1, T)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("dynamic, within its length", marks=pytest.mark.slow),
    "dynamic, one layer, beyond",
    pytest.param("dynamic, one window layer, beyond", marks=pytest.mark.slow),
  ],
)
def test_dynamic_scaling_follows_the_length(name):
  """Each step equals a full pass of just its length: keys are rotated when they are read."""
  config = CONFIGS[name]
  lengths = (4, 5, T)
  outs = run_in_pieces(config, [3] + [1] * (T - 3))
  for length, want in zip(lengths, full_logits(config, lengths)):
    np.testing.assert_allclose(outs[length - 3][:, -1], want, atol=1e-4, err_msg=f"length {length}")


def test_dynamic_scaling_is_at_work_beyond_its_length():
  config = CONFIGS["dynamic, one layer, beyond"]
  plain = revise(config, rope=RopeConfig())
  dynamic, unscaled = (full(c, init(config), IDS_BT) for c in (config, plain))
  assert np.abs(np.asarray(dynamic - unscaled)).max() > 1e-3


def test_prefill_in_pieces_equals_prefill_at_once():
  got = np.concatenate(run_in_pieces(PLAIN, [4, 3, 5, 1]), axis=1)
  np.testing.assert_allclose(got, run_in_pieces(PLAIN, [T])[0], atol=1e-4)


def test_what_stands_in_unwritten_slots_is_never_read():
  clean = run_in_pieces(PLAIN, [5, 1])
  dirty = jax.tree.map(
    lambda x: np.full_like(x, 50.0), jax.device_get(model_of(PLAIN).init_cache(B, T + 2))
  )
  positions = np.broadcast_to(np.arange(5), (B, 5))
  logits_BTV, cache = cached(PLAIN, init(PLAIN), IDS_BT[:, :5], positions, dirty)
  np.testing.assert_allclose(logits_BTV, clean[0], atol=1e-6)
  logits_BTV, _ = cached(PLAIN, init(PLAIN), IDS_BT[:, 5:6], np.full((B, 1), 5), cache)
  np.testing.assert_allclose(logits_BTV, clean[1], atol=1e-6)


def test_rows_may_be_at_different_positions():
  """Row 0 at position 7, row 1 at position 3: each equals its own sequence."""
  cache = jax.device_get(model_of(PLAIN).init_cache(B, T + 2))
  positions = np.broadcast_to(np.arange(12), (B, 12))
  _, cache = cached(PLAIN, init(PLAIN), IDS_BT[:, :12], positions, cache)
  at = np.array([7, 3])
  ids_B1 = np.take_along_axis(IDS_BT, at[:, None], axis=1)
  logits_B1V, _ = cached(PLAIN, init(PLAIN), ids_B1, at[:, None], cache)
  want_BTV = np.asarray(full(PLAIN, init(PLAIN), IDS_BT))
  np.testing.assert_allclose(logits_B1V[:, 0], want_BTV[np.arange(B), at], atol=1e-4)


def test_cache_holds_as_many_bytes_as_its_formula():
  for dtype, width in (("float32", 4), ("bfloat16", 2)):
    cache = model_of(PLAIN, dtype).init_cache(batch=3, length=20)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert stored == 2 * PLAIN.layers * 3 * 20 * 2 * 4 * width


def test_padding_is_written_nowhere():
  model = model_of(PLAIN)
  cache = jax.tree.map(lambda x: np.full_like(x, 7.0), jax.device_get(model.init_cache(B, T)))
  positions = np.array([[2, -1, 4], [-1, -1, -1]])
  _, cache = cached(PLAIN, init(PLAIN), IDS_BT[:, :3], positions, cache)
  for leaf in jax.tree.leaves(cache):
    is_written_BS = (np.asarray(leaf) != 7.0).any(axis=(0, 3, 4))
    np.testing.assert_array_equal(is_written_BS, [[s in (2, 4) for s in range(T)], [False] * T])


def test_positions_beyond_the_cache_are_not_silently_dropped():
  cache = model_of(PLAIN).init_cache(B, T)
  positions = np.array([[T - 1], [T]])
  logits_B1V, _ = cached(PLAIN, init(PLAIN), IDS_BT[:, :1], positions, cache)
  np.testing.assert_array_equal(np.isnan(logits_B1V).all(axis=(1, 2)), [False, True])
  assert np.isfinite(logits_B1V[0]).all()


def test_packed_rows_have_no_cache():
  model = model_of(PLAIN)
  with pytest.raises(UnsupportedError, match="segment_ids: rows of several segments"):
    model.apply(init(PLAIN), IDS_BT, segment_ids=IDS_BT, cache=model.init_cache(B, T))
