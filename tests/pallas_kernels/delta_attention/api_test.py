"""What `delta_attention` refuses, its defaults, and one step of it."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.errors import UserError
from pallas_kernels.delta_attention import delta_attention, delta_step

B, T, H, N, K, V = 2, 6, 1, 2, 4, 3
Q, VALUES = np.ones((B, T, H, K), np.float32), np.ones((B, T, N, V), np.float32)
GATE_BTN = np.zeros((B, T, N), np.float32)
A_LOG_N = np.zeros(N, np.float32)
IDS = np.zeros((B, T), np.int32)
SOFT = dict(gate="softplus", decay=GATE_BTN, a_log_N=A_LOG_N)
REFUSED = {
  "rank": (dict(q_BTHK=Q[0]), r"q_BTHK.shape=\(6, 1, 4\): must be \(any, any, any, any\)"),
  "keys": (dict(k_BTHK=Q[..., :3]), r"k_BTHK.shape=\(2, 6, 1, 3\): must be \(2, 6, 1, 4\)"),
  "length of values": (dict(v_BTNV=VALUES[:, :5]), r"v_BTNV.shape=.*must be \(2, 6, any, any\)"),
  "heads": (
    dict(q_BTHK=np.ones((B, T, 3, K), np.float32), k_BTHK=np.ones((B, T, 3, K), np.float32)),
    "v_BTNV.shape=.*its N=2 must be a multiple of H=3",
  ),
  "no width": (dict(v_BTNV=VALUES[..., :0]), "v_BTNV.shape=.*needs a head and a width"),
  "too wide": (
    dict(q_BTHK=np.ones((1, 1, 1, 257)), k_BTHK=np.ones((1, 1, 1, 257)), v_BTNV=VALUES[:1, :1]),
    "q_BTHK.shape=.*K=257 may be at most 256",
  ),
  "dtype": (dict(k_BTHK=jnp.ones(Q.shape, jnp.bfloat16)), "k_BTHK.dtype='bfloat16': must be"),
  "integers": (dict(q_BTHK=Q.astype(int)), "q_BTHK.dtype='int32': must be floating"),
  "decay": (dict(decay=GATE_BTN[:, :5]), r"decay.shape=\(2, 5, 2\): must be \(2, 6, 2\)"),
  "width of decay": (dict(decay=VALUES), r"decay.shape=\(2, 6, 2, 3\): must be \(2, 6, 2, 4\)"),
  "growth": (dict(decay=GATE_BTN + 0.5), "decay=0.5: a log decay must be at most 0"),
  "erase": (dict(erase=VALUES), r"erase.shape=\(2, 6, 2, 3\): must be \(2, 6, 2, 4\)"),
  "write": (dict(write=GATE_BTN[0]), r"write.shape=\(6, 2\): must be"),
  "integer gate": (dict(write=IDS[..., None]), "write.dtype='int32': must be floating"),
  "gate": (dict(gate="exp"), "gate='exp': must be one of None, 'softplus', 'lower_bound'"),
  "gate of nothing": (SOFT | dict(decay=None), "decay=None: gate='softplus' makes the decay of it"),
  "gate without a_log": (SOFT | dict(a_log_N=None), "a_log_N=None: gate='softplus' needs it"),
  "a_log without gate": (dict(a_log_N=A_LOG_N), "a_log_N=.*belongs to gate="),
  "bias without gate": (dict(dt_bias=A_LOG_N), "dt_bias=.*belongs to gate="),
  "a_log": (SOFT | dict(a_log_N=A_LOG_N[:1]), r"a_log_N.shape=\(1,\): must be \(2,\)"),
  "bias": (SOFT | dict(dt_bias=Q[0, 0]), r"dt_bias.shape=\(1, 4\): must be \(2, 1\)"),
  "bound": (dict(lower_bound=-5.5), "lower_bound=-5.5: must be at least -5.0"),
  "bound of 0": (dict(lower_bound=0.0), "lower_bound=0.0: must be below 0"),
  "scale": (dict(scale=float("nan")), "scale=nan: must be a finite number"),
  "state": (dict(initial_state_BNKV=np.zeros((B, N, V, K))), r"initial_state_BNKV.shape=.*2, 4, 3"),
  "segments": (dict(segment_ids_BT=IDS[:, :5]), r"segment_ids_BT.shape=\(2, 5\): must be \(2, 6\)"),
  "kind of segments": (dict(segment_ids_BT=IDS * 1.0), "segment_ids_BT.dtype='float.*integer"),
  "implementation": (dict(implementation="cuda"), "implementation='cuda': must be one of None"),
  "interpret": (dict(interpret=True), "interpret=True: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_runs(case):
  keywords, message = REFUSED[case]
  with pytest.raises(UserError, match=message):
    delta_attention(**{"q_BTHK": Q, "k_BTHK": Q, "v_BTNV": VALUES, **keywords})


@pytest.mark.parametrize("shape", [(0, T), (B, 0)])
def test_nothing_in_is_nothing_out(shape):
  q, v = np.zeros((*shape, H, K), np.float32), np.zeros((*shape, N, V), np.float32)
  start = np.ones((shape[0], N, K, V), np.float32)
  o, state = delta_attention(q, q, v, initial_state_BNKV=start, return_state=True)
  chex.assert_trees_all_equal((o, state), (jnp.asarray(v), jnp.asarray(start)))


def random_call():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  arrays = dict(q=draw(B, T, H, K), k=draw(B, T, H, K), v=draw(B, T, N, V))
  gates = dict(decay=draw(B, T, N, K), erase=draw(B, T, N), write=draw(B, T, N, V))
  rest = dict(gate="softplus", a_log_N=draw(N), dt_bias=draw(N, K), l2norm=True)
  return arrays, gates, rest, draw(B, N, K, V)


def test_steps_are_the_whole_sequence():
  arrays, gates, rest, state = random_call()
  whole = dict(zip(("q_BTHK", "k_BTHK", "v_BTNV"), arrays.values()))
  want, last = delta_attention(
    **whole,
    **gates,
    **rest,
    initial_state_BNKV=state,
    return_state=True,
    implementation="reference",
  )

  @jax.jit
  def step(state, token):
    arrays, gates = token
    return delta_step(*(arrays[name] for name in "qkv"), state, **gates, **rest)[::-1]

  for t in range(T):
    state, o = step(state, jax.tree.map(lambda x: x[:, t], (arrays, gates)))  # noqa: B023
    chex.assert_trees_all_close(o, want[:, t], atol=1e-6)
  chex.assert_trees_all_close(state, last, atol=1e-6)


def test_gates_are_off_by_default():
  """What is left is linear attention, with a scale of K^-1/2."""
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, B, T, H, K)).astype(np.float32)
  v = rng.normal(size=(B, T, N, V)).astype(np.float32)
  weights_BNTS = np.tril(np.einsum("bthk,bshk->bhts", q, k)) * K**-0.5
  o = delta_attention(q, k, v, implementation="reference")
  want = np.einsum("bts,bsnv->btnv", weights_BNTS[:, 0], v)
  chex.assert_trees_all_close(o, want.astype(np.float32), atol=1e-5)
