"""The kernels in the simulator of a TPU, and compiled ahead of time for four of them."""

# R rows, W width of the rotated axis
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CORES
from pallas_kernels.hadamard import hadamard, hadamard_quantize
from pallas_kernels.schedule.compiler import compile_for
from tests.pallas_kernels.hadamard.values_test import relative, same_codes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]


@pytest.mark.parametrize("cores, seed", [(1, 0), (2, 1)])
def test_simulated(cores, seed):
  """Three blocks of rows, the last one ragged; two chunks a rotation; the same bits twice."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  rng = np.random.default_rng()
  x_RW = jnp.asarray(rng.normal(size=(300, 256)), jnp.bfloat16 if seed else jnp.float32)
  signs_W = jnp.asarray(rng.choice([-1, 1], 256), jnp.int8)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def run(x_RW, implementation, interpret):
    options = dict(signs=signs_W, implementation=implementation, interpret=interpret)
    quantize = functools.partial(hadamard_quantize, group=128, **options)
    return (
      *jax.value_and_grad(lambda x: jnp.sum(jnp.sin(hadamard(x, **options))))(x_RW),
      quantize(x_RW, dtype="int8"),
      quantize(x_RW, dtype="int4", scale="quest"),
    )

  try:
    got = jax.block_until_ready(run(x_RW, "pallas_tpu", simulator))
    again = jax.block_until_ready(run(x_RW, "pallas_tpu", simulator))
    assert not interpret_pallas_call.races.races_found
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  chex.assert_trees_all_equal(got, again)
  want = run(x_RW, "reference", False)
  assert relative(got[0], want[0]) < 1e-3 and relative(got[1], want[1]) < 5e-3
  same_codes(got[2], want[2])
  same_codes(got[3], want[3])
  assert np.mean(np.asarray(got[3].trust_mask) != np.asarray(want[3].trust_mask)) < 1e-4


@pytest.mark.parametrize("chip", CORES)
def test_compiled(chip):
  """Codes and scales are the only memory; on one, base 28, signs, masks and noise compile too."""
  pytest.importorskip("libtpu")
  named = dict(implementation="pallas_tpu")
  x_RW = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)
  dtype = "e4m3fn" if chip == "tpu7x" else "int8"

  def codes(x_RW):
    return hadamard_quantize(x_RW, group=128, dtype=dtype, block=128, **named)[:2]

  assert compile_for(codes, (x_RW,), chip).memory_analysis().temp_size_in_bytes < 2**20
  if chip != "v5e":
    return
  narrow = jax.ShapeDtypeStruct((200, 28 * 128), jnp.float32)

  def others(x_RW, signs_W):
    options = dict(signs=signs_W, base=28, group=256, **named)
    quest = functools.partial(hadamard_quantize, dtype="int4", scale="quest", values=True)
    key = jax.random.key(0)
    return (
      jax.grad(lambda x: jnp.sum(quest(x, **options)))(x_RW),
      hadamard_quantize(x_RW, dtype="int8", rounding="stochastic", key=key, **options)[:2],
    )

  compile_for(others, (narrow, jax.ShapeDtypeStruct((28 * 128,), jnp.int8)), chip)
