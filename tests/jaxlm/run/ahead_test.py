"""The real training step compiled for chips that are not here, and the plan beside its program."""

import collections
import dataclasses

import pytest

from jaxlm import presets
from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, decoder
from jaxlm.run.ahead import compile_ahead, runnable
from jaxlm.scaling.shapes import model_shapes, step_shapes, with_rows_for
from pallas_kernels.common.errors import UserError
from pallas_kernels.common.topology import parse_topology
from sharding.aot import format_program
from sharding.plan import best_plans, make_plan

# Widths that the TPU's tiles divide, so that its arrays have no padding; smaller rows than these
# the compiler does not scatter, and a smaller vocabulary has no kernel for its loss.
MODEL = decoder(V=5120, D=128, F=256, N=2, K=2, H=128, layers=3)
CONFIG = TrainConfig(
  batch=8,
  model=MODEL,
  compute=ComputeConfig(dtype="bfloat16", remat="full"),
  data=DataConfig(length=512),
  mesh=MeshConfig(data=1, fsdp=-1, tensor=2),
)
KERNELS = {
  "linear_cross_entropy_backward",
  "linear_cross_entropy_forward",
  "splash_mha_dkv_no_residuals",
  "splash_mha_dq_no_residuals",
  "splash_mha_fwd_residuals",
}
SCALARS = 64
"""bytes; a plan leaves out sums of single numbers"""


def sums(collectives):
  """Returns the bytes of a step by kind and axes, scalars left out."""
  totals = collections.Counter()
  for c in collectives:
    if c.bytes > SCALARS:
      totals[c.kind, c.axes] += c.bytes * c.times
  return dict(totals)


def check_plan(config, program):
  """Compares what the compiler says with the plan of the same step on the same mesh."""
  shapes = model_shapes(config.model, "test")
  plan = make_plan(shapes, step_shapes(config), program.topology, program.sizes)
  assert sums(program.collectives) == pytest.approx(sums(plan.traffic), rel=1e-3)
  per_chip = program.topology.chip.devices_per_chip
  planned = per_chip * plan.memory["weights and moments"]
  batch_bytes = 3 * 4 * config.batch * config.data.length * per_chip
  assert planned <= program.argument_bytes <= planned + batch_bytes + 2**16
  assert program.peak_bytes - program.code_bytes == pytest.approx(
    per_chip * plan.memory_bytes, rel=0.35
  )


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_step_compiles_for_every_generation_with_its_kernels_and_as_planned(topology):
  pytest.importorskip("libtpu")
  program = compile_ahead(CONFIG, topology)
  assert set(program.kernels) == KERNELS
  check_plan(CONFIG, program)
  weights = [c for c in program.collectives if c.kind == "all-gather" and c.loops == (3,)]
  assert collections.Counter(c.axes for c in weights) == {("fsdp",): 14, ("tensor",): 6}
  text = format_program(program)
  assert "inside" in text and "outside" in text and "splash_mha_fwd_residuals 2" in text


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat, accumulate, mesh",
  [
    ("dots", 1, MeshConfig(data=1, fsdp=2, tensor=2)),
    ("none", 2, MeshConfig(data=2, tensor=2)),
    ("full", 2, MeshConfig(data=2, fsdp=2)),
  ],
  ids=str,
)
def test_the_program_of_every_remat_and_mesh_sends_what_the_plan_says(remat, accumulate, mesh):
  pytest.importorskip("libtpu")
  config = dataclasses.replace(
    CONFIG,
    compute=dataclasses.replace(CONFIG.compute, remat=remat),
    batch=8 * accumulate,
    accumulate=accumulate,
    mesh=mesh,
  )
  check_plan(config, compile_ahead(config, "v5e:2x2"))


def test_meshes_and_topologies_that_do_not_fit_are_refused_before_compiling():
  for mesh, topology, rule in (
    (MeshConfig(data=3), "v5e:2x2", "topology='v5e:2x2': has 4 devices, mesh data 3 uses 3"),
    (MeshConfig(data=8), "v5e:2x2", "mesh data 8: needs 8 devices, there are 4"),
    (MeshConfig(data=1, tensor=4), "v5e:2x2", r"mixer\.K=2: must be a multiple of mesh\.tensor=4"),
    (MeshConfig(), "v5e:3x3", "a host has 2x2 chips"),
  ):
    with pytest.raises(UserError, match=rule):
      compile_ahead(dataclasses.replace(CONFIG, mesh=mesh), topology)


def test_without_a_mesh_the_best_that_the_model_can_run_on_is_taken():
  config = dataclasses.replace(CONFIG, mesh=MeshConfig())
  planned = runnable(config, "v5p:4x4x4")
  assert planned.batch == 64  # a row for each device
  assert planned.mesh.resolve(64) == planned.mesh.sizes() != MeshConfig().sizes()
  named = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=64))
  assert runnable(named, "v5p:4x4x4") is named


def test_a_mesh_with_fused_attention_is_taken_before_one_with_a_ring():
  config = with_rows_for(presets.llama_3_1_8b(), 256)
  shapes, topology = model_shapes(config.model, "test"), parse_topology("v5e:16x16")
  best = best_plans(shapes, step_shapes(config), topology)[0]
  assert best.sizes["context_ring"] == 2
  planned = runnable(config, "v5e:16x16")
  assert planned.mesh == MeshConfig(data=1, fsdp=256)
