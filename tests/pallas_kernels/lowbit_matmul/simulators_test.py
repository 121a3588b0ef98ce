"""The kernel in the simulator of a TPU, and compiled ahead of time for four of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CORES
from pallas_kernels.lowbit_matmul import lowbit_matmul
from pallas_kernels.lowbit_matmul.packing import FORMATS
from pallas_kernels.lowbit_matmul.pallas_tpu import unit_size
from pallas_kernels.schedule.compiler import compile_for
from tests.pallas_kernels.lowbit_matmul.values_test import Case, relative

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]


@pytest.mark.parametrize("cores, seed", [(1, 0), (2, 1)])
def test_simulated(cores, seed):
  """Two blocks of columns, the last one ragged; the same bits twice."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  case = Case(("int4", "binary")[seed], K=512, N=200, group=64, M=20)
  arrays, zeros_GN, _, w_KN = case.problem()
  multiply = functools.partial(lowbit_matmul, dtype=case.dtype, group=case.group)
  run = jax.jit(functools.partial(multiply, implementation="pallas_tpu", interpret=simulator))
  try:
    got = jax.block_until_ready(run(*arrays, zeros_GN=zeros_GN))
    again = jax.block_until_ready(run(*arrays, zeros_GN=zeros_GN))
    assert not interpret_pallas_call.races.races_found
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  np.testing.assert_array_equal(got, again)
  assert relative(got, np.float64(arrays[0]) @ w_KN) < 2e-6


@pytest.mark.parametrize("chip", CORES)
def test_compiled(chip):
  """Every format, a K that no unit divides, zero points, float32.

  Beside 2 MiB at most the packed weights are copied, as v5p and tpu7x do where N is ragged.
  """
  pytest.importorskip("libtpu")
  named = dict(implementation="pallas_tpu")
  for dtype, form in FORMATS.items():
    M, K, N = 16, 2560, 1000
    arrays = ((M, K), jnp.bfloat16), (form.bytes_of(K), N), (K // 128, N)
    args = [
      jax.ShapeDtypeStruct(*arrays[0]),
      jax.ShapeDtypeStruct(arrays[1], jnp.uint8),
      jax.ShapeDtypeStruct(arrays[2], jnp.float32),
    ]
    multiply = functools.partial(lowbit_matmul, dtype=dtype, group=128, **named)
    memory = compile_for(multiply, args, chip).memory_analysis()
    x_bytes = 2 * M * K * unit_size(form) // 128  # one X for each group of a unit
    assert memory.temp_size_in_bytes < 2**21 + x_bytes + form.bytes_of(K) * 1024  # whole lanes
  odd = [
    jax.ShapeDtypeStruct((300, 1000), jnp.float32),
    jax.ShapeDtypeStruct((500, 200), jnp.uint8),
    *(jax.ShapeDtypeStruct((32, 200), jnp.float32),) * 2,
  ]
  compile_for(
    lambda x, packed, scales, zeros: lowbit_matmul(
      x, packed, scales, dtype="int4", group=32, zeros_GN=zeros, **named
    ),
    odd,
    chip,
  )
