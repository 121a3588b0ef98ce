"""Compiles the TPU kernel ahead of time for four chips, and bounds its memory."""

# N tokens, D model, V vocabulary
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.chips import CORES
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.schedule.compiler import chip_mesh, compile_for

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow
MEBI = 2**20
GEMMA = dict(N=8192, D=2304, V=256_000, dtype=jnp.bfloat16)


def problem(N, D, V, dtype, layout="vd"):
  shape = (V, D) if layout == "vd" else (D, V)
  arrays = ((N, D), dtype), (shape, dtype), ((N,), jnp.int32), ((V,), jnp.float32)
  return tuple(jax.ShapeDtypeStruct(*array) for array in arrays)


def loss(e_ND, c, labels_N, bias_V=None, **options):
  return linear_cross_entropy(
    e_ND, c, labels_N, bias_V=bias_V, implementation="pallas_tpu", **options
  )


@pytest.mark.parametrize("chip, layout", [*((chip, "vd") for chip in CORES), ("v6e", "dv")])
def test_memory_at_the_shape_of_gemma(chip, layout):
  args = problem(**GEMMA, layout=layout)[:3]
  forward = compile_for(
    lambda *args: loss(*args, classifier_layout=layout), args, chip
  ).memory_analysis()
  assert forward.temp_size_in_bytes <= 10 * MEBI
  gradients = jax.grad(lambda *args: loss(*args, classifier_layout=layout), (0, 1))
  backward = compile_for(gradients, args, chip).memory_analysis()
  float32_gradients = 4 * (GEMMA["N"] + GEMMA["V"]) * GEMMA["D"]
  assert backward.temp_size_in_bytes <= float32_gradients + 16 * MEBI


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_odd_sizes_and_every_option_compile(chip):
  options = dict(softcap=30.0, temperature=0.7, label_smoothing=0.1, z_loss=1e-4)
  compile_for(
    jax.grad(lambda *args: loss(*args, **options), (0, 1, 3)),
    problem(1000, 100, 5025, jnp.float32),
    chip,
  )


def test_filters_and_sorting_compile():
  options = dict(filter_e="auto", filter_c="auto", sort_vocabulary=True)
  compile_for(
    jax.grad(lambda *args: loss(*args, **options), (0, 1, 3)),
    problem(2000, 256, 9000, jnp.bfloat16),
    "v5e",
  )


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_vocabulary_split_over_chips(chip):
  """The kernel runs under shard_map on an Explicit mesh; what is reduced are rows and gradients."""
  mesh = chip_mesh(chip, (1, 4), ("data", "tensor"))
  specs = P("data", None), P("tensor", None), P("data")
  args = [
    jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    for a, spec in zip(problem(4096, 512, 32_768, jnp.bfloat16), specs)
  ]
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
  assert "tpu_custom_call" in compiled.as_text() and "all-gather" not in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * (4096 + 32_768 // 4) * 512 * 1.5


def test_it_is_the_default_on_tpu_and_not_for_bytes():
  for V, used in ((32_768, True), (256, False)):
    args = problem(1024, 256, V, jnp.bfloat16)[:3]
    text = compile_for(linear_cross_entropy, args, "v5e").as_text()
    assert ("linear_cross_entropy_forward" in text) == used
