"""Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary embedding."""

# B batch, T query positions, S key positions, D model, N query heads, K key heads, H head width

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import AttentionConfig, ComputeConfig, ModelConfig
from jaxlm.models.linear import Linear, Roles, declare_parts
from jaxlm.models.norms import RMSNorm
from jaxlm.models.rope import apply_rope, rope_tables
from pallas_kernels.attention import attention
from sharding.rules import all_gather, is_sharded, spec


class KVCache(NamedTuple):
  """Keys and values of one layer; slot s holds position s.

  Keys are rotated, except under dynamic scaling.
  """

  k_BSKH: jax.Array
  v_BSKH: jax.Array


class Context(NamedTuple):
  """What every layer of one forward pass shares."""

  positions_BT: jax.Array  # int32; [1, T] when all rows count alike
  length: jax.Array | int  # sequence length so far, for dynamic rotary scaling
  segment_ids_BT: jax.Array | None = None


class Attention(nn.Module):
  """Projects to queries, keys and values, attends causally, projects back."""

  spec: AttentionConfig
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]

  def setup(self) -> None:
    c, D = self.spec, self.config.D
    Q, Z = c.N * c.H, c.K * c.H
    for heads, axis in ((c.N, "heads"), (c.K, "kv_heads")):
      spec((heads,), axis)  # refuses a mesh that would split a head
    options: dict[str, Any] = {"dtype": self.compute.dtype, "layers": self.layers}
    inner = {"out": _HEADS, "biased": c.qkv_bias, **options}
    self.q = Linear((D, Q), D**-0.5, ("embed", "heads"), **inner)
    self.k = Linear((D, Z), D**-0.5, ("embed", "kv_heads"), **inner)
    self.v = Linear((D, Z), D**-0.5, ("embed", "kv_heads"), **inner)
    out_std = (Q * 2 * self.config.layers) ** -0.5
    outer = {"out": ("batch", "norm_length", None), "biased": c.out_bias, **options}
    self.o = Linear((Q, D), out_std, ("heads", "embed"), **outer)
    if c.qk_norm:
      self.q_norm = RMSNorm(c.H, self.config.norm_eps, self.config.norm_offset)
      self.k_norm = RMSNorm(c.H, self.config.norm_eps, self.config.norm_offset)

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    norms = ("q_norm", "k_norm") if self.spec.qk_norm else ()
    return declare_parts(self, "q", "k", "v", "o", *norms)

  @staticmethod
  def init_cache(spec: AttentionConfig, batch: int, length: int, dtype: str) -> KVCache:
    """Returns an empty cache of one layer; a windowed layer keeps all `length` positions too."""
    zeros = jnp.zeros((batch, length, spec.K, spec.H), dtype)
    return KVCache(zeros, zeros)

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None = None
  ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
    """Returns the layer's output [B, T, D], its updated cache or None, and no statistics."""
    c = self.spec
    B, T, _ = x_BTD.shape
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    q_BTNH = _split_heads(self.q(x_BTD), c.H)
    k_BTKH = _split_heads(self.k(x_BTD), c.H)
    v_BTKH = _split_heads(self.v(x_BTD), c.H)
    if c.qk_norm:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    tables = rope_tables(c.rope, context.positions_BT, c.H, context.length)
    q_BTNH = apply_rope(q_BTNH, *tables)
    if cache is None:
      name = self.compute.attention_implementation
      o_BTNH = attention(
        q_BTNH,
        apply_rope(k_BTKH, *tables),
        v_BTKH,
        q_segment_ids_BT=context.segment_ids_BT,
        window=c.window,
        cap=c.cap,
        scale=_scale(c),
        implementation=None if name == "auto" else name,
      )
    else:
      cache, o_BTNH = _attend_cached(q_BTNH, k_BTKH, v_BTKH, cache, context, c)
    o_BTNH = checkpoint_name(o_BTNH, "attention_out")
    return self.o(o_BTNH.reshape(B, T, c.N * c.H)), cache, {}


_HEADS = ("batch", "length", "act_heads")


def _scale(c: AttentionConfig) -> float:
  return (c.H if c.query_width is None else c.query_width) ** -0.5


def _split_heads(x_BTZ: jax.Array, H: int) -> jax.Array:
  """[B, T, heads * H] -> [B, T, heads, H]; `tensor` splits whole heads."""
  B, T, Z = x_BTZ.shape
  if not is_sharded():
    return x_BTZ.reshape(B, T, Z // H, H)
  return jax.lax.reshape(
    x_BTZ, (B, T, Z // H, H), out_sharding=spec((B, T, Z // H, H), *_HEADS, None)
  )


def _attend_cached(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  cache: KVCache,
  context: Context,
  c: AttentionConfig,
) -> tuple[KVCache, jax.Array]:
  """Writes T positions into the cache and attends to all positions up to each query's own.

  Takes the platform's implementation for this shape, whatever the one that training names.
  """
  S = cache.k_BSKH.shape[1]
  # dynamic frequencies change with the length, so these keys are rotated when they are read
  rotate_on_read = c.rope.scaling == "dynamic"
  if not rotate_on_read:
    k_BTKH = apply_rope(k_BTKH, *rope_tables(c.rope, context.positions_BT, c.H, context.length))
  rows_B1 = jnp.arange(q_BTNH.shape[0])[:, None]
  k_BSKH = cache.k_BSKH.at[rows_B1, context.positions_BT].set(k_BTKH.astype(cache.k_BSKH.dtype))
  v_BSKH = cache.v_BSKH.at[rows_B1, context.positions_BT].set(v_BTKH.astype(cache.v_BSKH.dtype))
  keys_BSKH = k_BSKH
  if rotate_on_read:
    s_BS = jnp.arange(S)[None]
    keys_BSKH = apply_rope(k_BSKH, *rope_tables(c.rope, s_BS, c.H, context.length))
  o_BTNH = attention(
    q_BTNH,
    keys_BSKH,
    v_BSKH,
    q_positions_BT=context.positions_BT,
    window=c.window,
    cap=c.cap,
    scale=_scale(c),
  )
  return KVCache(k_BSKH, v_BSKH), o_BTNH
