"""The TPU kernels in the simulator of the chip: races, poisoned memory, grid order, cores."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import pytest
from jax.experimental.pallas import tpu as pltpu

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_in_less_time")]


@pytest.mark.parametrize("cores, seed", [(1, 0), (2, 1)])
def test_forward_and_backward(cores, seed, Case, run, recur, assert_close):
  """Two rows, two groups of heads, two chunks of which the last is ragged."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,  # of the order of parallel grid axes
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  arrays = Case(T=100, N=2, V=8, segments=True).arrays()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("pallas_kernels.delta_attention.pallas_tpu.FORWARD_HEADS", 1)
    patch.setattr("pallas_kernels.delta_attention.pallas_tpu.BACKWARD_HEADS", 2)  # 1 in float32
    try:
      got = run(arrays, "pallas_tpu", interpret=simulator)
      assert not interpret_pallas_call.races.races_found
    except Exception:
      pltpu.reset_tpu_interpret_mode_state()
      raise
  assert_close(got, recur(arrays))
