"""Draws operations on many stacks (Kimi Team 2025, arXiv 2510.26692, section 5.1)."""

# B rows, T positions

from __future__ import annotations

import numpy as np

from jaxlm.data.packing import Batch
from jaxlm.data.synthetic.rows import predict
from pallas_kernels.common.checks import check

FILLER, PUSH, POP, FIRST_STACK = 0, 1, 2, 3


def stack(rng: np.random.Generator, rows: int, *, V: int, T: int, stacks: int = 64) -> Batch:
  """Returns rows of operations: push, a stack and an element, or pop, a stack and its top.

  Each operation takes a random stack and pops with probability one half where that is not empty.
  The loss is on the elements that pops return. Ids: 1 is push, 2 pop, then the stacks, then the
  elements; 0 fills up what is left of T + 1 tokens.
  """
  first_element = FIRST_STACK + stacks
  check(stacks >= 1, "stacks", stacks, "must be at least 1")
  check(V > first_element, "V", V, f"must be above {first_element}, so that there are elements")
  check(T >= 5, "T", T, "must be at least 5: a push and a pop")
  tokens_BS = np.full((rows, T + 1), FILLER)
  is_answer_BS = np.zeros((rows, T + 1), bool)
  for row, is_answer in zip(tokens_BS, is_answer_BS):
    contents: list[list[int]] = [[] for _ in range(stacks)]
    for at in range(0, T - 1, 3):
      which = int(rng.integers(stacks))
      pops = bool(contents[which]) and rng.random() < 0.5
      if not pops:
        contents[which].append(int(rng.integers(first_element, V)))
      element = contents[which].pop() if pops else contents[which][-1]
      row[at : at + 3] = (POP if pops else PUSH, FIRST_STACK + which, element)
      is_answer[at + 2] = pops
  return predict(tokens_BS, is_answer_BS)
