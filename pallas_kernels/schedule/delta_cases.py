"""Lists the kernels of delta attention that the report covers."""

# T positions, N heads, K width of keys and values, C positions of a chunk
from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.delta_attention import kimi_delta_attention
from pallas_kernels.delta_attention.pallas_tpu import BACKWARD_HEADS, FORWARD_HEADS
from pallas_kernels.schedule.case import Case, array


def delta_attention_cases() -> Iterator[Case]:
  """Yields Kimi delta attention with its norms and gate at the size of a layer of Kimi Linear.

  Arrays have heads side by side, as projections write them. FLOPs are those of the chunk form's
  products, with each of the 64 x 64 pairs of positions multiplied once.
  """
  T, N, K, C, f32 = 8192, 32, 128, 64, jnp.float32

  def attend(q, k, v, decay, beta, a_log, bias):
    q, k, v, decay = (x.reshape(1, T, N, K) for x in (q, k, v, decay))
    gate = dict(gate="softplus", a_log_N=a_log, dt_bias=bias)
    o = kimi_delta_attention(q, k, v, decay, beta, **gate, implementation="pallas_tpu")
    return o.reshape(1, T, N * K)

  def loss(*args):
    return jnp.sum(attend(*args).astype(f32) ** 2)

  x = array(1, T, N * K)
  args = (x, x, x, x, array(1, T, N), array(N, dtype=f32), array(N, K, dtype=f32))
  gradients = jax.grad(loss, tuple(range(7)))
  pair, state = 2.0 * N * T * C * K, 2.0 * N * T * K * K  # of one product with pairs, with states
  forward, backward = f"forward_{FORWARD_HEADS}_heads", f"backward_{BACKWARD_HEADS}_heads"
  for name, fn, kernel, flops in (
    ("forward", attend, forward, 4 * pair + 3 * state),
    ("forward that saves", gradients, forward, 4 * pair + 3 * state),
    ("backward", gradients, backward, 9 * pair + 7 * state),
  ):
    yield Case(
      name=f"delta_attention, {name}",
      shape=f"{T} x {N} heads x {K} bf16",
      fn=fn,
      args=args,
      flops=flops,
      kernel=f"delta_attention_{kernel}",
    )
