"""Sampling: filters by hand and by property, draws by frequency."""

import math

import chex
import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

from jaxlm.decode.sampling import Sampler, apply_min_p, apply_top_k, apply_top_p, sample
from pallas_kernels.common.errors import UserError

inf = math.inf
# A coarse grid makes ties common.
rows = hypothesis.extra.numpy.arrays(
  np.float32, (1, 7), elements=st.integers(-24, 24).map(lambda i: i / 4)
)
quick = hypothesis.settings(max_examples=60)


def kept(logits_BV):
  """Returns the ids that the only row has left."""
  return set(np.flatnonzero(np.asarray(logits_BV)[0] > -inf).tolist())


def of_probs(*probs):
  return jnp.log(jnp.array([probs], jnp.float32))


class ByHand(chex.TestCase):
  """Each filter on rows where the answer is plain, compiled and not."""

  @chex.variants(with_jit=True, without_jit=True)
  def test_top_k(self):
    top_k = self.variant(apply_top_k, static_argnums=1)
    logits_BV = jnp.array([[1.0, 4.0, 3.0, 2.0]])
    chex.assert_trees_all_equal(top_k(logits_BV, 2), jnp.array([[-inf, 4.0, 3.0, -inf]]))
    # a tie at the second place stays whole
    assert kept(top_k(jnp.array([[1.0, 3.0, 3.0, 3.0]]), 2)) == {1, 2, 3}
    chex.assert_trees_all_equal(top_k(logits_BV, 0), logits_BV)
    chex.assert_trees_all_equal(top_k(logits_BV, 9), logits_BV)

  @chex.variants(with_jit=True, without_jit=True)
  def test_top_p(self):
    top_p = self.variant(apply_top_p, static_argnums=1)
    logits_BV = of_probs(0.1, 0.5, 0.15, 0.25)
    for p, want in [
      (0.01, {1}),
      (0.49, {1}),
      (0.51, {1, 3}),
      (0.74, {1, 3}),
      (0.76, {1, 2, 3}),
      (0.91, {0, 1, 2, 3}),
    ]:
      assert kept(top_p(logits_BV, p)) == want, p
    # one of the tied two would do
    assert kept(top_p(of_probs(0.25, 0.25, 0.4, 0.1), 0.5)) == {0, 1, 2}
    tail_BV = jnp.linspace(0, -30, 1000)[None]  # its mass is lost when float32 sums to 1
    chex.assert_trees_all_equal(top_p(tail_BV, 1.0), tail_BV)

  @chex.variants(with_jit=True, without_jit=True)
  def test_min_p(self):
    min_p = self.variant(apply_min_p, static_argnums=1)
    logits_BV = of_probs(0.05, 0.5, 0.2, 0.25)
    for p, want in [
      (0.0, {0, 1, 2, 3}),
      (0.09, {0, 1, 2, 3}),
      (0.11, {1, 2, 3}),
      (0.45, {1, 3}),
      (0.51, {1}),
      (1.0, {1}),
    ]:
      assert kept(min_p(logits_BV, p)) == want, p
    assert kept(min_p(of_probs(0.4, 0.4, 0.2), 1.0)) == {0, 1}

  @chex.variants(with_jit=True, without_jit=True)
  def test_one_int32_token_per_row_of_any_float_logits(self):
    one_per_row = self.variant(sample, static_argnums=2)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      for sampler in (EVERY, Sampler(temperature=0.0)):
        ids_B = one_per_row(jnp.zeros((3, 5), dtype), jax.random.key(0), sampler)
        chex.assert_shape(ids_B, (3,))
        chex.assert_type(ids_B, jnp.int32)


EVERY = Sampler(temperature=0.5, top_k=3, top_p=0.95, min_p=0.01)


@pytest.mark.parametrize(
  "logits_BV, message",
  [
    (jnp.zeros(5), r"logits_BV.shape=\(5,\): must be"),
    (jnp.zeros((2, 3, 5)), r"logits_BV.shape=\(2, 3, 5\): must be"),
    (jnp.zeros((2, 5), jnp.int32), "logits_BV.dtype='int32': must be"),
  ],
)
@pytest.mark.parametrize(
  "filter_",
  [
    lambda x: sample(x, jax.random.key(0), Sampler()),
    lambda x: sample(x, jax.random.key(0), Sampler(temperature=0.0)),
    lambda x: apply_top_k(x, 2),
    lambda x: apply_top_p(x, 0.5),
    lambda x: apply_min_p(x, 0.5),
  ],
)
def test_logits_that_do_not_fit_are_named(filter_, logits_BV, message):
  with pytest.raises(UserError, match=message):
    filter_(logits_BV)


@quick
@hypothesis.given(rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(logits_BV, p):
  probs = scipy.special.softmax(logits_BV[0].astype(np.float64))
  left = kept(apply_top_p(jnp.asarray(logits_BV), p))
  least = min(probs[i] for i in left)
  assert left == {
    i for i in range(7) if probs[i] >= least * (1 - 1e-9)
  }  # an upper set, ties included
  assert sum(probs[i] for i in left) >= p - 1e-6
  assert sum(probs[i] for i in left if probs[i] > least * (1 + 1e-9)) < p + 1e-6


@quick
@hypothesis.given(rows, st.floats(0.01, 1))
def test_min_p_keeps_what_reaches_the_threshold(logits_BV, p):
  ratio = np.exp(logits_BV[0].astype(np.float64) - logits_BV.max())
  hypothesis.assume(not np.any(np.isclose(ratio, p, rtol=1e-5) & (ratio < 1)))
  assert kept(apply_min_p(jnp.asarray(logits_BV), p)) == set(np.flatnonzero(ratio >= p).tolist())


@quick
@hypothesis.given(
  rows, st.integers(0, 8), st.floats(0.01, 1), st.floats(0, 1), st.permutations(range(7))
)
def test_filters_follow_permutations_and_keep_the_largest(logits_BV, k, top_p, min_p, order):
  def chain(logits_BV):
    return apply_min_p(apply_top_p(apply_top_k(logits_BV, k), top_p), min_p)

  left_BV = chain(jnp.asarray(logits_BV))
  np.testing.assert_array_equal(
    chain(jnp.asarray(logits_BV[:, order])), np.asarray(left_BV)[:, order]
  )
  assert set(np.flatnonzero(logits_BV[0] == logits_BV.max())) <= kept(left_BV)
  removed = np.isneginf(left_BV)
  np.testing.assert_array_equal(np.where(removed, 0, left_BV), np.where(removed, 0, logits_BV))


@quick
@hypothesis.given(rows, st.floats(1.1, 3), st.floats(0.05, 0.95))
def test_temperature_before_min_p_softens_the_cut(logits_BV, temperature, p):
  gap = logits_BV.max() - logits_BV[0].astype(np.float64)
  hypothesis.assume(not np.any(np.isclose(gap, -temperature * math.log(p), rtol=1e-5)))
  assert kept(apply_min_p(jnp.asarray(logits_BV) / temperature, p)) == kept(
    apply_min_p(jnp.asarray(logits_BV), p**temperature)
  )


draw = jax.jit(sample, static_argnames="sampler")


@quick
@hypothesis.given(rows, st.integers(0, 2**31 - 1))
def test_greedy_is_argmax(logits_BV, seed):
  key = jax.random.key(seed)
  first = int(np.argmax(logits_BV))
  assert draw(logits_BV, key, sampler=Sampler(temperature=0.0)).tolist() == [first]
  assert logits_BV[0, draw(logits_BV, key, sampler=Sampler(top_k=1))[0]] == logits_BV.max()


def expected_law(logits, sampler):
  """Returns the probabilities after every filter, token by token in float64."""
  probs = scipy.special.softmax(np.asarray(logits, np.float64) / sampler.temperature)
  order = np.argsort(-probs)
  probs[order[sampler.top_k or len(probs) :]] = 0
  probs /= probs.sum()
  ahead = 0.0
  for i in order:
    mass, probs[i] = probs[i], probs[i] if ahead < sampler.top_p else 0
    ahead += mass
  probs[probs < sampler.min_p * probs.max()] = 0
  return probs / probs.sum()


@pytest.mark.parametrize(
  "sampler, survivors",
  [
    (Sampler(), 8),
    (Sampler(temperature=0.7), 8),
    (Sampler(temperature=2.0, top_k=5), 5),
    (Sampler(temperature=1.5, top_p=0.8), 4),
    (Sampler(temperature=1.5, min_p=0.3), 4),
    (Sampler(temperature=1.3, top_k=6, top_p=0.9, min_p=0.25), 4),
  ],
)
def test_frequencies_follow_the_law(sampler, survivors):
  logits = [0.3, 2.0, -1.0, 1.1, 0.0, -2.5, 1.6, -0.4]
  law = expected_law(logits, sampler)
  assert np.count_nonzero(law) == survivors
  ids_B = draw(
    jnp.broadcast_to(jnp.array(logits), (100_000, 8)), jax.random.key(7), sampler=sampler
  )
  counts = np.bincount(ids_B, minlength=8)
  assert counts[law == 0].sum() == 0
  want = law[law > 0] * 100_000
  statistic = np.sum((counts[law > 0] - want) ** 2 / want)
  assert scipy.special.chdtrc(len(want) - 1, statistic) > 1e-3


@pytest.mark.parametrize(
  "sampler", [Sampler(), EVERY, Sampler(temperature=0.0), Sampler(temperature=1e-6)]
)
@pytest.mark.parametrize(
  "row, want",
  [
    ([-inf, -inf, 0.0, -inf], {2}),
    ([0.0, inf, 5.0, -inf], {1}),
    ([1e4, -1e4, -inf, 0.0], {0}),
    ([-3e38, 3e38, -inf, -inf], {1}),
  ],
)
def test_extreme_logits_have_one_outcome(row, want, sampler):
  ids_B = draw(jnp.broadcast_to(jnp.array(row), (50, 4)), jax.random.key(0), sampler=sampler)
  assert set(ids_B.tolist()) == want


def test_several_infinite_logits_share_the_probability():
  ids_B = draw(
    jnp.broadcast_to(jnp.array([0.0, inf, -inf, inf]), (1000, 4)), jax.random.key(0), sampler=EVERY
  )
  counts = np.bincount(ids_B, minlength=4)
  assert counts[0] == counts[2] == 0 and min(counts[1], counts[3]) > 400


def test_a_large_offset_changes_no_draw():
  logits_BV = (
    jax.random.randint(jax.random.key(1), (200, 16), -8, 8) / 4
  )  # exact in float32 with the offset
  plain, raised = (
    draw(logits_BV + offset, jax.random.key(2), sampler=EVERY) for offset in (0.0, 1e4)
  )
  np.testing.assert_array_equal(plain, raised)


def test_bfloat16_logits_are_filtered_in_float32():
  logits_BV = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
  for out_BV in (
    apply_top_k(logits_BV, 2),
    apply_top_p(logits_BV, 0.5),
    apply_min_p(logits_BV, 0.9),
  ):
    chex.assert_type(out_BV, jnp.float32)
  assert draw(logits_BV, jax.random.key(0), sampler=EVERY).dtype == jnp.int32


@pytest.mark.parametrize(
  "field, value",
  [
    ("temperature", -1.0),
    ("temperature", inf),
    ("temperature", math.nan),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
  ],
)
def test_fields_out_of_range_are_named(field, value):
  with pytest.raises(ValueError, match=f"sampler.{field}={value}: must"):
    Sampler(**{field: value})
