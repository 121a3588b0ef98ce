"""Compiles the TPU kernels ahead of time for four chips, and bounds their memory."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.chips import CORES
from pallas_kernels.delta_attention import delta_attention, kimi_delta_attention
from pallas_kernels.schedule.compiler import compile_for

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow


def struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("chip", CORES)
def test_gradients_compile_within_memory(chip):
  """Two heads of Kimi Linear; saved are states at the chunks' starts and half as much of pairs.

  What runs head by head holds half of the arrays here, where there are two heads.
  """
  B, T, N, K = 1, 4096, 2, 128

  def loss(q, k, v, decay, beta, a_log_N, dt_bias):
    gates = dict(gate="softplus", a_log_N=a_log_N, dt_bias=dt_bias)
    o = kimi_delta_attention(q, k, v, decay, beta, **gates, implementation="pallas_tpu")
    return jnp.sum(o.astype(jnp.float32) ** 2)

  x, f32 = struct(B, T, N, K), jnp.float32
  args = (x, x, x, x, struct(B, T, N), struct(N, dtype=f32), struct(N, K, dtype=f32))
  program = compile_for(jax.grad(loss, tuple(range(7))), args, chip)
  # forward and backward, and both head by head, which bad numbers need
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 4
  states = 2 * B * N * K * K * T // 64
  assert program.memory_analysis().temp_size_in_bytes < 1.5 * states + 14 * x.size * 2


def test_odd_sizes_and_every_option_compile():
  """Float32, three heads, K and V that fill no lane, gates of channels, segments, states."""
  B, T, N, K, V, f32 = 2, 100, 3, 60, 20, jnp.float32

  def loss(q, v, decay, erase, write, a_log_N, state, ids):
    o, state = delta_attention(
      q,
      q,
      v,
      decay=decay,
      erase=erase,
      write=write,
      gate="lower_bound",
      a_log_N=a_log_N,
      l2norm=True,
      initial_state_BNKV=state,
      segment_ids_BT=ids,
      return_state=True,
      implementation="pallas_tpu",
    )
    return jnp.sum(o**2) + jnp.sum(state**2)

  key, value = struct(B, T, N, K, dtype=f32), struct(B, T, N, V, dtype=f32)
  rest = struct(N, dtype=f32), struct(B, N, K, V, dtype=f32), struct(B, T, dtype=jnp.int32)
  args = (key, value, key, key, value, *rest)
  compile_for(jax.grad(loss, tuple(range(7))), args, "v5e")
