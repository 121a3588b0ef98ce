import chex
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.packing import join, pack, windows

EOS = 0
documents = st.lists(st.integers(0, 25), min_size=1, max_size=12)


def stream(sizes):
  """Returns documents of these sizes; a token is its place in the stream (eos is 0)."""
  total = 1 + sum(size + 1 for size in sizes)
  _, borders_D = join([np.zeros(size, np.uint16) for size in sizes], EOS, np.uint16)
  tokens_S = np.arange(total, dtype=np.uint16)
  return tokens_S, borders_D


def test_join_puts_eos_before_and_after_each_document():
  tokens_S, borders_D = join(
    [np.array([5, 6], np.uint8), np.array([], np.uint8), np.array([7], np.uint8)], 9, np.uint8
  )
  assert tokens_S.tolist() == [9, 5, 6, 9, 9, 7, 9]
  chex.assert_type(tokens_S, np.uint8)
  assert borders_D.tolist() == [0, 3, 4, 6]


@given(sizes=documents, length=st.integers(1, 9))
def test_kept_windows_predict_each_token_once(sizes, length):
  tokens_S, _ = stream(sizes)
  rows = windows(tokens_S, length, keep_last=True)
  batch = rows.build(np.arange(len(rows) + 2))  # two rows past the end
  counted = batch.weights_BT == 1
  assert batch.targets_BT[counted].tolist() == tokens_S[1:].tolist()
  np.testing.assert_array_equal(batch.inputs_BT[counted], batch.targets_BT[counted] - 1)
  assert (batch.weights_BT[~counted] == 0).all() and batch.weights_BT[-2:].sum() == 0


@given(sizes=documents, length=st.integers(1, 9))
def test_dropped_windows_are_the_full_ones(sizes, length):
  tokens_S, _ = stream(sizes)
  rows, kept = windows(tokens_S, length), windows(tokens_S, length, keep_last=True)
  batch = rows.build(np.arange(len(rows) + 1))  # one row past the end
  assert (batch.weights_BT[:-1] == 1).all() and not batch.weights_BT[-1].any()
  assert len(rows) == (len(tokens_S) - 1) // length
  np.testing.assert_array_equal(batch.targets_BT[:-1], kept.build(np.arange(len(rows))).targets_BT)


@given(sizes=documents, length=st.integers(1, 9))
def test_packed_rows(sizes, length):
  tokens_S, borders_D = stream(sizes)
  rows = pack(tokens_S, borders_D, length)
  batch = rows.build(np.arange(len(rows) + 1))  # one row past the end
  inputs_BT, targets_BT, weights_BT, positions_BT, segment_ids_BT = batch
  chex.assert_shape(list(batch), (len(rows) + 1, length))
  chex.assert_type(list(batch), [np.int32, np.int32, np.float32, np.int32, np.int32])
  used = segment_ids_BT > 0

  # Every token but the first eos is predicted exactly once, from the token before it.
  assert sorted(targets_BT[used].tolist()) == tokens_S[1:].tolist()
  np.testing.assert_array_equal(inputs_BT[used], targets_BT[used] - 1)
  np.testing.assert_array_equal(weights_BT, used.astype(np.float32))
  assert not (
    inputs_BT[~used].any()
    or targets_BT[~used].any()
    or positions_BT[~used].any()
    or weights_BT[-1].any()
  )

  document_S = np.searchsorted(
    borders_D, tokens_S, side="right"
  )  # an eos belongs to what follows it
  for row in range(len(rows)):
    ids = segment_ids_BT[row][used[row]]
    assert (
      used[row, : len(ids)].all() and len(ids) > 0
    )  # padding only at the end, no row of padding
    assert set(ids) == set(range(1, ids[-1] + 1)) and (np.diff(ids) >= 0).all()
    for segment in range(1, ids[-1] + 1):
      here = segment_ids_BT[row] == segment
      inputs = inputs_BT[row, here]
      assert positions_BT[row, here].tolist() == list(range(len(inputs)))
      assert inputs.tolist() == list(range(inputs[0], inputs[0] + len(inputs)))
      assert len(set(document_S[inputs])) == 1  # never across a border
      # A segment begins at its document's eos, or where a document longer than a row was split.
      assert (inputs[0] - borders_D[document_S[inputs[0]] - 1]) % length == 0


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=40), length=st.integers(8, 16))
def test_no_two_packed_rows_would_fit_in_one(sizes, length):
  rows = pack(*stream(sizes), length)
  filled = sorted(rows.build(np.arange(len(rows))).weights_BT.sum(axis=1))
  assert len(rows) == 1 or filled[0] + filled[1] > length


def test_packing_finds_the_exact_fit():
  tokens_S, borders_D = stream([5, 1, 3, 2, 0, 7])  # 6 + 2, 4 + 3 + 1, 8
  rows = pack(tokens_S, borders_D, 8)
  assert len(rows) == 3 and (rows.build(np.arange(3)).weights_BT == 1).all()


@pytest.mark.parametrize("length", [64, 1024])
def test_many_documents_fill_their_rows(length):
  sizes = np.random.default_rng(0).integers(0, 2 * length, 100_000)
  borders_D = np.concatenate([[0], np.cumsum(sizes + 1)])
  rows = pack(np.zeros(borders_D[-1] + 1, np.uint8), borders_D, length)
  assert borders_D[-1] / (len(rows) * length) > 0.99
