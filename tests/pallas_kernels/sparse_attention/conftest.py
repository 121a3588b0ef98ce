"""Random calls of `nsa_selected_attention`, and its output and gradients."""

# B batch, T query positions, S key positions, N query heads, K key heads,
# H width of queries and keys, U width of values, I selected blocks of a query
from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.sparse_attention import nsa_selected_attention


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of `nsa_selected_attention` on random arrays."""

  T: int
  N: int = 4
  K: int = 2
  H: int = 8
  U: int = 5
  I: int = 3
  B: int = 2
  block: int = 16
  packed: bool = False  # segments, of rows that are cut at different places

  def arrays(self, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    """Returns q, k, v and the cotangents of output and logsumexp."""
    rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
    B, T, N, K = self.B, self.T, self.N, self.K
    widths = ((N, self.H), (K, self.H), (K, self.U), (N, self.U))
    q, k, v, do = (rng.normal(size=(B, T, *width)).astype(dtype) for width in widths)
    wide = np.promote_types(dtype, np.float32) if dtype in (np.float32, np.float64) else np.float32
    return q, k, v, do, rng.normal(size=(B, T, N)).astype(wide)

  def segment_ids(self) -> np.ndarray | None:
    rng = np.random.default_rng(self.T)
    ids = np.sort(rng.integers(1, 4, (self.B, self.T)), axis=1)
    return ids.astype(np.int32) if self.packed else None

  def lists(self) -> np.ndarray:
    """Returns random lists: blocks before and after the query, twice the same, none, beyond."""
    rng = np.random.default_rng(self.I)
    blocks = -(-self.T // self.block)
    return rng.integers(-1, blocks + 1, (self.B, self.T, self.K, self.I)).astype(np.int32)

  def bad(self, queries: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Returns arrays and lists of the last queries, whose own block is in their lists.

    Not finite are a key, a value, two queries and the gradient of an output.
    """
    q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN = self.arrays()
    k_BSKH[0, 20, 0, 1], v_BSKU[1, 50, 1, 2] = np.nan, np.nan
    q_BTNH[1, -5, 0, 3], q_BTNH[0, -3, 3, 0], do_BTNU[0, -2, 2, 0] = np.nan, np.inf, np.nan
    lists_BTKI, last = self.lists(), slice(-queries, None)
    lists_BTKI[..., 0] = (np.arange(self.T) // self.block)[:, None]
    arrays = (q_BTNH[:, last], k_BSKH, v_BSKU, do_BTNU[:, last], dlse_BTN[:, last])
    return arrays, lists_BTKI[:, last]


@functools.partial(jax.jit, static_argnames=("options",))
def _run(arrays, indices_BTKI, segment_ids_BS, *, options):
  q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN = arrays
  (o_BTNU, lse_BTN), pull = jax.vjp(
    lambda q, k, v: nsa_selected_attention(
      q, k, v, indices_BTKI, segment_ids_BS=segment_ids_BS, **dict(options)
    ),
    q_BTNH,
    k_BSKH,
    v_BSKU,
  )
  dq_BTNH, dk_BSKH, dv_BSKU = pull((do_BTNU, dlse_BTN))
  return {"o": o_BTNU, "lse": lse_BTN, "dq": dq_BTNH, "dk": dk_BSKH, "dv": dv_BSKU}


def run(
  case: dict[str, Any], implementation: str, arrays: Any = None, lists: Any = None, **options: Any
) -> dict[str, jax.Array]:
  """Returns output, logsumexp and gradients of `Case(**case)` by one implementation."""
  call = Case(**case)
  arrays = call.arrays() if arrays is None else arrays
  lists = call.lists() if lists is None else lists
  options = {"implementation": implementation, "block": call.block, **options}
  return _run(arrays, lists, call.segment_ids(), options=tuple(sorted(options.items())))


def expected(case: dict[str, Any], arrays: Any = None, lists: Any = None) -> dict[str, jax.Array]:
  """Returns the reference in float64 of the same, already rounded, numbers."""
  arrays = Case(**case).arrays() if arrays is None else arrays
  with jax.enable_x64(True):
    return run(case, "reference", tuple(np.float64(array) for array in arrays), lists)


def assert_close(
  got: dict[str, Any], want: dict[str, Any], output: float, gradient: float | None = None
) -> None:
  """The norm of the difference is at most `output` (`gradient`) of the norm of what is wanted."""
  assert got.keys() == want.keys()
  for name in want:
    x, y = (np.asarray(array[name], np.float64) for array in (got, want))
    assert np.array_equal(np.isneginf(x), np.isneginf(y)), name
    difference = np.where(np.isneginf(y), 0, x - np.where(np.isneginf(y), 0, y))
    difference = np.where(np.isneginf(y), 0, difference)
    limit = (gradient or output) if name.startswith("d") else output
    norm = np.linalg.norm(np.where(np.isneginf(y), 0, y))
    assert np.linalg.norm(difference) <= limit * norm, (name, np.linalg.norm(difference) / norm)


def assert_nan_only_where_it_belongs(
  got: dict[str, Any], case: dict[str, Any], arrays: Any, lists: np.ndarray
) -> None:
  """Looks where NaN must be by the definition, for bad numbers in queries, keys, values and do."""
  q, k, v, do, _ = (np.isfinite(np.float64(array)).all(axis=-1) for array in arrays)
  (B, T, N), (_, S, K), block = q.shape, k.shape, Case(**case).block
  t_T, s_S = np.arange(S - T, S), np.arange(S)
  ids_BS = Case(**case).segment_ids()
  first_BS = np.zeros((B, S), int) if ids_BS is None else np.array([*map(firsts_of, ids_BS)])
  first_BT1 = first_BS[:, t_T, None]
  visible_BTS = (s_S[None, None] <= t_T[None, :, None]) & (s_S[None, None] >= first_BT1)
  chosen_BTKS = np.any(
    lists[..., None, :] == ((s_S[None, None] - first_BT1) // block)[:, :, None, :, None], axis=-1
  )
  seen_BTNS = np.repeat(visible_BTS[:, :, None] & chosen_BTKS, N // K, axis=2)
  key, value = (
    np.any(seen_BTNS & ~np.repeat(x, N // K, axis=2).swapaxes(1, 2)[:, None], axis=3)
    for x in (k, v)
  )
  row, cotangent = (~x & np.any(seen_BTNS, axis=3) for x in (q, do))
  wanted = {"o": key | value | row, "lse": key | row, "dq": key | value | row | cotangent}
  for name, source_BTN in (("dk", wanted["dq"]), ("dv", key | row | cotangent)):
    reached_BSN = np.einsum("btn,btns->bsn", source_BTN, seen_BTNS)
    wanted[name] = reached_BSN.reshape(B, S, K, -1).any(axis=-1)
  for name, nan in wanted.items():
    there = np.isnan(np.float64(got[name]))
    there = there if name == "lse" else there.any(axis=-1)
    np.testing.assert_array_equal(there, nan, err_msg=name)
    assert nan.any() and not nan.all(), name


def firsts_of(ids_S: np.ndarray) -> np.ndarray:
  """Returns the first token of each token's segment."""
  return np.searchsorted(ids_S, ids_S)


@pytest.fixture(name="assert_nan_only_where_it_belongs", scope="session")
def assert_nan_only_where_it_belongs_fixture():
  return assert_nan_only_where_it_belongs


@pytest.fixture(name="case", scope="session")
def case_fixture():
  return Case


@pytest.fixture(name="run", scope="session")
def run_fixture():
  return run


@pytest.fixture(name="expected", scope="session")
def expected_fixture():
  return expected


@pytest.fixture(name="assert_close", scope="session")
def assert_close_fixture():
  return assert_close
