"""Draws needles, variable tracking and aggregation in noise (Hsieh et al. 2024, arXiv 2404.06654).

The tasks of RULER in token form: a row of T + 1 tokens is noise with facts in it, and ends in a
question whose answer is the last token. Ids: 0 asks, 1 states, then names, then noise.
"""

# B rows, T positions, S = T + 1 tokens

from __future__ import annotations

import numpy as np

from jaxlm.data.packing import Batch
from jaxlm.data.synthetic.rows import draw_distinct, predict
from pallas_kernels.common.checks import check

ASK, STATE, FIRST_NAME = 0, 1, 2
_FACT = 3


def needle(
  rng: np.random.Generator,
  rows: int,
  *,
  V: int,
  T: int,
  names: int = 16,
  needles: int = 1,
  questions: int = 1,
) -> Batch:
  """Returns rows that hold `needles` facts (state, name, value) and end in (ask, name, value).

  The facts stand at random places of the noise, with different names; each of the `questions` is
  for another one of them. Names are ids 2 .. names + 1; values and noise are the ids after them.
  """
  check(1 <= questions <= needles, "questions", questions, f"must be between 1 and {needles=}")
  _check(V, T, names, needles, _FACT * questions)
  named = FIRST_NAME + draw_distinct(rng, rows, needles, names)
  values = rng.integers(FIRST_NAME + names, V, (rows, needles))
  facts = np.stack((np.full_like(named, STATE), named, values), axis=-1)
  asked = np.stack((np.full_like(named, ASK), named, values), axis=-1)[:, :questions]
  return _hide(rng, facts, asked, V, T, names)


def variable_tracking(
  rng: np.random.Generator, rows: int, *, V: int, T: int, names: int = 16, hops: int = 2
) -> Batch:
  """Returns rows that state name 0 = value, name 1 = name 0, ..., and ask for the last one's value.

  The `hops` + 1 facts (state, name, value or name before) stand in this order at random places of
  the noise. A second chain with other names and another value stands between them. Ids as in
  `needle`.
  """
  chain = hops + 1
  check(hops >= 1, "hops", hops, "must be at least 1")
  _check(V, T, names, 2 * chain, 3)
  named = FIRST_NAME + draw_distinct(rng, rows, 2 * chain, names).reshape(rows, 2, chain)
  values = FIRST_NAME + names + draw_distinct(rng, rows, 2, V - FIRST_NAME - names)
  sources = np.concatenate((values[:, :, None], named[:, :, :-1]), axis=2)
  facts = np.stack((np.full_like(named, STATE), named, sources), axis=-1)
  facts = facts.swapaxes(1, 2).reshape(rows, 2 * chain, _FACT)  # the two chains take turns
  asked = np.stack((np.full(rows, ASK), named[:, 0, -1], values[:, 0]), axis=-1)
  return _hide(rng, facts, asked[:, None], V, T, names)


def aggregation(
  rng: np.random.Generator, rows: int, *, V: int, T: int, names: int = 16, ratio: float = 2.0
) -> Batch:
  """Returns rows in which one name is the most common by at least `ratio`, and which ask for it.

  Half of the T - 1 tokens before the question are names, the rest noise, all in random order. The
  last two tokens are (ask, the most common name). Ids as in `needle`.
  """
  _check(V, T, names, 1, 2)
  check(names >= 2, "names", names, "must be at least 2")
  check(ratio > 1, "ratio", ratio, "must be above 1")
  body, named = T - 1, (T - 1) // 2
  others = max(int(named / (names - 1 + ratio)), 1)  # of each other name
  most = named - others * (names - 1)
  rule = f"has room for {named} names: {most} of the most common and {others} of each of the others"
  check(most >= ratio * others, "T", T, f"{rule}; names={names} and ratio={ratio} need more")
  order = FIRST_NAME + draw_distinct(rng, rows, names, names)
  counts = np.array([most] + [others] * (names - 1))
  tokens = rng.integers(FIRST_NAME + names, V, (rows, body))
  tokens[:, :named] = np.repeat(order, counts, axis=1)
  tokens = rng.permuted(tokens, axis=1)
  tail = np.stack((np.full(rows, ASK), order[:, 0]), axis=-1)
  tokens_BS = np.concatenate((tokens, tail), axis=1)
  return predict(tokens_BS, np.broadcast_to(np.arange(T + 1) == T, tokens_BS.shape))


def _check(V: int, T: int, names: int, facts: int, tail: int) -> None:
  check(V >= FIRST_NAME + names + 2, "V", V, f"must be at least names + 4={names + 4}")
  check(1 <= facts <= names, "names", names, f"must be at least {facts}: a name for each fact")
  least = facts * _FACT + tail
  check(T >= least, "T", T, f"must be at least {least}, to hold the facts and the question")


def _hide(
  rng: np.random.Generator, facts: np.ndarray, asked: np.ndarray, V: int, T: int, names: int
) -> Batch:
  """Returns rows of noise that hold the facts [rows, facts, 3] in order and end in what is asked.

  `asked` are questions with their answers, [rows, questions, 3].
  """
  rows, count, _ = facts.shape
  body = T + 1 - _FACT * asked.shape[1]
  tokens_BS = rng.integers(FIRST_NAME + names, V, (rows, T + 1))
  # gaps between facts: `count` different places among what is left when facts are single tokens
  places = np.sort(draw_distinct(rng, rows, count, body - count * (_FACT - 1)), axis=1)
  starts = places + (_FACT - 1) * np.arange(count)
  at = (starts[:, :, None] + np.arange(_FACT)).reshape(rows, -1)
  np.put_along_axis(tokens_BS, at, facts.reshape(rows, -1), axis=1)
  tokens_BS[:, body:] = asked.reshape(rows, -1)
  column_S = np.arange(T + 1)
  is_answer_S = (column_S >= body) & ((T - column_S) % _FACT == 0)
  return predict(tokens_BS, np.broadcast_to(is_answer_S, tokens_BS.shape))
