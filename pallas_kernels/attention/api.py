"""Computes softmax attention of arrays by the platform's best implementation."""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# H width of queries and keys, U width of values
from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import checks, cudnn, splash, xla
from pallas_kernels.attention import reference as materialised
from pallas_kernels.attention.mask import Options, Tokens
from pallas_kernels.common.platform import choose_implementation, platform
from pallas_kernels.common.shards import (
  check_not_sharded,
  run_on_shards,
  sharded_axes,
  varying_axes,
)

Implementation = Literal["reference", "xla", "splash", "cudnn"]
FUSED: dict[str, ModuleType] = {"splash": splash, "cudnn": cudnn}
FUSED_ON = {"tpu": "splash", "gpu": "cudnn"}
IMPLEMENTATIONS = ("reference", "xla", *FUSED)


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  *,
  q_positions_BT: jax.Array | None = None,
  k_positions_BS: jax.Array | None = None,
  q_segment_ids_BT: jax.Array | None = None,
  k_segment_ids_BS: jax.Array | None = None,
  causal: bool = True,
  window: int | None = None,
  cap: float | None = None,
  scale: float | None = None,
  return_lse: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> Any:
  """Returns softmax(cap tanh(scale q k / cap), over the keys that the query sees) v.

  Every query head attends to one of the K heads of keys and values, N / K neighbours to the same.
  A query sees the keys of its own segment and, under `causal`, those whose position is at most its
  own and less than `window` below it. A query that sees no key gets output 0, logsumexp -inf and
  passes on no gradient. Logits, softmax and sums are float32 (float64 for float64 inputs).
  Gradients are of reverse mode. A NaN in a key reaches the queries that see it; a NaN in a value
  may also reach others of the same row, whose weight for it is 0.

  Args:
    q_BTNH: queries, float32, bfloat16, float16 or float64 [B, T, N, H].
    k_BSKH: keys of the same dtype, [B, S, K, H]; N must be a multiple of K.
    v_BSKU: values of the same dtype, [B, S, K, U]; U need not be H.
    q_positions_BT: integers [B or 1, T], in any order. By default the T queries stand at the last
      T of the S keys' positions.
    k_positions_BS: integers [B or 1, S], by default 0 .. S - 1. Only with q_positions_BT.
    q_segment_ids_BT: integers [B or 1, T]; by default all tokens are of one segment.
    k_segment_ids_BS: integers [B or 1, S], by default those of the queries.
    causal: whether positions limit what a query sees; False is for encoders and denoisers.
    window: number of keys that a query sees at most, its own included.
    cap: bends the logits into (-cap, cap) before the mask (Gemma 2, arXiv 2408.00118).
    scale: factor of the logits, by default H^-1/2.
    return_lse: also return the logarithm of softmax's normaliser; differentiable.
    implementation: None takes "splash" on TPU and "cudnn" on GPU where these can run the call, else
      "xla", and logs its choice once; a named one runs or raises.
      "xla" works by blocks of queries. Its memory is linear in T, but on CPU the backward pass
      reads kept exponentials, about half of T x S, up to 4096 positions.
      "splash" is JAX's TPU kernel: in order, T = S a multiple of 128.
      "cudnn" is cuDNN's: in order, bfloat16 or float16, no cap, no logsumexp; segments become a
      mask of B x T x S numbers.
      "reference" materialises the logits.
    interpret: True, or the interpreter's parameters, runs a named "splash" without a TPU.

  Returns:
    The output [B, T, N, U] in the inputs' dtype; with return_lse a tuple of it and the logsumexp
    [B, T, N], float32 (float64 for float64 inputs).

  Raises:
    UserError: shapes, dtypes and options that do not fit.
    UnsupportedError: what the named implementation cannot do, and on a mesh with Explicit axes
      arrays that are spread over their T, S, H or U: attention reads keys of all shards.

  Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped heads: arXiv 2305.13245.
  """
  q_BTNH, k_BSKH, v_BSKU = jnp.asarray(q_BTNH), jnp.asarray(k_BSKH), jnp.asarray(v_BSKU)
  checks.check_arrays(q_BTNH, k_BSKH, v_BSKU)
  options = checks.check_options(causal, window, cap, scale, q_BTNH.shape[-1], interpret)
  tokens = Tokens(q_positions_BT, k_positions_BS, q_segment_ids_BT, k_segment_ids_BS)
  tokens = jax.tree.map(jnp.asarray, tokens)
  B, T, S = *q_BTNH.shape[:2], k_BSKH.shape[1]
  tokens = checks.check_tokens(tokens, B, T, S, options.causal)
  arrays = (q_BTNH, k_BSKH, v_BSKU)
  name = choose(implementation, *arrays, tokens, options, return_lse)
  local = functools.partial(
    _local, name=name, options=options, return_lse=return_lse, keeps=platform() == "cpu"
  )
  returned = _on_shards(local, *arrays, tokens, fused=name in FUSED)
  return returned if return_lse else returned[0]


def choose(
  implementation: Implementation | None,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  tokens: Tokens,
  options: Options,
  return_lse: bool,
) -> str:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""

  def unsupported(name: str) -> str | None:
    if varying_axes(q_BTNH):
      return "its kernel does not say over which mesh axes it varies, as shard_map's checks ask"
    return FUSED[name].unsupported(q_BTNH, k_BSKH, v_BSKU, tokens, options, return_lse)

  return choose_implementation(
    "attention", implementation, FUSED_ON, unsupported, options.interpret
  )


@functools.partial(jax.jit, static_argnames=("name", "options", "return_lse", "keeps"))
def _local(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  *tokens: jax.Array | None,
  name: str,
  options: Options,
  return_lse: bool,
  keeps: bool,
) -> tuple[jax.Array, ...]:
  """Attends on one device: the output and, if asked for, the logsumexp.

  Layers of equal shapes share what is traced here and lowered, with its gradients.
  """
  B, T, N, _ = q_BTNH.shape
  arrays = (q_BTNH, k_BSKH, v_BSKU, Tokens(*tokens), options)
  lse_BTN: Any  # None where it is not asked for
  if 0 in (*q_BTNH.shape, *k_BSKH.shape):
    o_BTNU = jnp.zeros((B, T, N, v_BSKU.shape[-1]), q_BTNH.dtype)
    lse_BTN = jnp.full((B, T, N), -jnp.inf, jnp.promote_types(q_BTNH.dtype, jnp.float32))
  elif name in FUSED:
    o_BTNU, lse_BTN = FUSED[name].attend(*arrays, return_lse)
  elif name == "xla":
    o_BTNU, lse_BTN = xla.attend(*arrays, return_lse, keeps=keeps)
  else:
    o_BTNU, lse_BTN = materialised.attend(*arrays)
  return (o_BTNU, lse_BTN) if return_lse else (o_BTNU,)


def _on_shards(
  local: Callable[..., Any],
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  tokens: Tokens,
  *,
  fused: bool,
) -> tuple[jax.Array, ...]:
  """Calls `local` on every device's rows and heads, without communication between them."""
  for name, array in (("q_BTNH", q_BTNH), ("k_BSKH", k_BSKH), ("v_BSKU", v_BSKU)):
    for dimension in (1, 3):
      check_not_sharded(name, array, dimension)
  batch, heads = sharded_axes(q_BTNH, 0), sharded_axes(q_BTNH, 2)
  for name, array in (("k_BSKH", k_BSKH), ("v_BSKU", v_BSKU)):
    checks.check_spread_alike(name, array, (batch, (), heads))
  arrays = (q_BTNH, k_BSKH, v_BSKU, *tokens)
  if not batch and not heads:
    return local(*arrays)
  rows = [batch if array is not None and array.shape[0] > 1 else () for array in tokens]
  layouts = (*((batch, (), heads, ()),) * 3, *((axes, ()) for axes in rows))
  out_specs = P(batch or None, None, heads or None)
  # the library's kernels do not say over which mesh axes their outputs vary
  return run_on_shards(local, arrays, layouts, out_specs, check_vma=not fused)
