"""Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245): weights, rotary embedding, cache, dispatch."""

# B batch, T query positions, S key positions, D model, N query heads, K key heads, H head width, R = H / 2

import logging
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models import dense_attention
from jaxlm.models.blocked_attention import blocked
from jaxlm.models.linear import linear, sharded_normal, sharded_zeros
from jaxlm.models.norms import RMSNorm
from jaxlm.models.rope import apply_rope, rope_tables
from sharding.rules import all_gather, is_sharded, spec

_DENSE = {
  "reference": dense_attention.reference,
  "blocked": blocked,
  "splash": dense_attention.splash,
  "cudnn": dense_attention.cudnn,
}


class KVCache(NamedTuple):
  """Keys and values of one layer; slot s holds position s. Keys are rotated, except under dynamic scaling."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array


class Context(NamedTuple):
  """What every layer of one forward pass shares."""

  positions_BT: jax.Array  # int32; [1, T] when all rows count alike
  length: jax.Array | int  # sequence length so far, for dynamic rotary scaling
  segment_ids_BT: jax.Array | None = None


def dense(
  q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None, window=None, cap=None, implementation="auto"
) -> jax.Array:
  """Causal self-attention by the platform's best implementation or the named one; shapes as in `dense_attention`.

  On a mesh every device attends its own rows and heads, without communication.
  """
  attend = _DENSE[_choose(implementation, q_BTNH.dtype, cap)]
  if not is_sharded():
    return attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, cap)
  q_spec, k_spec = (spec(x.shape, "batch", "length", "act_heads", None) for x in (q_BTNH, k_BTKH))
  segment_spec = None if segment_ids_BT is None else spec(segment_ids_BT.shape, "batch", "length")
  local = jax.shard_map(
    lambda q, k, v, segments: attend(q, k, v, segments, window, cap),
    in_specs=(q_spec, k_spec, k_spec, segment_spec),
    out_specs=q_spec,
    check_vma=False,  # the fused kernels do not state how their outputs vary over the mesh
  )
  return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _choose(implementation: str, dtype: jnp.dtype, cap: float | None) -> str:
  if implementation != "auto":
    return implementation
  platform = jax.default_backend()
  gpu = "cudnn" if dtype == jnp.bfloat16 and cap is None else "blocked"
  chosen = {"tpu": "splash", "gpu": gpu}.get(platform, "blocked")
  _announce(
    f"dense attention on {platform} in {dtype}{'' if cap is None else ', capped'}: {chosen}"
  )
  return chosen


_announced: set[str] = set()


def _announce(line: str) -> None:
  if line not in _announced:
    _announced.add(line)
    logging.getLogger("jaxlm").info(line)


class Attention(nn.Module):
  """q, k, v and output projections round causal attention.

  Weights: w_q [D, NH], w_k and w_v [D, KH], w_o [NH, D]; their biases b_q, b_k, b_v, b_o; q_norm and k_norm [H].
  """

  config: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: KVCache | None = None):
    """x [B, T, D] -> (the layer's output [B, T, D], the cache with these T positions written, or None)."""
    c = self.config
    B, T, D = x_BTD.shape
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    w_q = self.param("w_q", sharded_normal, (D, c.N * c.H), D**-0.5, "embed", "heads")
    w_k = self.param("w_k", sharded_normal, (D, c.K * c.H), D**-0.5, "embed", "kv_heads")
    w_v = self.param("w_v", sharded_normal, (D, c.K * c.H), D**-0.5, "embed", "kv_heads")
    out_std = (c.N * c.H * 2 * c.layers) ** -0.5
    w_o = self.param("w_o", sharded_normal, (c.N * c.H, D), out_std, "heads", "embed")
    b_q = b_k = b_v = b_o = None
    if c.qkv_bias:
      b_q = self.param("b_q", sharded_zeros, (c.N * c.H,), "heads")
      b_k, b_v = (
        self.param(name, sharded_zeros, (c.K * c.H,), "kv_heads") for name in ("b_k", "b_v")
      )
    if c.out_bias:
      b_o = self.param("b_o", sharded_zeros, (D,), None)

    q_BTNH, k_BTKH, v_BTKH = (
      _split_heads(linear(x_BTD, w, (None, "heads"), _HEADS, b), c.H)
      for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v))
    )
    if c.qk_norm:
      q_BTNH, k_BTKH = RMSNorm(c, name="q_norm")(q_BTNH), RMSNorm(c, name="k_norm")(k_BTKH)
    if c.query_width is not None:
      q_BTNH = q_BTNH * (c.H / c.query_width) ** 0.5  # attention itself divides by the root of H
    window = c.window if self.kind == "window" else None
    tables = rope_tables(c.rope, context.positions_BT, c.H, context.length)
    q_BTNH = apply_rope(q_BTNH, *tables)
    if cache is None:
      o_BTNH = dense(
        q_BTNH,
        apply_rope(k_BTKH, *tables),
        v_BTKH,
        segment_ids_BT=context.segment_ids_BT,
        window=window,
        cap=c.attention_cap,
        implementation=c.attention_implementation,
      )
    else:
      cache, o_BTNH = _attend_cached(q_BTNH, k_BTKH, v_BTKH, cache, context, c, window)
    o_BTNH = checkpoint_name(o_BTNH, "attention_out")
    o_BTD = linear(
      o_BTNH.reshape(B, T, c.N * c.H), w_o, ("heads", None), ("batch", "norm_length", None), b_o
    )
    return o_BTD, cache


_HEADS = ("batch", "length", "act_heads")


def _split_heads(x_BTZ: jax.Array, H: int) -> jax.Array:
  """[B, T, heads * H] -> [B, T, heads, H]; `tensor` splits whole heads."""
  B, T, Z = x_BTZ.shape
  if not is_sharded():
    return x_BTZ.reshape(B, T, Z // H, H)
  return jax.lax.reshape(
    x_BTZ, (B, T, Z // H, H), out_sharding=spec((B, T, Z // H, H), *_HEADS, None)
  )


def _attend_cached(
  q_BTNH, k_BTKH, v_BTKH, cache: KVCache, context: Context, c: ModelConfig, window: int | None
):
  """Writes T positions into the cache and attends to all positions up to each query's own."""
  S = cache.k_BSKH.shape[1]
  late = (
    c.rope.scaling == "dynamic"
  )  # frequencies change with the length, so its keys are rotated when read
  if not late:
    k_BTKH = apply_rope(k_BTKH, *rope_tables(c.rope, context.positions_BT, c.H, context.length))
  rows_B1 = jnp.arange(q_BTNH.shape[0])[:, None]
  k_BSKH = cache.k_BSKH.at[rows_B1, context.positions_BT].set(k_BTKH.astype(cache.k_BSKH.dtype))
  v_BSKH = cache.v_BSKH.at[rows_B1, context.positions_BT].set(v_BTKH.astype(cache.v_BSKH.dtype))
  s_BS = jnp.arange(S)[None]
  keys_BSKH = (
    apply_rope(k_BSKH, *rope_tables(c.rope, s_BS, c.H, context.length)) if late else k_BSKH
  )
  mask_BTS = dense_attention.causal_mask(context.positions_BT, s_BS, window)
  o_BTNH = dense_attention.attend(q_BTNH, keys_BSKH, v_BSKH, mask_BTS, c.attention_cap)
  return KVCache(k_BSKH, v_BSKH), o_BTNH
