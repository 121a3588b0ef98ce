"""Every schedule gives the gradients of the unsharded model, in the memory that was simulated."""

# M micro-batches, B batch, D model, L layers

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.errors import UserError
from sharding import make_mesh
from sharding.collectives import read_collectives
from sharding.mesh import MeshConfig
from sharding.pipeline import schedules, simulate
from sharding.pipeline.executor import Pipeline, pipelined_value_and_grad
from sharding.pipeline.instructions import make_instructions
from sharding.pipeline.table import make_table

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

M, B, D, V = 8, 4, 8, 16
BY_STAGE = P("stage")
SCHEDULES = {
  "gpipe": schedules.gpipe,
  "1f1b": schedules.one_f_one_b,
  "zb_h1": schedules.zb_h1,
  "zb_h2": schedules.zb_h2,
  "interleaved": functools.partial(schedules.interleaved, chunks=2),
  "zb_v": schedules.zb_v,
  "dualpipev": schedules.dualpipev,
}


def embed(shared, batch):
  return shared["table"][batch["ids"]]


def layers(stacks, x_BD, batch):
  (stack,) = stacks
  for up, down in zip(stack["up"], stack["down"]):
    x_BD = x_BD + jnp.tanh(x_BD @ up) @ down * batch["scale"][:, None]
  return x_BD


def loss(shared, x_BD, batch):
  """Cross-entropy with the tied table, weighted: micro-batches count unequally."""
  logp_BV = jax.nn.log_softmax(x_BD @ shared["table"].T)
  picked_B = jnp.take_along_axis(logp_BV, batch["targets"][:, None], 1)[:, 0]
  return -jnp.sum(picked_B * batch["weights"]), {"tokens": jnp.sum(batch["weights"])}


# the others take different orders of the same operations, or stages, as one of these
SLOW = ("zb_h2", "interleaved", "dualpipev")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SCHEDULES]
PIPELINE = Pipeline(embed=embed, layers=layers, loss=loss)


def inputs(L):
  draw = np.random.default_rng(0)
  stack = {
    "up": draw.normal(size=(L, D, 2 * D)) / 3,
    "down": draw.normal(size=(L, 2 * D, D)) / 3,
  }
  shared = {"table": draw.normal(size=(V, D))}
  batch = {
    "ids": draw.integers(0, V, (M, B)),
    "targets": draw.integers(0, V, (M, B)),
    "weights": np.round(draw.uniform(size=(M, B))),
    "scale": draw.uniform(size=(M, B)),
  }
  return jax.tree.map(jnp.asarray, ((stack,), shared, batch))


def reference(stacks, shared, batch):
  def total(stacks, shared):
    def add(total, batch):
      more = loss(shared, layers(stacks, embed(shared, batch), batch), batch)
      return jax.tree.map(jnp.add, total, more), None

    return jax.lax.scan(add, (0.0, {"tokens": 0.0}), batch)[0]

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(stacks, shared)


def compiled_step(name, counts, arguments, at_rest=BY_STAGE, **axes):
  """Returns (program, arguments) on a mesh of 4 stages; `at_rest` says how layers lie on it."""
  schedule = SCHEDULES[name](4, M)
  with jax.set_mesh(make_mesh(MeshConfig(**{"data": 2, "stage": 4} | axes))):
    stacks, shared, batch = arguments
    stacks = jax.tree.map(lambda w: jax.reshard(w, at_rest), stacks)
    arguments = stacks, jax.reshard(shared, P()), jax.reshard(batch, P(None, "data"))
    step = pipelined_value_and_grad(PIPELINE, schedule, [(n,) for n in counts])
    return jax.jit(step).lower(*arguments).compile(), arguments


@pytest.fixture(scope="module")
def expected():
  return {L: reference(*inputs(L)) for L in (6, 8)}


@pytest.fixture(scope="module")
def programs():
  """Returns a function that gives a schedule's program: 8 layers, stages of equal size."""

  @functools.cache
  def program(name):
    stages = SCHEDULES[name](4, M).stages
    return compiled_step(name, [8 // stages] * stages, inputs(8))

  return program


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_model(name, programs, expected):
  step, arguments = programs(name)
  chex.assert_trees_all_close(step(*arguments), expected[8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "counts",
  [(1, 2, 2, 1), *(pytest.param(n, marks=pytest.mark.slow) for n in ((1, 3, 3, 1), (0, 4, 4, 0)))],
)
def test_stages_of_unequal_size(counts, expected):
  L = sum(counts)
  at_rest = P() if L % 4 else BY_STAGE
  step, arguments = compiled_step("zb_h1", counts, inputs(L), at_rest)
  chex.assert_trees_all_close(step(*arguments), expected[L], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_tick_sends_two_permutes_and_each_gradient_crosses_data_once(name, programs):
  step, _ = programs(name)
  found = read_collectives(step.as_text(), MeshConfig(data=2, stage=4).resolve(8))
  in_loops = [c for c in found if c.depth]
  assert [c.kind for c in in_loops] == ["collective-permute"] * 2
  assert all(c.axes == ("stage",) and c.depth == 1 and not c.conditional for c in in_loops)
  assert {c.times for c in in_loops} == {make_table(SCHEDULES[name](4, M)).ticks}
  crossing = [math.prod(c.shape) for c in found if "data" in c.axes and c.shape]
  assert sorted(crossing) == sorted([2 * D * 2 * D, 2 * D * 2 * D, V * D])
  # with two stages on a rank, layers travel to it one by one: no rank has all of them
  assert {c.kind for c in found} == {"collective-permute", "all-reduce"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_slots_are_those_of_the_simulated_peak(name):
  table = make_table(SCHEDULES[name](4, M))
  simulation = simulate(table.schedule)
  instructions = make_instructions(table, [0] * table.schedule.stages)
  used = {name: getattr(instructions.ticks, name).max(axis=1) + 1 for name in ("kept", "stash")}
  assert tuple(used["kept"]) == simulation.peak_activations
  assert tuple(used["stash"]) == simulation.peak_residuals
  assert instructions.kept_slots == max(simulation.peak_activations)
  assert instructions.stash_slots == max(simulation.peak_residuals)
  if name in ("gpipe", "1f1b", "interleaved"):  # W comes right after B
    assert instructions.crossing_slots == 1


def test_memory_follows_the_slots(programs):
  """A step of 1F1B allocates less beside its arguments than one of GPipe does at M = 2P."""
  assert M == 2 * 4
  temp = {
    name: programs(name)[0].memory_analysis().temp_size_in_bytes for name in ("gpipe", "1f1b")
  }
  assert temp["1f1b"] < temp["gpipe"]


def test_no_tick_copies_the_slots(programs):
  """All buffers of slots, [M, B / data, ...] under GPipe, stay where they are in every loop."""
  loops = programs("gpipe")[0].as_text().split("\nENTRY")[0]
  assert re.search(rf"f32\[{M},{B // 2},[\d,]*\]", loops)
  assert not re.findall(rf"= f32\[{M},{B // 2},[\d,]*\]\S* copy\(", loops)


def test_refuses_what_does_not_fit():
  schedule = schedules.one_f_one_b(4, M)
  with pytest.raises(UserError, match="schedule='dualpipe': only schedules that hold every stage"):
    pipelined_value_and_grad(PIPELINE, schedules.dualpipe(4, M), [(2,)] * 4)
  with pytest.raises(UserError, match=r"layers=.*: needs one entry for each of the 4 stages"):
    pipelined_value_and_grad(PIPELINE, schedule, [(2,)] * 3)
  with pytest.raises(UserError, match=r"layers=\(8,\): the stacks have \(6,\) layers"):
    compiled_step("1f1b", [2] * 4, inputs(6), P())
  with pytest.raises(UserError, match="schedule='1f1b': has 4 ranks, the mesh has stage=2"):
    compiled_step("1f1b", [2] * 4, inputs(8), stage=2)
  stacks, shared, batch = inputs(8)
  with pytest.raises(UserError, match="schedule='1f1b': is for 8 micro-batches, the batch has 4"):
    compiled_step("1f1b", [2] * 4, (stacks, shared, jax.tree.map(lambda a: a[:4], batch)))
