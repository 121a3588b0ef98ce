"""Synthetic tasks against slow readers, which find every answer from the tokens before it."""

import numpy as np
import pytest

from jaxlm.data.synthetic import long_context, mqar, palindrome, stack
from pallas_kernels.common.errors import UserError

ROWS = 64


def rng(seed=0):
  return np.random.default_rng(seed)


def answers(batch):
  """Yields (tokens up to and with the question, answer) for every position that counts."""
  for row, (inputs_T, targets_T) in enumerate(zip(batch.inputs_BT, batch.targets_BT)):
    for t in np.flatnonzero(batch.weights_BT[row]):
      yield inputs_T[: t + 1].tolist(), int(targets_T[t])


def test_a_query_of_mqar_asks_for_the_value_that_stood_after_its_key():
  batch = mqar.mqar(rng(), ROWS, V=64, T=32, pairs=4)
  for seen, answer in answers(batch):
    assert len(seen) > 8 and seen[seen.index(seen[-1]) + 1] == answer >= 32
  np.testing.assert_array_equal(batch.weights_BT.sum(1), 4)
  keys_BP, values_BP = batch.inputs_BT[:, 0:8:2], batch.inputs_BT[:, 1:8:2]
  assert 1 <= keys_BP.min() and keys_BP.max() < 32 <= values_BP.min() and values_BP.max() < 64
  for row in (*keys_BP, *values_BP):
    assert len(set(row.tolist())) == 4


def test_filler_is_zero_or_random():
  plain = mqar.mqar(rng(), ROWS, V=64, T=32, pairs=4)
  outside = plain.inputs_BT[:, 8:][plain.weights_BT[:, 8:] == 0]
  assert (outside == 0).all()
  filled = mqar.mqar(rng(), ROWS, V=64, T=32, pairs=4, random_filler=True)
  outside = filled.inputs_BT[:, 8:][filled.weights_BT[:, 8:] == 0]
  assert len(set(outside.tolist())) == 64


def test_places_soon_after_the_pairs_are_likelier_queries():
  """One query per row: place j has weight (j + 1)^-0.99."""
  batch = mqar.mqar(rng(), 20_000, V=64, T=18, pairs=1)
  counts = batch.weights_BT[:, 2::2].mean(axis=0)
  weights = np.arange(1.0, 9.0) ** -0.99
  np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.015)


def test_a_palindrome_reads_the_same_backwards():
  batch = palindrome.palindrome(rng(), ROWS, V=10, T=12)
  for seen, answer in answers(batch):
    assert seen[6] == palindrome.SEPARATOR and answer == seen[12 - len(seen)]
  np.testing.assert_array_equal(batch.weights_BT.sum(1), 6)


def test_pops_return_the_top_of_their_stack():
  batch = stack.stack(rng(), ROWS, V=20, T=61, stacks=3)
  pops = 0
  for seen, answer in answers(batch):
    stacks = {}
    operations = np.array(seen[: len(seen) // 3 * 3]).reshape(-1, 3)
    for operation, which, element in operations.tolist():
      if operation == stack.PUSH:
        stacks.setdefault(which, []).append(element)
      else:
        assert stacks[which].pop() == element
    assert seen[-2] == stack.POP and stacks[seen[-1]][-1] == answer
    pops += 1
  assert pops > 4 * ROWS
  # 20 operations fill 60 of the 62 tokens
  assert batch.inputs_BT[:, :60].all()
  assert not batch.inputs_BT[:, 60:].any() and not batch.targets_BT[:, 60:].any()


@pytest.mark.parametrize("questions", [1, 2])
def test_a_needle_is_found_by_its_name(questions):
  batch = long_context.needle(rng(), ROWS, V=64, T=40, needles=3, questions=questions)
  assert (batch.weights_BT.sum(axis=1) == questions).all()
  starts, asked = set(), []
  for seen, answer in answers(batch):
    facts = {tuple(seen[i : i + 2]): i for i in range(36) if seen[i] == long_context.STATE}
    assert len(facts) == 3 and seen[-2] == long_context.ASK
    at = facts[(long_context.STATE, seen[-1])]
    assert seen[at + 2] == answer
    starts.add(at)
    asked.append(seen[-1])
  rows = np.reshape(asked, (ROWS, questions))
  assert all(len(set(names)) == questions for names in rows)
  assert len(starts) > 20  # needles stand anywhere


def test_variables_lead_to_their_value_over_every_hop():
  batch = long_context.variable_tracking(rng(), ROWS, V=64, T=48, hops=2)
  for seen, answer in answers(batch):
    value = {
      seen[i + 1]: seen[i + 2] for i in range(len(seen) - 2) if seen[i] == long_context.STATE
    }
    assert len(value) == 6
    hops, name = 0, seen[-1]
    while name in value:
      name, hops = value[name], hops + 1
    assert name == answer and hops == 3


def test_the_most_common_name_is_the_answer_by_its_ratio():
  batch = long_context.aggregation(rng(), ROWS, V=64, T=101, names=8, ratio=3.0)
  for seen, answer in answers(batch):
    counts = np.bincount(seen[:-1], minlength=64)[2:10]
    first, second = np.sort(counts)[::-1][:2]
    assert 2 + int(np.argmax(counts)) == answer and first >= 3 * second > 0


DRAWS = {
  "mqar": lambda seed: mqar.mqar(rng(seed), 4, V=64, T=32, pairs=4),
  "palindrome": lambda seed: palindrome.palindrome(rng(seed), 4, V=10, T=12),
  "stack": lambda seed: stack.stack(rng(seed), 4, V=20, T=32, stacks=3),
  "needle": lambda seed: long_context.needle(rng(seed), 4, V=64, T=40),
  "tracking": lambda seed: long_context.variable_tracking(rng(seed), 4, V=64, T=48),
  "aggregation": lambda seed: long_context.aggregation(rng(seed), 4, V=64, T=100),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_generator_alone_decides_what_is_drawn(name):
  first, again, other = (DRAWS[name](seed) for seed in (1, 1, 2))
  for a, b in zip(first[:3], again[:3]):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == (np.float32 if a is first.weights_BT else np.int32)
  assert (first.inputs_BT != other.inputs_BT).any()


@pytest.mark.parametrize(
  "draw, field",
  [
    (lambda: mqar.mqar(rng(), 1, V=63, T=32, pairs=4), "V=63"),
    (lambda: mqar.mqar(rng(), 1, V=64, T=31, pairs=4), "T=31"),
    (lambda: mqar.mqar(rng(), 1, V=64, T=32, pairs=9), "pairs=9"),
    (lambda: palindrome.palindrome(rng(), 1, V=10, T=11), "T=11"),
    (lambda: stack.stack(rng(), 1, V=6, T=30, stacks=3), "V=6"),
    (lambda: long_context.needle(rng(), 1, V=64, T=5), "T=5"),
    (lambda: long_context.needle(rng(), 1, V=10, T=50), "V=10"),
    (lambda: long_context.needle(rng(), 1, V=64, T=50, needles=2, questions=3), "questions=3"),
    (lambda: long_context.variable_tracking(rng(), 1, V=64, T=50, hops=0), "hops=0"),
    (lambda: long_context.aggregation(rng(), 1, V=64, T=20), "T=20"),
  ],
)
def test_what_cannot_be_drawn_is_refused_by_name(draw, field):
  with pytest.raises(UserError, match=field):
    draw()
