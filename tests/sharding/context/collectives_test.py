"""What attention over several devices sends, by kind, axis and loop, and how much it keeps."""

import collections

import jax
import pytest

from sharding import MeshConfig, make_mesh
from sharding.collectives import Collective, read_collectives
from sharding.context import ring

RING, ULYSSES = "context_ring", "context_ulysses"


def send(calls, mesh: MeshConfig, *, backward: bool, **fields) -> list[Collective]:
  """Returns what a compiled call sends."""
  case = calls.Case(mesh=mesh, **fields)
  with jax.set_mesh(make_mesh(mesh)):
    with_gradients, arrays = calls.on_mesh(case)

    def forward(*arrays):
      return with_gradients(*arrays)[0]

    function = with_gradients if backward else jax.jit(forward)
    text = function.lower(*arrays).compile().as_text()
    return read_collectives(text, jax.sharding.get_mesh().shape)


def count(calls, mesh: MeshConfig, **options) -> collections.Counter:
  """Counts what a compiled call sends, by kind, axes and loops around it."""
  sent = send(calls, mesh, **options)
  counts = collections.Counter((c.kind, c.axes, c.depth) for c in sent)
  # on CPU the compiler writes one all-to-all as an array for each device of the axis
  parts = {key: mesh.context_ulysses if key[0] == "all-to-all" else 1 for key in counts}
  return collections.Counter({key: counts[key] / parts[key] for key in counts})


@pytest.mark.parametrize("K", [8, 2, 1])
def test_ulysses_sends_four_all_to_alls_and_nothing_else(calls, K):
  """With the ids of whole rows on every device; rows, tensor and key heads change nothing."""
  mesh = MeshConfig(data=2, context_ulysses=4)
  assert count(calls, mesh, backward=False, K=K) == {("all-to-all", (ULYSSES,), 0): 4}


def test_ulysses_sends_four_more_in_the_backward_pass(calls):
  mesh = MeshConfig(data=1, context_ulysses=4, tensor=2)
  assert count(calls, mesh, backward=True) == {("all-to-all", (ULYSSES,), 0): 8}


@pytest.mark.parametrize("order", ["zigzag", "stripe"])
def test_a_ring_sends_keys_and_values_once_per_hop(calls, order):
  """Of c - 1 hops, c - 2 are in a loop; a hop sends a device's tokens of its own key heads."""
  sent = send(calls, MeshConfig(data=1, context_ring=4, tensor=2), backward=False, order=order)
  assert {(c.kind, c.axes) for c in sent} == {("collective-permute", (RING,))}
  assert sorted(c.depth for c in sent) == [0, 0, 1, 1]
  case = calls.Case(MeshConfig())
  tokens, heads = case.B * case.T // 4, case.K // 2
  assert sum(c.bytes * c.times for c in sent) == 4 * 3 * tokens * heads * (case.H + case.U)


@pytest.mark.parametrize("ranks", [2, 4])
def test_its_backward_pass_sends_gradients_round_besides(calls, ranks):
  """c - 1 hops of k and v again, and c hops of dk and dv, the last of them home."""
  sent = count(calls, MeshConfig(data=1, context_ring=ranks), backward=True)
  first = ("collective-permute", (RING,), 0)
  if ranks == 2:  # the compiler finds the forward pass's k and v again
    assert set(sent) == {first} and 6 <= sent[first] <= 8
  else:
    assert set(sent) == {first, ("collective-permute", (RING,), 1)}
    assert sent["collective-permute", (RING,), 1] == 2 + 4
    assert 6 <= sent[first] <= 8


def test_both_together_send_what_each_sends(calls):
  sent = count(calls, MeshConfig(data=1, context_ring=2, context_ulysses=2), backward=False)
  assert sent == {("all-to-all", (ULYSSES,), 0): 4, ("collective-permute", (RING,), 0): 2}


@pytest.mark.slow
def test_the_backward_pass_takes_half_the_memory_of_automatic_differentiation(calls, monkeypatch):
  def temporary_bytes():
    case = calls.Case(MeshConfig(data=1, context_ring=4), T=2048, B=1, H=32, U=32)
    with jax.set_mesh(make_mesh(case.mesh)):
      function, arrays = calls.on_mesh(case)
      return function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

  own = temporary_bytes()
  monkeypatch.setattr(ring, "_attend", lambda *arguments: ring._forward(*arguments)[0])
  automatic = temporary_bytes()
  assert own <= 0.5 * automatic
