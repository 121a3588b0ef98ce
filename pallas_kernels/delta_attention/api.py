"""Computes delta attention by the platform's best implementation; and one token of it."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of queries and keys,
# V width of values
from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.checks import check
from pallas_kernels.common.platform import choose_implementation
from pallas_kernels.common.shards import (
  check_not_sharded,
  run_on_shards,
  sharded_axes,
  vary_together,
)
from pallas_kernels.delta_attention import autodiff, checks, reference
from pallas_kernels.delta_attention.terms import GateParameters, Options, Tokens

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
Gate = Literal["softplus", "lower_bound"]


def delta_attention(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTNV: jax.Array,
  *,
  decay: jax.Array | None = None,
  erase: jax.Array | None = None,
  write: jax.Array | None = None,
  gate: Gate | None = None,
  a_log_N: jax.Array | None = None,
  dt_bias: jax.Array | None = None,
  lower_bound: float = -5.0,
  l2norm: bool = False,
  scale: float | None = None,
  segment_ids_BT: jax.Array | None = None,
  initial_state_BNKV: jax.Array | None = None,
  return_state: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> Any:
  """Returns the output of a linear attention whose state decays, erases and writes.

  Every value head n has a state S [K, V] and uses the queries and keys of head n H / N:

      S~ = exp(g_t) S_{t-1}                       g_t <= 0 in R^K, or one number
      S_t = S~ + k_t (w_t v_t - S~^T (b_t k_t))^T
      o_t = scale S_t^T q_t

  With b = w = beta this is Kimi delta attention, and with one g per head the gated delta rule;
  see `presets` for what else it is. Norms, gates, states and sums are float32 (float64 for
  float64 inputs). Gradients are of reverse mode; none flows to segment ids. What is not finite
  makes NaN of what depends on it, and of nothing else.

  Args:
    q_BTHK: queries, float32, bfloat16, float16 or float64 [B, T, H, K], K at most 256.
    k_BTHK: keys of the same dtype and shape.
    v_BTNV: values of the same dtype, [B, T, N, V]; N must be a multiple of H.
    decay: log decay g, at most 0, [B, T, N, K] or one for a head [B, T, N]; with `gate` what the
      gate makes it of. By default nothing decays.
    erase: b, [B, T, N, K] or [B, T, N]; by default 0, and nothing is erased.
    write: w, [B, T, N, V] or [B, T, N]; by default 1.
    gate: "softplus": g = -exp(a_log) softplus(decay + dt_bias). "lower_bound": g = lower_bound
      sigmoid(exp(a_log) (decay + dt_bias)). None: g = decay.
    a_log_N: [N], of the gate.
    dt_bias: [N, K], or [N] for one decay per head; of the gate, by default 0.
    lower_bound: in [-5, 0), of the gate "lower_bound".
    l2norm: divide queries and keys by sqrt(sum of squares + 1e-6).
    scale: factor of the queries, by default K^-1/2.
    segment_ids_BT: integers [B or 1, T]; the state is cleared wherever they change. The first
      segment continues the initial state.
    initial_state_BNKV: [B, N, K, V], by default 0.
    return_state: also return the state after the last position.
    implementation: None takes "pallas_tpu" on TPU and "pallas_gpu" on Hopper (bfloat16) where they
      can run the call, else "xla", and logs its choice once; a named one runs or raises. All work
      by chunks of 64 positions; their memory is linear in T. "reference" goes token by token.
    interpret: runs a named kernel on CPU: True, or pltpu.InterpretParams or
      plgpu.InterpretGPUParams (jax 0.11), simulators of the chip's memories, copies and races.

  Returns:
    The output [B, T, N, V] in the inputs' dtype; with return_state a tuple of it and the state
    [B, N, K, V], float32 (float64 for float64 inputs).

  Raises:
    UserError: shapes, dtypes and options that do not fit, and log decays above 0 where they are
      known. (Under jit they are not, and states may grow.)
    UnsupportedError: on a mesh with Explicit axes arrays that are spread over their T, K or V.

  Source: Kimi Linear, arXiv 2510.26692, section 3; separate gates: arXiv 2605.22791.
  """
  q, k, v = jnp.asarray(q_BTHK), jnp.asarray(k_BTHK), jnp.asarray(v_BTNV)
  checks.check_arrays(q, k, v)
  options = checks.check_options(scale, l2norm, gate, lower_bound, q.shape[-1], interpret)
  gates = jax.tree.map(jnp.asarray, (decay, erase, write, a_log_N, dt_bias))
  decay, erase, write, a_log_N, dt_bias = gates
  resets_BT = checks.find_resets(_optional_array(segment_ids_BT), q)
  tokens = Tokens(q, k, v, decay, erase, write, resets_BT)
  tokens, parameters = checks.check_gates(tokens, a_log_N, dt_bias, options)
  state_BNKV = checks.check_state(_optional_array(initial_state_BNKV), q, v)
  name = choose(implementation, tokens, options)
  local = functools.partial(_local, name=name, options=options)
  o_BTNV, state_BNKV = _on_shards(local, tokens, parameters, state_BNKV)
  return (o_BTNV, state_BNKV) if return_state else o_BTNV


def delta_step(
  q_BHK: jax.Array, k_BHK: jax.Array, v_BNV: jax.Array, state_BNKV: jax.Array, **gates: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, N, V] of one token, and the state after it, as in decoding.

  Arguments are those of `delta_attention` without T, and the state before the token; `gates` are
  its options from decay to scale.
  """
  q, k, v = (jnp.asarray(x)[:, None] for x in (q_BHK, k_BHK, v_BNV))
  of_tokens = {name: gates.get(name) for name in ("decay", "erase", "write")}
  gates |= {name: jnp.asarray(x)[:, None] for name, x in of_tokens.items() if x is not None}
  o_BTNV, state_BNKV = delta_attention(
    q,
    k,
    v,
    **gates,
    initial_state_BNKV=state_BNKV,
    return_state=True,
    implementation="reference",
  )
  return o_BTNV[:, 0], state_BNKV


def choose(implementation: Implementation | None, tokens: Tokens, options: Options) -> str:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""

  def unsupported(name: str) -> str | None:
    return load(name).unsupported(tokens, options)

  return choose_implementation(
    "delta_attention", implementation, KERNELS, unsupported, options.interpret
  )


def load(name: str) -> ModuleType:
  """Returns the module of an implementation, imported when it is first chosen."""
  return importlib.import_module(f"{__package__}.{name}")


def _optional_array(x: Any) -> jax.Array | None:
  return None if x is None else jnp.asarray(x)


def _local(
  tokens: Tokens,
  parameters: GateParameters,
  state_BNKV: jax.Array,
  *,
  name: str,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """Attends on one device."""
  if 0 in tokens.v.shape[:2]:
    return jnp.zeros_like(tokens.v), state_BNKV
  if name == "reference":
    return reference.attend(tokens, parameters, state_BNKV, options)
  return autodiff.attend(tokens, parameters, state_BNKV, load(name), options)


def _on_shards(
  local: Any, tokens: Tokens, parameters: GateParameters, state_BNKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Calls `local` on every device's rows and heads, without communication between them."""
  names = ("q_BTHK", "k_BTHK", "v_BTNV", "decay_BTNK", "erase_BTNK", "write_BTNV")
  for name, array in zip(names, tokens):
    if array is not None:
      for dimension in (1, 3):
        check_not_sharded(name, array, dimension)
  for dimension in (2, 3):
    check_not_sharded("initial_state_BNKV", state_BNKV, dimension)
  batch, heads = sharded_axes(tokens.v, 0), sharded_axes(tokens.v, 2)

  def run(*arrays: Any) -> tuple[jax.Array, jax.Array]:
    arrays = vary_together(*arrays)
    return local(Tokens(*arrays[:7]), GateParameters(*arrays[7:9]), arrays[9])

  if not batch and not heads:  # off a mesh, or inside somebody's shard_map
    return run(*tokens, *parameters, state_BNKV)
  mesh_shape = jax.typeof(tokens.v).sharding.mesh.shape
  shards, H = math.prod(mesh_shape[axis] for axis in heads), tokens.q.shape[2]
  rule = f"its H={H} heads cannot be split over the {shards} devices of {heads}"
  check(H % shards == 0, "q_BTHK", str(jax.typeof(tokens.q)), rule)

  token, rows, head = (batch, (), heads, ()), (batch, ()), (heads,)
  layouts = (*(token,) * 6, rows, head, (heads, ()), (batch, heads, (), ()))
  out_specs = P(batch or None, None, heads or None), P(batch or None, heads or None)
  return run_on_shards(run, (*tokens, *parameters, state_BNKV), layouts, out_specs)
