"""What the compiled training step sends between devices, and in which loop.

Micro-batches are one loop, layers another inside it.
"""

import collections
import dataclasses
import math
import os
from pathlib import Path

import jax
import pytest

from jaxlm.config import (
  ComputeConfig,
  DataConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
  decoder,
  revise,
)
from jaxlm.run.text import TextTask
from jaxlm.train import accumulate, init_state
from sharding.collectives import Collective, read_collectives

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

# One line per mesh: arrays that the step sends, outside loops + in one + inside two. These numbers
# stay as they are; `WRITE_COLLECTIVES=1` writes them anew where a change of them is meant.
GOLDEN = Path(__file__).with_name("collectives.txt")
MESHES = (
  MeshConfig(data=8),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=1, tensor=2),
  MeshConfig(data=2, fsdp=4),
  MeshConfig(data=2, tensor=2),
  MeshConfig(data=1, fsdp=4, tensor=2),
  MeshConfig(data=2, fsdp=2, tensor=2),
)

# Every weight matrix has a shape of its own, and none that of an activation [2, 8, 16].
LENGTH = 8
D, F, N, K, H = 16, 40, 4, 2, 8
MODEL = decoder(V=48, D=D, F=F, N=N, K=K, H=H, layers=4)
DATA, FSDP, TENSOR = MeshConfig(), MeshConfig(data=1, fsdp=8), MeshConfig(data=1, tensor=2, fsdp=4)


def config_on(mesh: MeshConfig, model: ModelConfig = MODEL) -> TrainConfig:
  batch = (
    8 * mesh.resolve(8)["data"] * mesh.resolve(8)["fsdp"]
  )  # 4 micro-batches of 2 rows per device
  return TrainConfig(
    batch=batch,
    accumulate=4,
    model=model,
    compute=ComputeConfig(scan="always"),
    data=DataConfig(length=LENGTH),
    mesh=mesh,
  )


def collectives(lowered, config: TrainConfig, devices: int = 8) -> list[Collective]:
  """Compiles a step and returns what it sends."""
  return read_collectives(lowered.compile().as_text(), config.mesh.resolve(devices))


def local_shapes(config: TrainConfig) -> list[tuple[int, ...]]:
  """Each parameter's shape on one device."""
  with jax.set_mesh(
    jax.make_mesh(*zip(*[(size, name) for name, size in config.mesh.resolve(8).items()]))
  ):
    params = jax.eval_shape(lambda: init_state(config, TextTask(config))).params
    return [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(params)]


def gathered_matrices(tensor: int) -> list[tuple[int, ...]]:
  """Returns the shapes of a block's matrices, gathered over fsdp and split over `tensor`."""
  NH, KH, F_local = N * H // tensor, K * H // tensor, F // tensor
  attention = [(D, NH), (D, KH), (D, KH), (NH, D)]
  return sorted([*attention, (D, F_local), (D, F_local), (F_local, D)])


def test_each_gradient_crosses_the_data_axis_once_and_in_no_loop(lower_step):
  config = config_on(DATA)
  found = collectives(lower_step(config), config)
  assert {c.kind for c in found} == {"all-reduce"}
  in_loops = [c for c in found if c.depth > 0]
  assert all(c.shape == () for c in in_loops), in_loops  # the two sums of a Weighted, at most
  crossing = collections.Counter(c.shape for c in found if c.depth == 0 and c.shape)
  assert crossing == collections.Counter(local_shapes(config))


@pytest.mark.slow
def test_the_count_notices_gradients_reduced_in_every_layer_of_every_micro_batch(
  lower_step, monkeypatch
):
  monkeypatch.setattr(accumulate, "defer_reduction", lambda params: params)
  config = config_on(DATA)
  found = collectives(lower_step(config), config)
  sizes = collections.Counter(
    math.prod(c.shape) for c in found if c.depth == 2
  )  # the compiler may transpose them
  assert sizes >= collections.Counter(math.prod(shape) for shape in gathered_matrices(tensor=1))


def summary(lower_step, mesh: MeshConfig, accumulate: int) -> str:
  """Returns the line of `GOLDEN` for this mesh: arrays of at least one axis, by kind and loops."""
  config = dataclasses.replace(config_on(MeshConfig()), mesh=mesh, accumulate=accumulate)
  config = dataclasses.replace(config, batch=2 * accumulate * mesh.data * mesh.fsdp)
  devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
  found = collectives(lower_step(config, devices), config, len(devices))
  counts = collections.Counter((c.kind, c.depth) for c in found if c.shape)
  kinds = (
    f"{kind} {' + '.join(str(counts[kind, depth]) for depth in range(3))}"
    for kind in sorted({kind for kind, _ in counts})
  )
  return f"{mesh.describe()}, accumulate {accumulate}: {', '.join(kinds)}"


@pytest.mark.slow
def test_number_and_kind_of_collectives_stay_as_they_are(lower_step):
  lines = [summary(lower_step, mesh, accumulate=1) for mesh in MESHES]
  lines += [summary(lower_step, mesh, accumulate=4) for mesh in (MESHES[0], MESHES[-1])]
  if os.environ.get("WRITE_COLLECTIVES"):
    GOLDEN.write_text("\n".join(lines) + "\n")
  assert lines == GOLDEN.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("compile_as_users_get_it")
def test_the_program_that_users_run_has_the_same(lower_step):
  assert summary(lower_step, MESHES[-1], accumulate=1) in GOLDEN.read_text().splitlines()


@pytest.mark.slow
def test_fsdp_gathers_weights_in_the_layer_loop(lower_step):
  """One copy of the block stands in the loop over layers in the loop over micro-batches."""
  config = config_on(FSDP)
  found = collectives(lower_step(config), config)
  gathers = [c for c in found if c.kind == "all-gather" and c.shape in gathered_matrices(1)]
  assert sorted(c.shape for c in gathers) == gathered_matrices(1)
  assert {c.depth for c in gathers} == {2}
  # of activations FSDP sends the rows of the embedding, once per micro-batch and direction
  assert not [c for c in found if len(c.shape) == 3 and c.shape[0] == 2]
  rows = [c for c in found if c.kind == "all-to-all"]
  assert {(c.depth, c.shape) for c in rows} == {(1, (1, 2, LENGTH, D // 8))}
  assert len(rows) == 2 * 8  # each is written as its 8 parts


@pytest.mark.slow
def test_tensor_sends_two_gathers_and_two_reductions_per_block_and_direction(lower_step):
  """Norms and residuals hold T / tensor positions.

  A block gathers T before attention and before the feed-forward, and sums each output into its part
  of T (reduce-scatter; on CPU an all-reduce). Backward does the same the other way.
  """
  config = config_on(TENSOR)
  found = collectives(lower_step(config), config)
  kinds = collections.Counter((c.kind, c.depth) for c in found if c.shape == (2, LENGTH, D))
  blocks = {("all-gather", 2): 4, ("all-reduce", 2): 4}
  # and before the head, once per micro-batch
  assert kinds == blocks | {("all-gather", 1): 1, ("all-reduce", 1): 1}
  weights = [c for c in found if c.kind == "all-gather" and c.shape in gathered_matrices(2)]
  assert sorted(c.shape for c in weights if c.depth == 2) == gathered_matrices(2)


@pytest.mark.slow
def test_on_tpu_each_gradient_crosses_the_data_axis_once_and_in_no_loop(lower_step, tpu_devices):
  config = config_on(DATA)
  found = collectives(lower_step(config, tpu_devices), config)
  found = [c for c in found if c.shape not in ((), (config.accumulate,))]  # denominators
  assert not [c for c in found if c.depth > 0]
  assert collections.Counter(c.shape for c in found) == collections.Counter(local_shapes(config))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [FSDP, TENSOR], ids=lambda mesh: mesh.describe())
def test_on_tpu_the_gradients_of_a_block_are_reduce_scattered_where_it_makes_them(
  lower_step, tpu_devices, mesh
):
  # smaller arrays than these the compiler does not scatter
  config = config_on(mesh, revise(MODEL, D=128, F=256, H=32, V=384))
  found = collectives(lower_step(config, tpu_devices), config)
  blocks = collections.Counter(
    math.prod(shape[1:]) for shape in local_shapes(config) if len(shape) == 3
  )
  scattered = collections.Counter(
    math.prod(c.shape) for c in found if c.kind == "reduce-scatter" and c.depth == 2
  )
  assert scattered >= blocks
  # a norm's gradient stays unsummed until the end of the step
  norms = [c for c in found if c.shape in ((128,), (MODEL.layers, 128))]
  assert len(norms) == 3 and {c.depth for c in norms} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_on_tpu_fsdp_reduce_scatters_in_the_stated_type_and_gathers_in_the_compute_type(
  lower_step, tpu_devices, dtype, reduce_dtype
):
  # smaller arrays than these the compiler does not scatter
  config = config_on(FSDP, revise(MODEL, D=128, F=256, H=32, V=384))
  compute = dataclasses.replace(config.compute, dtype=dtype, reduce_dtype=reduce_dtype)
  config = dataclasses.replace(config, compute=compute, accumulate=1)
  found = collectives(lower_step(config, tpu_devices), config)
  assert _matrix_types(found, "reduce-scatter") == {_SHORT[reduce_dtype]}
  if dtype == "bfloat16":  # for float32 the compiler rounds before it gathers, as its products do
    assert _matrix_types(found, "all-gather") == {"bf16"}


_SHORT = {"float32": "f32", "bfloat16": "bf16"}


def _matrix_types(found: list[Collective], kind: str) -> set[str]:
  """Returns the element types of these collectives of matrices inside the loop over layers."""
  return {c.dtype for c in found if c.kind == kind and c.depth and len(c.shape) > 1}
