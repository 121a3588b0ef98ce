"""Refuses what no implementation of delta attention can do, and fills in what was left out."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of queries and keys,
# V width of values
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.checks import check, check_choice, check_dtype, check_number, check_shape
from pallas_kernels.delta_attention.terms import GateParameters, Options, Tokens, sum_dtype

WIDEST = 256
LOWEST_BOUND = -5.0


def check_options(
  scale: float | None,
  l2norm: bool,
  gate: str | None,
  lower_bound: float,
  K: int,
  interpret: Any = False,
) -> Options:
  """Returns the options with the scale filled in; raises UserError for what is out of range."""
  if scale is not None:
    check_number("scale", scale)
  check_choice("gate", gate, (None, "softplus", "lower_bound"))
  check_number("lower_bound", lower_bound, at_least=LOWEST_BOUND)
  check(lower_bound < 0, "lower_bound", lower_bound, "must be below 0")
  return Options(
    scale=K**-0.5 if scale is None else float(scale),
    l2norm=bool(l2norm),
    gate=gate,
    lower_bound=float(lower_bound),
    interpret=interpret,
  )


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Raises UserError for ranks, sizes and dtypes of q, k [B, T, H, K] and v [B, T, N, V]."""
  for name, array in (("q_BTHK", q), ("k_BTHK", k), ("v_BTNV", v)):
    check_shape(name, array, (None,) * 4)
    check_dtype(name, array, jnp.floating)
    rule = f"must be that of q_BTHK, {q.dtype}"
    check(array.dtype == q.dtype, f"{name}.dtype", str(array.dtype), rule)
    check(min(array.shape[2:]) >= 1, f"{name}.shape", array.shape, "needs a head and a width")
  B, T, H, K = q.shape
  check_shape("k_BTHK", k, (B, T, H, K))
  check_shape("v_BTNV", v, (B, T, None, None))
  check(K <= WIDEST, "q_BTHK.shape", q.shape, f"K={K} may be at most {WIDEST}")
  N = v.shape[2]
  check(N % H == 0, "v_BTNV.shape", v.shape, f"its N={N} must be a multiple of H={H}")


def check_gates(
  tokens: Tokens, a_log_N: jax.Array | None, dt_bias: jax.Array | None, options: Options
) -> tuple[Tokens, GateParameters]:
  """Returns tokens whose gates are [B, T, N, width or 1], and the decay's gate.

  Raises UserError for misfits and, where the values are known, for log decays above 0.
  """
  K, V = tokens.q.shape[-1], tokens.v.shape[-1]
  tokens = tokens._replace(
    decay=_with_width("decay", tokens.decay, K, tokens.v),
    erase=_with_width("erase", tokens.erase, K, tokens.v),
    write=_with_width("write", tokens.write, V, tokens.v),
  )
  gate, decay = options.gate, tokens.decay
  if gate is None:
    for name, array in (("a_log_N", a_log_N), ("dt_bias", dt_bias)):
      check(array is None, name, array, 'belongs to gate="softplus" or gate="lower_bound"')
    if decay is not None and not isinstance(decay, jax.core.Tracer):
      highest = float(np.max(np.asarray(decay, np.float64), initial=-np.inf))
      check(not highest > 0, "decay", highest, "a log decay must be at most 0")
    return tokens, GateParameters(None, None)
  check(decay is not None, "decay", None, f"gate={gate!r} makes the decay of it")
  assert decay is not None
  check(a_log_N is not None, "a_log_N", None, f"gate={gate!r} needs it")
  N, width = decay.shape[2:]
  check_shape("a_log_N", a_log_N, (N,))
  check_dtype("a_log_N", a_log_N, jnp.floating)
  if dt_bias is not None:
    check_dtype("dt_bias", dt_bias, jnp.floating)
    check_shape("dt_bias", dt_bias, (N,) if width == 1 and dt_bias.ndim == 1 else (N, width))
    dt_bias = dt_bias.reshape(N, width)
  return tokens, GateParameters(a_log_N, dt_bias)


def _with_width(name: str, gate: jax.Array | None, width: int, v: jax.Array) -> jax.Array | None:
  """Returns the gate as [B, T, N, width or 1], from one number for a head or for a channel."""
  if gate is None:
    return None
  check_dtype(name, gate, jnp.floating)
  heads = v.shape[:3]
  check_shape(name, gate, heads if gate.ndim == 3 else (*heads, width))
  return gate[..., None] if gate.ndim == 3 else gate


def check_state(state_BNKV: jax.Array | None, q: jax.Array, v: jax.Array) -> jax.Array:
  """Returns the initial state in the dtype of sums, zeros where there is none."""
  B, _, N, V = v.shape
  shape, dtype = (B, N, q.shape[-1], V), sum_dtype(q.dtype)
  if state_BNKV is None:
    return jnp.zeros(shape, dtype)
  check_shape("initial_state_BNKV", state_BNKV, shape)
  check_dtype("initial_state_BNKV", state_BNKV, jnp.floating)
  return state_BNKV.astype(dtype)


def find_resets(segment_ids_BT: jax.Array | None, q: jax.Array) -> jax.Array | None:
  """Returns true where a segment starts, bool [B, T]; the first position continues the state."""
  if segment_ids_BT is None:
    return None
  check_dtype("segment_ids_BT", segment_ids_BT, jnp.integer)
  rows = segment_ids_BT.shape[0] if segment_ids_BT.ndim == 2 else None
  check_shape("segment_ids_BT", segment_ids_BT, (1 if rows == 1 else q.shape[0], q.shape[1]))
  changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  resets_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)))
  return jnp.broadcast_to(resets_BT, q.shape[:2])
