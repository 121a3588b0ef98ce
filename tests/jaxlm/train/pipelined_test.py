"""Training in pipeline stages gives the loss and the gradients of one device, on every mesh."""

import dataclasses

import jax
import pytest

from jaxlm.config import ComputeConfig, MeshConfig, PipelineConfig, TrainConfig, revise
from jaxlm.run.text import TextTask
from jaxlm.train import init_state, make_train_step
from jaxlm.train.stages import cut_layers, make_schedule
from jaxlm.train.task import Start
from pallas_kernels.common.errors import UserError
from sharding import make_mesh
from sharding.batches import globalize
from sharding.collectives import read_collectives
from tests.jaxlm.train.sharded_gradients_test import (
  ALIKE,
  SCANNED,
  SMALL,
  check_against_one_device,
  packed_batch,
)

# `stages_test.py` has all optimisations
pytestmark = pytest.mark.usefixtures("compile_in_less_time")

# windows in turn: a stage has whole repeats of two layers. Packed rows, one of them empty, so that
# micro-batches have unequal numbers of tokens, and one shard of one has none
PATTERN = dataclasses.replace(
  SCANNED, accumulate=2, model=revise(SCANNED.model, layers=4), compute=ComputeConfig()
)
CASES = [
  (SMALL, MeshConfig(data=2, stage=2), PipelineConfig(schedule="1f1b", layers_per_stage=(0, 2))),
  # layers 1, 2, 2, 1, on every rank at rest as 4 does not divide 6
  (ALIKE, MeshConfig(data=2, stage=4), PipelineConfig(schedule="zb_h1")),
  (PATTERN, MeshConfig(data=1, stage=2, fsdp=2, tensor=2), PipelineConfig(schedule="gpipe")),
  (ALIKE, MeshConfig(data=1, stage=2, context_ulysses=2), PipelineConfig(schedule="zb_v")),
  (SMALL, MeshConfig(data=1, stage=2, context_ring=2, tensor=2), PipelineConfig()),
]
QUICK = 1


def id_of(case) -> str:
  _, mesh, pipeline = case
  return f"{mesh.describe()}, {pipeline.schedule}"


CASES = [
  pytest.param(*case, id=id_of(case), marks=() if index < QUICK else pytest.mark.slow)
  for index, case in enumerate(CASES)
]


@pytest.mark.parametrize("config, mesh, pipeline", CASES)
def test_loss_and_every_gradient_equal_one_devices(config, mesh, pipeline):
  staged = dataclasses.replace(config, mesh=mesh, pipeline=pipeline)
  params, program = check_against_one_device(staged)
  check_collectives(program.as_text(), mesh, params)


def check_collectives(program: str, mesh: MeshConfig, params) -> None:
  """Checks what the program sends in its loops, and that each gradient crosses `data` once."""
  found = read_collectives(program, mesh.resolve(8))
  in_ticks = [c for c in found if c.depth and "stage" in c.axes]
  assert [c.kind for c in in_ticks] == ["collective-permute"] * 2
  others = [c for c in found if c.depth and "stage" not in c.axes]
  # besides the sums of the denominators, activations alone, between devices of one stage
  within = {("tensor",), ("context_ring",), ("context_ulysses",)}
  assert {c.axes for c in others if c.shape} <= within
  crossing = [c for c in found if "data" in c.axes and c.shape]
  assert {c.depth for c in crossing} <= {0}
  assert len(crossing) == (len(jax.tree.leaves(params)) if mesh.data > 1 else 0)


def test_layers_are_cut_into_stages():
  assert cut_layers([(1, 8)], 4) == [(2,)] * 4
  assert cut_layers([(1, 6)], 4) == [(1,), (2,), (2,), (1,)]
  assert cut_layers([(1, 1), (2, 4), (1, 1)], 3) == [(1, 1, 0), (0, 2, 0), (0, 1, 1)]
  assert cut_layers([(2, 3)], 2, (2, 4)) == [(1,), (2,)]
  assert cut_layers([(1, 4)], 3, (0, 4, 0)) == [(0,), (4,), (0,)]
  for layers, message in (
    ((3, 3), "stage 0 would end inside of a repeat of layers, after 4 it can"),
    ((2, 2), "must add up to the model's 6 layers"),
    ((2, 2, 2), "needs one number of layers for each of the 2 stages"),
  ):
    with pytest.raises(UserError, match=message):
      cut_layers([(2, 3)], 2, layers)
  with pytest.raises(UserError, match="mesh.stage=4: the model has fewer repeats of layers, 3"):
    cut_layers([(2, 3)], 4)


@pytest.mark.parametrize(
  "name", ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2", "zb_v", "dualpipev"]
)
def test_a_schedule_by_its_name(name):
  config = TrainConfig(batch=16, accumulate=8, pipeline=PipelineConfig(schedule=name))
  schedule = make_schedule(config, 4)
  assert (schedule.name, schedule.ranks, schedule.microbatches) == (name, 4, 8)


def test_a_task_that_has_no_stages_is_refused():
  config = dataclasses.replace(ALIKE, mesh=MeshConfig(data=1, stage=2))

  class Whole(TextTask):
    def stages(self):
      return None

  class Frozen(TextTask):
    def init(self, key):
      params = self.model.init(key)
      return Start({"stacks": params.pop("stacks")}, params)

    def roles(self, params):
      return jax.tree.map(lambda _: "matrix", params)

  for task, message in (
    (Whole(config), "mesh.stage=2: Whole has no stages; it must be 1"),
    (Frozen(config), "mesh.stage=2: Frozen has frozen weights, which no stage holds"),
  ):
    with jax.set_mesh(make_mesh(config.mesh)), pytest.raises(UserError, match=message):
      state = jax.eval_shape(lambda task=task: init_state(config, task))
      jax.eval_shape(make_train_step(config, task), state, globalize(packed_batch(), 16))


@pytest.mark.slow
def test_a_step_in_stages_compiles_for_tpus(lower_step, tpu_devices):
  """The loss takes its TPU kernel, and a tick sends two permutes."""
  model = revise(SMALL.model, D=128, F=128, H=64, V=8192, layers=4)
  config = dataclasses.replace(
    SMALL,
    accumulate=4,
    model=model,
    data=dataclasses.replace(SMALL.data, length=128),
    mesh=MeshConfig(data=2, stage=4),
    pipeline=PipelineConfig(schedule="zb_h1"),
  )
  program = lower_step(config, tpu_devices).compile().as_text()
  assert "tpu_custom_call" in program
  found = read_collectives(program, config.mesh.resolve(8))
  in_loops = [(c.kind, c.axes) for c in found if c.depth]
  assert in_loops == [("collective-permute", ("stage",))] * 2
