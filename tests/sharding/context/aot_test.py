"""Attention over several TPUs that are not here, compiled ahead of time."""

import collections
import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.collectives import read_collectives
from sharding.context import hybrid_attention


@pytest.fixture(scope="module")
def compiled():
  """Returns compiled(axis): text and collectives of forward and backward on four v5e chips."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  from pallas_kernels.schedule.compiler import chip_mesh

  def compile_attention(axis: str):
    devices = chip_mesh("v5e", (4,)).devices
    mesh = jax.sharding.Mesh(devices, (axis,), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.NamedSharding(mesh, P(None, axis))
    shapes = [(1, 1024, heads, 128) for heads in (4, 1, 1, 4)]
    arrays = [jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for shape in shapes]

    def with_gradients(q_BTNH, k_BTKH, v_BTKH, do_BTNH):
      o_BTNH, pull = jax.vjp(hybrid_attention, q_BTNH, k_BTKH, v_BTKH)
      return o_BTNH, pull(do_BTNH)

    with jax.set_mesh(mesh):
      text = jax.jit(with_gradients).lower(*arrays).compile().as_text()
    sent = read_collectives(text, mesh.shape)
    return text, collections.Counter((c.kind, c.depth) for c in sent if c.shape)

  return compile_attention


@pytest.mark.slow
def test_ulysses_runs_splash_between_its_all_to_alls(compiled):
  text, sent = compiled("context_ulysses")
  assert "splash" in text
  assert sent["all-to-all", 0] == 8


@pytest.mark.slow
def test_a_ring_permutes_and_gathers_nothing(compiled):
  _, sent = compiled("context_ring")
  # of 8 outside the loops the compiler finds the forward pass's k and v again
  assert sent == {("collective-permute", 0): 6, ("collective-permute", 1): 2 + 4}
