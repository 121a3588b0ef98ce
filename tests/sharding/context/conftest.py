"""Calls of attention whose rows lie over a mesh, and what one device gives for them."""

# B batch, T positions, N query heads, K key heads, H width of queries and keys, U width of values
from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention
from sharding import MeshConfig, make_mesh
from sharding.context import hybrid_attention
from sharding.context.order import permutation

LENGTH_AXES = ("context_ring", "context_ulysses")


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of `hybrid_attention` on random arrays."""

  mesh: MeshConfig
  order: str = "zigzag"
  B: int = 2
  T: int = 32
  N: int = 8
  K: int = 2
  H: int = 8
  U: int = 6
  dtype: str = "float32"
  packed: bool = True
  shuffled: bool = False
  options: tuple[tuple[str, Any], ...] = ()

  def arrays(self) -> tuple[np.ndarray, ...]:
    """Returns q, k, v and the cotangent of the output, in the row's own order."""
    rng = np.random.default_rng(0)
    B, T, N, K = self.B, self.T, self.N, self.K
    shapes = [(B, T, N, self.H), (B, T, K, self.H), (B, T, K, self.U), (B, T, N, self.U)]
    return tuple(rng.normal(size=shape).astype(self.dtype) for shape in shapes)

  def rows(self) -> dict[str, np.ndarray]:
    """Returns segment ids, of rows that are cut at different places, and positions, if any."""
    rng, rows = np.random.default_rng(1), {}
    if self.packed:
      rows["segment_ids_BT"] = np.sort(rng.integers(1, 4, (self.B, self.T)), 1).astype(np.int32)
    if self.shuffled:
      rows["positions_BT"] = rng.permutation(self.T)[None].astype(np.int32)
    return rows

  def columns(self) -> np.ndarray:
    return permutation(self.order, self.T, self.mesh.context_ring)

  def spec(self) -> P:
    active = [name for name, size in self.mesh.sizes().items() if size > 1]
    length = tuple(axis for axis in LENGTH_AXES if axis in active)
    one = {axis: axis if axis in active else None for axis in ("data", "tensor")}
    return P(one["data"], length or None, one["tensor"], None)


def with_gradients(attend, q_BTNH, k_BTKH, v_BTKU, do_BTNU):
  o_BTNU, pull = jax.vjp(attend, q_BTNH, k_BTKH, v_BTKU)
  return (o_BTNU, *pull(do_BTNU))


def on_mesh(case: Case, attend=hybrid_attention):
  """Returns the jitted function of (q, k, v, do) and these arrays, in the order of the ring."""
  rows = {name: x_BT[:, case.columns()] for name, x_BT in case.rows().items()}

  def call(q_BTNH, k_BTKH, v_BTKU):
    return attend(q_BTNH, k_BTKH, v_BTKU, **rows, **dict(case.options), order=case.order)

  place = jax.NamedSharding(jax.sharding.get_mesh(), case.spec())
  arrays = [jax.device_put(x[:, case.columns()], place) for x in case.arrays()]
  return jax.jit(lambda *arrays: with_gradients(call, *arrays)), arrays


def on_one_device(case: Case):
  """Returns output and gradients of the materialised attention."""
  rows = case.rows()
  positions_BT = rows.get("positions_BT")

  def call(q_BTNH, k_BTKH, v_BTKU):
    return attention(
      q_BTNH,
      k_BTKH,
      v_BTKU,
      q_positions_BT=positions_BT,
      k_positions_BS=positions_BT,
      q_segment_ids_BT=rows.get("segment_ids_BT"),
      implementation="reference",
      **dict(case.options),
    )

  return jax.jit(lambda *arrays: with_gradients(call, *arrays))(*case.arrays())


def compare(case: Case, tolerance: float = 1e-5) -> None:
  """Checks that output and gradients on the mesh are those of one device."""
  with jax.set_mesh(make_mesh(case.mesh)):
    function, arrays = on_mesh(case)
    got = function(*arrays)
    assert [x.sharding.spec for x in got] == [case.spec()] * 4
  back = np.argsort(case.columns())
  for name, x, y in zip(("o", "dq", "dk", "dv"), got, on_one_device(case)):
    x, y = np.asarray(x, np.float32)[:, back], np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="session")
def calls():
  return SimpleNamespace(Case=Case, on_mesh=on_mesh, compare=compare)
