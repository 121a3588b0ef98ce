"""The batch of a bad step, written by several processes and read whole."""

import chex
import jax
import numpy as np
import pytest

from jaxlm.data.packing import Batch
from jaxlm.run.guard import load_batch, save_step


def save_by_processes(folder, monkeypatch, whole: Batch, rows_of: list[np.ndarray]) -> None:
  for process, rows in enumerate(rows_of):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    local = Batch(*[None if x is None else x[rows] for x in whole])
    save_step(folder, 7, {"loss": 1.0}, local, rows, len(whole.inputs_BT))


WHOLE = Batch(*(np.arange(24).reshape(8, 3) + 100 * field for field in range(3)))


@pytest.mark.parametrize(
  "rows_of",
  [
    [np.arange(8)],
    [np.array([0, 1, 6, 7]), np.array([2, 3, 4, 5])],
    [np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7])],
    [np.arange(4), np.arange(4), np.arange(4, 8), np.arange(4, 8)],
  ],
  ids=["one process", "a torus", "interleaved", "rows held twice"],
)
def test_the_whole_batch_comes_back(tmp_path, monkeypatch, rows_of):
  save_by_processes(tmp_path, monkeypatch, WHOLE, rows_of)
  chex.assert_trees_all_equal(Batch(**load_batch(tmp_path, 7)), WHOLE)
  assert load_batch(tmp_path, 8) is None


def test_missing_rows_are_named(tmp_path, monkeypatch):
  save_by_processes(tmp_path, monkeypatch, WHOLE, [np.array([0, 1, 6]), np.array([2, 3, 4, 5, 7])])
  (tmp_path / "00000007/rows_of_process_0.npz").unlink()
  with pytest.raises(ValueError, match=r"00000007: rows \[0, 1, 6\] of the batch of 8 are missing"):
    load_batch(tmp_path, 7)
