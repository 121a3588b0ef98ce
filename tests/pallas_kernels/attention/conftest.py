"""Random calls of `attention`, and its output and gradients."""

# B batch, T query positions, S key positions, N query heads, K key heads,
# H width of queries and keys, U width of values
from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, blocks


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of `attention` on random arrays."""

  T: int
  S: int
  N: int = 2
  K: int = 2
  H: int = 8
  U: int = 8
  B: int = 2
  packed: bool = False  # segments, of two rows that are cut at different places
  shuffled: bool = False  # positions in any order
  size: float = 1.0  # factor of the queries
  causal: bool = True
  window: int | None = None
  cap: float | None = None
  scale: float | None = None

  def arrays(self, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    """Returns q, k, v and the cotangents of output and logsumexp."""
    rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
    B, T, S, N = self.B, self.T, self.S, self.N
    shapes = [(B, T, N, self.H), (B, S, self.K, self.H), (B, S, self.K, self.U)]
    q, k, v, do = (rng.normal(size=shape).astype(dtype) for shape in [*shapes, (B, T, N, self.U)])
    wide = np.promote_types(np.float32, dtype) if dtype != jnp.bfloat16 else np.float32
    return (self.size * q).astype(dtype), k, v, do, rng.normal(size=(B, T, N)).astype(wide)

  def options(self) -> dict[str, Any]:
    """Returns the keyword arguments that are known when traced."""
    return {name: getattr(self, name) for name in ("causal", "window", "cap", "scale")}

  def tokens(self) -> dict[str, np.ndarray]:
    """Returns the keyword arguments that are arrays: positions and segments."""
    rng = np.random.default_rng(self.T)
    sizes, tokens = {"q": self.T, "k": self.S}, {}
    for side, letter in (("q", "T"), ("k", "S")):
      if self.shuffled:
        order = rng.permutation(max(sizes.values()))[None, : sizes[side]]
        tokens[f"{side}_positions_B{letter}"] = order.astype(np.int32)
      if self.packed and (side == "q" or self.T != self.S):
        ids = np.sort(rng.integers(1, 4, (self.B, sizes[side])), axis=1)
        tokens[f"{side}_segment_ids_B{letter}"] = ids.astype(np.int32)
    return tokens


@functools.partial(jax.jit, static_argnames=("implementation", "options", "looped"))
def _run(arrays, tokens, *, implementation, options, looped):
  q_BTNH, k_BSKH, v_BSKU, do_BTNU, dlse_BTN = arrays
  attend = functools.partial(
    attention, implementation=implementation, return_lse=True, **tokens, **dict(options)
  )
  (o_BTNU, lse_BTN), pull = jax.vjp(attend, q_BTNH, k_BSKH, v_BSKU)
  dq_BTNH, dk_BSKH, dv_BSKU = pull((do_BTNU, dlse_BTN))
  return {"o": o_BTNU, "lse": lse_BTN, "dq": dq_BTNH, "dk": dk_BSKH, "dv": dv_BSKU}


def run(
  case: dict[str, Any], implementation: str, arrays: Any = None, *, looped: bool = False
) -> dict[str, jax.Array]:
  """Returns output, logsumexp and gradients of `Case(**case)` by one implementation.

  `looped`: "xla" computes its blocks again and in loops, as it does for long T on GPU.
  """
  call = Case(**case)
  arrays = call.arrays() if arrays is None else arrays
  names = {"implementation": implementation, "options": tuple(call.options().items())}
  lengths = dict(KEPT_LENGTH=0, LOOPED_LENGTH=16, BANDS=2) if looped else {}
  with mock.patch.multiple(blocks, **lengths) if looped else contextlib.nullcontext():
    return _run(arrays, call.tokens(), looped=looped, **names)


def assert_close(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
  """Every array is within `tolerance` of its largest entry; -inf only where -inf is wanted."""
  assert got.keys() == want.keys()
  for name in want:
    x, y = (np.asarray(array[name], np.float64) for array in (got, want))
    limit = tolerance * np.abs(y[np.isfinite(y)]).max(initial=0)
    np.testing.assert_allclose(x, y, rtol=0, atol=limit, err_msg=name)


@pytest.fixture(name="arrays_of", scope="session")
def arrays_fixture():
  return lambda case, dtype=np.float32: Case(**case).arrays(dtype)


@pytest.fixture(name="tokens_of", scope="session")
def tokens_fixture():
  return lambda case: Case(**case).tokens()


@pytest.fixture(name="run", scope="session")
def run_fixture():
  return run


@pytest.fixture(name="assert_close", scope="session")
def assert_close_fixture():
  return assert_close
