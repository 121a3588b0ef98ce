"""The TPU kernels: values and gradients interpreted, in the simulator, and compiled for four chips.

The simulator fills what was not written with NaN, raises on reads out of bounds, and records two
accesses to one place that nothing orders.
"""

# B batch, T query positions, N query heads, K key heads, H width of queries and keys,
# U width of values, I selected blocks of a query
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.chips import CORES
from pallas_kernels.schedule.compiler import compile_for
from pallas_kernels.sparse_attention import (
  KeysValues,
  block_starts,
  compress_mean,
  nsa_attention,
  nsa_selected_attention,
  pairs,
  pallas_tpu,
  unions,
)
from pallas_kernels.sparse_attention.places import make_places

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CASES = {
  "several query blocks": dict(T=70),
  "one position": dict(T=1),
  "packed": dict(T=40, packed=True),
  "12 heads a group": dict(T=40, N=12, K=1),
  "one head a group, every block": dict(T=40, N=2, K=2, I=5),
  "larger blocks": dict(T=70, block=32, packed=True),
  "one tile of keys is not enough": dict(T=400, B=1, N=2, K=1, I=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_cases_interpreted(name, run, expected, assert_close):
  assert_close(run(CASES[name], "pallas_tpu", interpret=True), expected(CASES[name]), 1e-5)


@pytest.fixture
def gradients_apart(monkeypatch):
  """Takes the backward pass of keys whose gradients do not fit in VMEM."""

  def make_plan(*args):
    return plan_of(*args)._replace(together=False)

  plan_of = pallas_tpu.make_plan
  monkeypatch.setattr(pallas_tpu, "make_plan", make_plan)
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "12 heads a group"])
@pytest.mark.usefixtures("gradients_apart")
def test_gradients_apart_interpreted(name, run, expected, assert_close):
  assert_close(run(CASES[name], "pallas_tpu", interpret=True), expected(CASES[name]), 1e-5)


@pytest.mark.slow
def test_bfloat16_and_negative_scale(case, run, expected, assert_close):
  call = dict(T=40, H=64, U=64)
  arrays = case(**call).arrays(jnp.bfloat16)
  got = run(call, "pallas_tpu", arrays, interpret=True)
  assert_close(got, expected(call, arrays), 4e-3, 6e-3)
  options = dict(scale=-0.3)
  got = run(call, "pallas_tpu", interpret=True, **options)
  assert_close(got, run(call, "reference", **options), 1e-5)


def assert_bad_numbers_stay(case, run, assert_nan_only_where_it_belongs):
  """Queries of one query block have chosen different blocks."""
  arrays, lists_BTKI = case(T=70).bad(queries=70)
  got = run(dict(T=70), "pallas_tpu", arrays, lists_BTKI, interpret=True)
  assert_nan_only_where_it_belongs(got, dict(T=70), arrays, lists_BTKI)


@pytest.mark.slow
def test_nan_goes_where_it_belongs_and_nowhere_else(case, run, assert_nan_only_where_it_belongs):
  assert_bad_numbers_stay(case, run, assert_nan_only_where_it_belongs)


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_apart")
def test_nan_goes_where_it_belongs_with_gradients_apart(
  case, run, assert_nan_only_where_it_belongs
):
  assert_bad_numbers_stay(case, run, assert_nan_only_where_it_belongs)


@pytest.mark.slow
def test_empty_lists_blocks_that_nobody_selected_and_huge_keys(case, run, expected, assert_close):
  """Lists of the first row's first 30 queries are empty; nobody selects block 1; one key is 1e4."""
  q_BTNH, k_BSKH, v_BSKU, *rest = case(T=70).arrays()
  k_BSKH[:, 5] *= 1e4
  arrays = (q_BTNH, k_BSKH, v_BSKU, *rest)
  lists_BTKI = np.tile(np.array([2, 0, -1], np.int32), (2, 70, 2, 1))
  lists_BTKI[0, :30] = -1
  got = run(dict(T=70), "pallas_tpu", arrays, lists_BTKI, interpret=True)
  # float32 holds a logit of 1e4 to 1e-3, and the gradients make it again
  assert_close(got, expected(dict(T=70), arrays, lists_BTKI), 1e-5, 2e-3)
  assert np.all(np.asarray(got["o"])[0, :30] == 0) and np.all(np.isneginf(got["lse"][0, :30]))
  for key in ("dk", "dv"):
    reached_S = np.any(np.asarray(got[key]) != 0, axis=(0, 2, 3))
    assert not np.any(reached_S[16:32]) and not np.any(reached_S[48:]), key


def simulate(cores, seed, run, expected, assert_close):
  """Aligned blocks (seed 0) or blocks anywhere; the grid's order is shuffled by the seed."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are recorded

  simulator = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    random_seed=seed,
    num_cores_or_threads=cores,
    dma_execution_mode="on_wait" if seed else "eager",
  )
  case = dict(T=20, B=1, packed=bool(seed))
  try:
    got = jax.block_until_ready(run(case, "pallas_tpu", interpret=simulator))
    assert not interpret_pallas_call.races.races_found
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  assert_close(got, expected(case), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cores, seed", [(1, 0), (2, 1)])
def test_simulator(cores, seed, run, expected, assert_close):
  simulate(cores, seed, run, expected, assert_close)


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_apart")
def test_gradients_apart_in_the_simulator(run, expected, assert_close):
  simulate(2, 1, run, expected, assert_close)


def test_unions_and_their_inverse_are_the_lists(case):
  made = case(T=70, packed=True)
  places = make_places(70, 70, None, made.segment_ids())
  start_BTKI = pairs.selected_starts(jnp.asarray(made.lists()), places, 70, 16)
  lists = unions.make_unions(start_BTKI, places, 70, 16, 40, 2)  # two words of bits
  inverse = unions.invert(lists, 70, 16)
  start_AXU, bits_AXUW = np.asarray(lists.start_AXU), np.asarray(lists.bits_AXUW).astype(np.uint32)
  (A, X, _), E = start_AXU.shape, unions.entries_of_row(2)
  rows = np.asarray(inverse.rows).reshape(A, -1, unions.ROW)[..., : E * 4].reshape(A, -1, 4)
  for a in range(A):
    b, k = divmod(a, 2)
    wanted = {(t, s) for t in range(70) for s in np.asarray(start_BTKI)[b, t, k].tolist() if s < 70}
    got, touching = set(), {j: set() for j in range(5)}
    for x in range(X):
      for u in range(int(lists.count_AX[a, x])):
        start = int(start_AXU[a, x, u])
        members = [q for q in range(40) if bits_AXUW[a, x, u, q // 32] >> (q % 32) & 1]
        got |= {(40 * x + q, start) for q in members}
        for j in {start // 16, min((start + 15) // 16, 4)}:
          touching[j].add((x, start))
    assert got == wanted
    for j in range(5):
      entries = rows[a, int(inverse.first_AJ[a, j]) : int(inverse.last_AJ[a, j])]
      assert touching[j] <= {(int(x), int(start)) for x, start, *_ in entries}


def compiled(chip, T, N, K, H, U, I, dtype, packed=False):
  """Compiles forward and backward of the paper's blocks for one chip."""
  shapes = [((1, T, heads, width), dtype) for heads, width in ((N, H), (K, H), (K, U))]
  ints = [((1, T, K, I), jnp.int32), ((1, T), jnp.int32)]
  args = [jax.ShapeDtypeStruct(*array) for array in (*shapes, *ints)]

  def loss(q, k, v, lists, ids):
    o, lse = nsa_selected_attention(
      q, k, v, lists, segment_ids_BS=ids if packed else None, implementation="pallas_tpu"
    )
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(lse)

  return compile_for(jax.grad(loss, (0, 1, 2)), args, chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CORES)
def test_it_compiles_for(chip):
  """With 4 blocks a query, and with the paper's 16 where there is least VMEM."""
  pytest.importorskip("libtpu")
  T, I = (2048, 16) if chip == "v5p" else (512, 4)
  text = compiled(chip, T, 16, 1, 128, 128, I, jnp.bfloat16).as_text()
  assert "nsa_selected_forward" in text and "nsa_selected_gradients" in text


@pytest.mark.slow
def test_all_branches_compile_together():
  """With segments; the window is that of the library's kernel."""
  pytest.importorskip("libtpu")
  T, N, K, H = 640, 16, 1, 128

  def attend(q, k, v, gates, ids):
    starts_BC = block_starts(T, length=32, stride=16, segment_ids_BS=ids)
    blocks = (compress_mean(x, starts_BC, length=32) for x in (k, v))
    pair = KeysValues(k, v)
    return nsa_attention(q, KeysValues(*blocks), pair, pair, gates, segment_ids_BS=ids)

  shapes = [((1, T, *rest), jnp.bfloat16) for rest in ((N, H), (K, H), (K, H), (N, 3))]
  args = [jax.ShapeDtypeStruct(*array) for array in (*shapes, ((1, T), jnp.int32))]
  text = compile_for(attend, args, "tpu7x").as_text()
  assert "nsa_selected_forward" in text and "splash_mha_fwd" in text


@pytest.mark.slow
def test_odd_sizes_compile():
  pytest.importorskip("libtpu")
  compiled("v5e", 300, 12, 1, 192, 100, 3, jnp.float32, packed=True)


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_apart")
def test_gradients_apart_compile():
  pytest.importorskip("libtpu")
  text = compiled("v5p", 512, 16, 1, 128, 128, 4, jnp.bfloat16).as_text()
  assert "nsa_selected_dq" in text and "nsa_selected_dkv" in text
