"""Output, final state and every gradient against the recurrence in float64."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.delta_attention import delta_attention

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

CHUNKED = ["xla"]
GATES = "decay", "erase", "write"
SHAPES = {
  "one position": dict(T=1),
  "segments, grouped": dict(segments=True),
  "one decay for a head": dict(T=70, decay="heads", segments=True),
  "gates of channels": dict(T=70, erase="channels", write="channels"),
}
MORE = {
  "63": dict(T=63),
  "64": dict(T=64),
  "65, as many heads": dict(T=65, H=2, K=8, V=8),
  "1000": dict(T=1000, B=1),
  "width 60": dict(T=100, K=60, V=40),
  "width 100": dict(T=100, K=100, V=128, H=2, N=4, segments=True),
  "width 256": dict(T=100, K=256, V=64),
  "no decay, segments": dict(T=70, decay=None, segments=True),
  "no erasing": dict(T=70, erase=None, write=None),
  "nothing but keys and values": dict(decay=None, erase=None, write=None),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("implementation", CHUNKED)
def test_is_the_recurrence(case, implementation, Case, run, recur, assert_close):
  arrays = Case(**SHAPES[case]).arrays()
  assert_close(run(arrays, implementation), recur(arrays))


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("implementation", CHUNKED)
def test_is_the_recurrence_at_other_lengths_and_widths(
  case, implementation, Case, run, recur, assert_close
):
  arrays = Case(**MORE[case]).arrays()
  assert_close(run(arrays, implementation), recur(arrays))


def test_reference_is_the_recurrence(Case, run, recur, assert_close):
  arrays = Case(segments=True).arrays()
  assert_close(run(arrays, "reference"), recur(arrays))


def unusual(arrays, case):
  """Returns the arrays with unusual values, in the same shapes."""
  rng = np.random.default_rng(1)
  arrays = dict(arrays)
  decay, erase = arrays["decay"], arrays["erase"]
  if case.startswith("decay "):
    arrays["decay"] = np.full_like(decay, float(case.removeprefix("decay ")))
  if case == "some wiped":
    sizes = np.array([0, 1e-3, 1.0, 20.0, 1e4], np.float32)
    arrays["decay"] = -rng.choice(sizes, decay.shape)
  if case == "nothing erased or written":
    arrays["erase"] = arrays["write"] = np.zeros_like(erase)
  if case == "erased twice":
    arrays["erase"] = arrays["write"] = np.full_like(erase, 2)
  if case == "one key":
    arrays["k"] = np.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
    arrays["erase"] = arrays["write"] = np.ones_like(erase)
    arrays["decay"] = np.zeros_like(decay)
  return arrays


UNUSUAL = ["decay 0", "decay -5", "decay -20", "decay -1e4", "some wiped"]
UNUSUAL += ["nothing erased or written", "erased twice", "one key"]


@pytest.mark.parametrize("case", UNUSUAL)
@pytest.mark.parametrize("implementation", CHUNKED)
def test_unusual_gates(case, implementation, Case, run, recur, assert_close):
  arrays = unusual(Case(segments=True).arrays(), case)
  assert_close(run(arrays, implementation), recur(arrays))


@pytest.mark.parametrize("implementation", CHUNKED)
def test_what_was_written_is_recalled_exactly(implementation):
  """Beta 1 and orthonormal keys: S^T k is v; a key that comes again has its last value."""
  K, V = 32, 8
  rng = np.random.default_rng(0)
  keys_KK = np.linalg.qr(rng.normal(size=(K, K)))[0]
  k_BTHK = np.concatenate([keys_KK, keys_KK[:5]])[None, :, None].astype(np.float32)
  v_BTNV = rng.normal(size=(1, K + 5, 1, V)).astype(np.float32)
  beta_BTN = np.ones((1, K + 5, 1), np.float32)
  arrays = k_BTHK, k_BTHK, v_BTNV
  attend = functools.partial(delta_attention, scale=1.0, return_state=True)
  attend = jax.jit(functools.partial(attend, implementation=implementation))
  o_BTNV, state_BNKV = attend(*arrays, erase=beta_BTN, write=beta_BTN)
  chex.assert_trees_all_close(o_BTNV, v_BTNV, atol=2e-6)
  last_KV = np.concatenate([v_BTNV[0, K:, 0], v_BTNV[0, 5:K, 0]])
  chex.assert_trees_all_close(keys_KK @ np.asarray(state_BNKV[0, 0]), last_KV, atol=2e-6)


@pytest.mark.parametrize("gate", ["lower_bound", pytest.param("softplus", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_norm_and_gates_are_those_of_the_reference(
  implementation, gate, Case, run, recur, assert_close
):
  """With a key of 0, whose norm is 0."""
  arrays = Case(segments=True).arrays()
  rng = np.random.default_rng(0)
  arrays["decay"] = 3 * rng.normal(size=arrays["decay"].shape).astype(np.float32)
  arrays["k"][:, 3] = 0
  arrays["a_log_N"] = rng.uniform(0, 1, 2).astype(np.float32)
  arrays["dt_bias"] = rng.normal(size=(2, 20)).astype(np.float32)
  want = run(arrays, "reference", gate=gate, l2norm=True)
  assert_close(run(arrays, implementation, gate=gate, l2norm=True), want)
  x, rate_N1 = arrays["decay"] + arrays["dt_bias"], np.exp(arrays["a_log_N"])[:, None]
  if gate == "softplus":
    decay = -rate_N1 * np.logaddexp(0, x)
  else:
    decay = -5 / (1 + np.exp(-rate_N1 * x))
  plain = {name: a for name, a in arrays.items() if name not in ("a_log_N", "dt_bias")}
  for name in "qk":
    plain[name] = arrays[name] / np.sqrt(np.sum(arrays[name] ** 2, -1, keepdims=True) + 1e-6)
  plain["decay"] = decay.astype(np.float32)
  assert_close({"o": want["o"]}, {"o": recur(plain)["o"]})


BFLOAT16 = dict(o=6e-3, state=6e-3, dq=1e-2, dk=1e-2, dv=1e-2, derase=2e-2, dwrite=2e-2)
BFLOAT16 |= dict(ddecay=2e-2, dstate=1e-2)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_bfloat16(implementation, Case, run, recur, assert_close):
  arrays = Case(segments=True).arrays(jnp.bfloat16)
  got = run(arrays, implementation)
  assert got["o"].dtype == got["dq"].dtype == jnp.bfloat16 and got["state"].dtype == np.float32
  assert_close(got, recur(arrays), BFLOAT16)
  assert np.linalg.norm(np.float64(got["o"]) - recur(arrays)["o"]) > 1e-3 * np.linalg.norm(got["o"])


def test_gradients_in_float64(Case):
  """By finite differences of the reference and of what has its own backward pass."""
  with jax.enable_x64(True):
    arrays = Case(T=5, B=1, K=3, V=2).arrays(np.float64)
    names = "q", "k", "v", "decay", "erase", "write", "state"

    def attend(*values):
      q, k, v, decay, erase, write, state = values
      gates = dict(decay=decay, erase=erase[..., 0], write=write[..., 0], l2norm=True)
      more = dict(initial_state_BNKV=state, return_state=True, implementation="xla")
      return delta_attention(q, k, v, **gates, **more)

    check_grads(jax.jit(attend), [arrays[name] for name in names], order=1, modes=["rev"])


@pytest.mark.parametrize("implementation", ["reference", *CHUNKED])
def test_two_halves_are_the_whole_and_padding_is_not_seen(implementation, Case):
  x = Case(T=100).arrays()
  gates = {name: x[name] if name == "decay" else x[name][..., 0] for name in GATES}

  @jax.jit
  def attend(state, part):
    q, k, v = (part[name] for name in "qkv")
    gates = {name: part[name] for name in GATES}
    options = dict(return_state=True, implementation=implementation)
    return delta_attention(q, k, v, **gates, initial_state_BNKV=state, **options)

  whole = {name: x[name] for name in "qkv"} | gates
  o_BTNV, last_BNKV = attend(x["state"], whole)
  state_BNKV, pieces = x["state"], []
  for start in (0, 50):
    part = {name: a[:, start : start + 50] for name, a in whole.items()}
    piece_BTNV, state_BNKV = attend(state_BNKV, part)
    pieces.append(piece_BTNV)
  chex.assert_trees_all_close(jnp.concatenate(pieces, axis=1), o_BTNV, atol=1e-5)
  chex.assert_trees_all_close(state_BNKV, last_BNKV, atol=1e-5)


@pytest.mark.slow
def test_a_gradient_of_one_run_maps_with_the_default_program(Case):
  """In sums over axes of 1 XLA has ended the process, on jax 0.10.2."""
  arrays = {name: x[None] for name, x in Case(T=64, B=1, N=1, K=16, V=16).arrays().items()}

  def loss(x):
    gates = dict(decay=x["decay"], erase=x["erase"][..., 0], write=x["write"][..., 0])
    return jnp.sum(delta_attention(x["q"], x["k"], x["v"], **gates, implementation="xla") ** 2)

  mapped = jax.jit(jax.vmap(jax.grad(loss)))(arrays)
  single = jax.jit(jax.grad(loss))(jax.tree.map(lambda x: x[0], arrays))
  for name in ("q", "k", "v", *GATES):
    chex.assert_trees_all_close(mapped[name][0], single[name], rtol=1e-4, atol=1e-5)


def test_two_runs_give_the_same_bits(Case, run):
  arrays = Case(segments=True).arrays()
  chex.assert_trees_all_equal(run(arrays, "xla"), run(arrays, "xla"))


@pytest.mark.slow
def test_compiled_memory_is_linear_in_length():
  """Beside what is as long as the inputs, forward and backward hold a state for each chunk."""
  K, sizes = 32, []

  def loss(q, k, v, decay, beta):
    o_BTNV = delta_attention(q, k, v, decay=decay, erase=beta, write=beta, implementation="xla")
    return jnp.sum(o_BTNV**2)

  for T in (4096, 16_384):
    x, gate = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, 2, K), (1, T, 2)))
    compiled = jax.jit(jax.grad(loss, range(5))).lower(x, x, x, x, gate).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[1] < 4.2 * sizes[0] and sizes[1] < 12 * 4 * x.size
