"""Which tokens a rank of a ring holds, and how much of causal attention that makes its work."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.mask import Options
from sharding import MeshConfig, make_mesh
from sharding.context.order import ORDERS, permutation, permute, tokens_of_rank
from sharding.context.parts import Plan, visible_parts

WORKED = {
  "contiguous": [0, 1, 2, 3, 4, 5, 6, 7],
  "zigzag": [0, 1, 6, 7, 2, 3, 4, 5],  # 4 chunks of 2: rank 0 has 0 and 3, rank 1 has 1 and 2
  "stripe": [0, 2, 4, 6, 1, 3, 5, 7],
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_eight_tokens_on_two_ranks(order):
  np.testing.assert_array_equal(permutation(order, 8, 2), WORKED[order])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_a_rank_holds_its_part_of_the_permutation(order, ring):
  columns_T = permutation(order, 24, ring)
  ranks = [tokens_of_rank(order, 24 // ring, ring, rank) for rank in range(ring)]
  np.testing.assert_array_equal(np.concatenate(ranks), columns_T)
  np.testing.assert_array_equal(np.sort(columns_T), np.arange(24))
  if ring == 1:
    np.testing.assert_array_equal(columns_T, np.arange(24))


def test_work_of_the_ranks():
  """Visible pairs of a query and a key, which zigzag gives in equal numbers to all ranks."""

  def pairs(order):
    tokens = permutation(order, 64, 4).reshape(4, -1)
    return (tokens + 1).sum(axis=1)  # a query at place p sees p + 1 keys

  assert len(set(pairs("zigzag"))) == 1
  contiguous = pairs("contiguous")
  assert contiguous[-1] > 6 * contiguous[0]
  assert np.ptp(pairs("stripe")) / pairs("stripe").mean() < 0.1


@pytest.mark.parametrize(
  "order, pairs", [("zigzag", {32}), ("stripe", {64}), ("contiguous", {64, 0})]
)
def test_what_a_hop_multiplies(order, pairs):
  """Pairs of 8 queries and 8 keys: half of them for every rank of a zigzag, whatever the hop."""

  def size(index):
    return len(range(*index.indices(8)))

  options = Options(causal=True, window=None, cap=None, scale=1.0)
  parts = visible_parts(Plan(options, order, "context_ring"), 8, given=False)
  assert {0 if part is None else size(part.queries) * size(part.keys) for part in parts} == pairs


@pytest.mark.parametrize(
  "order, T, message",
  [
    ("zigzag", 12, r"T=12: must be a multiple of 8 for order 'zigzag' and a ring of 4"),
    ("stripe", 10, r"T=10: must be a multiple of 4 "),
    ("sideways", 8, r"order='sideways': must be one of"),
  ],
)
def test_lengths_that_do_not_divide_are_refused_with_both_numbers(order, T, message):
  with pytest.raises(ValueError, match=message):
    permutation(order, T, 4)


def test_rows_are_permuted_where_they_lie():
  x_BT = np.arange(32).reshape(4, 8)
  with jax.set_mesh(make_mesh(MeshConfig(data=2))):
    spread = jax.reshard(x_BT, P("data", None))
    permuted = jax.jit(lambda x_BT: permute(x_BT, "zigzag", 2))(spread)
    assert permuted.sharding.spec == P("data", None)
  np.testing.assert_array_equal(permuted, x_BT[:, WORKED["zigzag"]])
