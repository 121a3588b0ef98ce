"""Attention of rows that lie over several devices equals one device's, gradients included."""

# B batch, T positions, N query heads, K key heads
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UnsupportedError, UserError
from sharding import MeshConfig, make_mesh
from sharding.context import (
  Rows,
  Variant,
  hybrid_attention,
  hybrid_attention_shard,
  ring_attention,
  ulysses_attention,
)

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

WINDOWED = (("window", 5), ("cap", 3.0), ("scale", 0.7))
CASES = {
  "contiguous ring": dict(mesh=MeshConfig(data=2, context_ring=4), order="contiguous"),
  "zigzag ring": dict(mesh=MeshConfig(data=2, context_ring=4)),
  "stripe ring": dict(mesh=MeshConfig(data=2, context_ring=4), order="stripe"),
  "contiguous, window and cap": dict(
    mesh=MeshConfig(data=1, context_ring=4), order="contiguous", options=WINDOWED
  ),
  "zigzag, window and cap": dict(mesh=MeshConfig(data=1, context_ring=4), options=WINDOWED),
  "stripe, window and cap": dict(
    mesh=MeshConfig(data=1, context_ring=4), order="stripe", options=WINDOWED
  ),
  "Ulysses, window and cap": dict(mesh=MeshConfig(data=1, context_ulysses=4), options=WINDOWED),
  "both, with tensor": dict(mesh=MeshConfig(data=1, context_ring=2, context_ulysses=2, tensor=2)),
  "both, one key head": dict(mesh=MeshConfig(data=1, context_ring=2, context_ulysses=4), K=1),
  "positions in any order": dict(
    mesh=MeshConfig(data=1, context_ring=2, context_ulysses=2), shuffled=True, options=WINDOWED
  ),
  "not causal": dict(
    mesh=MeshConfig(data=1, context_ring=4), packed=False, options=(("causal", False),)
  ),
}


QUICK = ("zigzag ring", "zigzag, window and cap", "stripe, window and cap", "both, with tensor")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_output_and_gradients_are_one_devices(calls, name):
  calls.compare(calls.Case(**CASES[name]))


FORMS = ("context_ring", "context_ulysses")
SIZES = [
  *itertools.product(FORMS, ((2, 4),), (8, 4, 2, 1)),
  *itertools.product(FORMS, ((1, 8),), (8, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("axis, devices, K", SIZES)
def test_grouped_heads_on_every_number_of_devices(calls, axis, devices, K):
  data, context = devices
  calls.compare(calls.Case(mesh=MeshConfig(data=data, **{axis: context}), K=K))


@pytest.mark.slow
def test_in_bfloat16_a_ring_merges_in_float32(calls):
  """So that many parts cost no more than the rounding of inputs and outputs."""
  case = calls.Case(mesh=MeshConfig(data=1, context_ring=8), dtype="bfloat16")
  calls.compare(case, tolerance=0.06)  # 2^-8 of the largest gradient, 12


@pytest.mark.slow
def test_long_parts_are_computed_in_loops(calls, monkeypatch):
  from pallas_kernels.attention import blocks

  monkeypatch.setattr(blocks, "LOOPED_LENGTH", 8)
  monkeypatch.setattr(blocks, "BANDS", 2)
  calls.compare(calls.Case(mesh=MeshConfig(data=1, context_ring=2), T=128, N=2))


def test_the_form_for_one_shard_stands_inside_shard_map():
  """As a pipeline calls it: manual over all axes, ids of whole rows on each device."""
  mesh = make_mesh(MeshConfig(data=1, context_ring=2, context_ulysses=2))
  x_BTNH = np.random.default_rng(0).normal(size=(1, 16, 2, 4)).astype(np.float32)
  ids_BS = np.sort(np.random.default_rng(1).integers(1, 3, (1, 16)), axis=1)
  with jax.set_mesh(mesh):
    spread = jax.reshard(x_BTNH, P(None, ("context_ring", "context_ulysses")))

    def local(x_BTNH):
      rows = Rows(segment_ids_BS=jnp.asarray(ids_BS))
      own = hybrid_attention_shard(x_BTNH, x_BTNH, x_BTNH, rows, Variant())
      return own, hybrid_attention(x_BTNH, x_BTNH, x_BTNH, segment_ids_BT=jnp.asarray(ids_BS))

    spec = jax.typeof(spread).sharding.spec
    got = jax.jit(jax.shard_map(local, in_specs=spec, out_specs=(spec, spec)))(spread)
    want = jax.jit(hybrid_attention)(spread, spread, spread, segment_ids_BT=ids_BS)
  chex.assert_trees_all_equal(got, (want, want))


REFUSED = {
  "query heads": (
    dict(mesh=MeshConfig(data=1, context_ulysses=8), N=4, K=4),
    r"N=4: query heads on each device must be a multiple of context_ulysses=8",
  ),
  "query heads after tensor": (
    dict(mesh=MeshConfig(data=1, context_ulysses=4, tensor=2), N=4, K=2),
    r"N=2: query heads on each device must be a multiple of context_ulysses=4",
  ),
  "key heads": (
    dict(mesh=MeshConfig(data=1, context_ulysses=4), N=12, K=6),
    r"K=6: key heads on each device must be a multiple or a divisor of context_ulysses=4",
  ),
  "length of a zigzag": (
    dict(mesh=MeshConfig(data=1, context_ring=4), T=36),
    r"T=36: must be a multiple of 8 for order 'zigzag' and a ring of 4",
  ),
  "implementation": (
    dict(mesh=MeshConfig(data=1, context_ring=2), options=(("implementation", "splash"),)),
    r"implementation='splash': a ring of context_ring=2 merges parts of softmax",
  ),
}


def lower(case, attend=hybrid_attention):
  """Traces a call, of shapes alone."""
  B, T, N, K = case.B, case.T, case.N, case.K
  with jax.set_mesh(make_mesh(case.mesh)):
    place = jax.NamedSharding(jax.sharding.get_mesh(), case.spec())
    shapes = [(B, T, N, 8), (B, T, K, 8), (B, T, K, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for shape in shapes]
    return jax.eval_shape(lambda *x: attend(*x, order=case.order, **dict(case.options)), *arrays)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_when_traced_with_both_numbers(calls, name):
  arguments, message = REFUSED[name]
  with pytest.raises(UserError, match=message):
    lower(calls.Case(**arguments))


def test_either_form_alone_refuses_rows_that_lie_otherwise(calls):
  ring = calls.Case(mesh=MeshConfig(data=1, context_ring=2))
  ulysses = calls.Case(mesh=MeshConfig(data=1, context_ulysses=2))
  both = calls.Case(mesh=MeshConfig(data=1, context_ring=2, context_ulysses=2))
  assert lower(ring, ring_attention).shape == lower(ulysses, ulysses_attention).shape
  misfits = (ulysses, ring_attention), (ring, ulysses_attention), (both, ring_attention)
  for case, attend in misfits:
    with pytest.raises(UserError, match=r"q_BTNH=.*its T=32 must lie over"):
      lower(case, attend)


def test_a_length_over_another_axis_is_refused(calls):
  case = calls.Case(mesh=MeshConfig(data=1, tensor=2))
  with jax.set_mesh(make_mesh(case.mesh)):
    place = jax.NamedSharding(jax.sharding.get_mesh(), P(None, "tensor"))
    x = jax.ShapeDtypeStruct((2, 32, 8, 8), np.float32, sharding=place)
    with pytest.raises(UnsupportedError, match="its T=32 is spread over mesh axis tensor=2"):
      jax.eval_shape(hybrid_attention, x, x, x)
