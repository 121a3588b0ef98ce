"""Computes grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245), with rotation.

Keys and values that rules round are held in the bytes of their formats in a cache.
"""

# B batch, T query positions, S key positions, D model, N query heads, K key heads, H head width

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxlm.config import AttentionConfig, ComputeConfig, ModelConfig, QuantSpec
from jaxlm.config.quant import PLAIN
from jaxlm.models.linear import Linear, Roles, declare_parts
from jaxlm.models.mixers.context import Context
from jaxlm.models.mixers.steps import write_places
from jaxlm.models.norms import RMSNorm
from jaxlm.models.rope import apply_rope, rope_tables, sequence_lengths
from jaxlm.quant.apply import turn
from jaxlm.quant.cache import Held, cache_specs, empty, hold, read, round_heads
from jaxlm.quant.packing import Packed
from pallas_kernels.attention import attention
from pallas_kernels.common.shards import check_not_sharded
from sharding.context import hybrid_attention
from sharding.rules import all_gather, is_manual, is_sharded, own_part, shard, spec


class KVCache(NamedTuple):
  """Holds keys and values of one layer, or their codes and scales; slot s holds position s.

  Keys are rotated, except under dynamic scaling.
  """

  k_BSKH: Held
  v_BSKH: Held


class Attention(nn.Module):
  """Projects to queries, keys and values, attends causally, projects back."""

  spec: AttentionConfig
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]

  def setup(self) -> None:
    """Makes the projections and the norms of queries and keys."""
    c, D = self.spec, self.config.D
    Q, Z = c.N * c.H, c.K * c.H
    for heads, axis in ((c.N, "heads"), (c.K, "kv_heads")):
      spec((heads,), axis)  # refuses a mesh that would split a head
    rules = self.config.quant
    options: dict[str, Any] = {"compute": self.compute, "layers": self.layers, "rules": rules}
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
  def init_cache(
    spec: AttentionConfig,
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: str,
    layers: Sequence[int],
  ) -> KVCache:
    """Returns an empty cache of any of `layers`; a windowed one keeps all `length` positions too.

    These layers have the same formats.
    """
    shape = (batch, length, spec.K, spec.H)
    held = [empty(shape, quant, dtype) for quant in _formats(spec, config, layers)]
    return KVCache(*jax.tree.map(lambda x: shard(x, *_AXES[: x.ndim]), held))

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KVCache | None = None
  ) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
    """Returns the layer's output [B, T, D], its updated cache or None, and no statistics."""
    c = self.spec
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    B, T, _ = x_BTD.shape
    q_BTNH = split_heads(self.q(x_BTD), c.H)
    k_BTKH = split_heads(self.k(x_BTD), c.H)
    v_BTKH = split_heads(self.v(x_BTD), c.H)
    if c.qk_norm:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    dynamic = c.rope is not None and c.rope.scaling == "dynamic"
    lengths_BT = None
    if dynamic:
      lengths_BT = sequence_lengths(context.positions_BT, context.segment_ids_BT)
      lengths_BT = _shard_rows(lengths_BT)
    if c.rope is not None:
      tables = rope_tables(c.rope, _shard_rows(context.positions_BT), c.H, lengths_BT)
      q_BTNH = apply_rope(q_BTNH, *tables)
      if cache is None or not dynamic:  # dynamic frequencies change, so cached keys turn when read
        k_BTKH = apply_rope(k_BTKH, *tables)
    keys, values = _formats(c, self.config, self.layers)
    q_BTNH, k_BTKH = (turn(x, keys.hadamard) for x in (q_BTNH, k_BTKH))
    if cache is None:
      k_BTKH, v_BTKH = round_heads(k_BTKH, keys), round_heads(v_BTKH, values)
      name = self.compute.attention_implementation
      o_BTNH = hybrid_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        positions_BT=None if context.in_order else context.positions_BT,
        segment_ids_BT=context.segment_ids_BT,
        window=c.window,
        cap=c.cap,
        scale=_scale(c),
        order=context.order,
        implementation=None if name == "auto" else name,
      )
    else:
      cache, o_BTNH = _attend_cached(
        q_BTNH, k_BTKH, v_BTKH, cache, context.positions_BT, lengths_BT, c, keys, values
      )
    o_BTNH = checkpoint_name(o_BTNH, "attention_out")
    return self.o(o_BTNH.reshape(B, T, o_BTNH.shape[2] * c.H)), cache, {}


_HEADS = ("batch", "length", "act_heads")


_AXES = ("batch", None, "act_heads", None)
"""of [B, T], [B, S, K] or [B, S, K, X] in a cache"""


def _formats(
  c: AttentionConfig, config: ModelConfig, layers: Sequence[int]
) -> tuple[QuantSpec, QuantSpec]:
  """Returns how these layers round keys and values; keys that turn when they are read, not."""
  specs = cache_specs(c, config.quant, layers)
  return specs.get("keys", PLAIN), specs["values"]


def _scale(c: AttentionConfig) -> float:
  return (c.H if c.query_width is None else c.query_width) ** -0.5


def _shard_rows(x_BT: jax.Array) -> jax.Array:
  """Shards [B or 1, T or 1] like the rows of a batch; without communication where it is whole."""
  if is_manual():
    return own_part(x_BT, None, "length")
  return shard(x_BT, "batch" if x_BT.shape[0] > 1 else None, "length")


def split_heads(x_BTZ: jax.Array, H: int) -> jax.Array:
  """Reshapes [B, T, heads * H] to [B, T, heads, H]; `tensor` splits whole heads."""
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
  positions_BT: jax.Array,
  lengths_B1: jax.Array | None,
  c: AttentionConfig,
  keys: QuantSpec,
  values: QuantSpec,
) -> tuple[KVCache, jax.Array]:
  """Writes T positions into the cache and attends to all positions up to each query's own.

  Takes the platform's implementation for this shape, whatever the one that training names. A query
  whose position the cache has no room for gets NaN.
  """
  check_not_sharded("q_BTNH", q_BTNH, 1)
  cache = KVCache(
    _write_positions(cache.k_BSKH, k_BTKH, positions_BT, keys),
    _write_positions(cache.v_BSKH, v_BTKH, positions_BT, values),
  )
  k_BSKH = _read_positions(cache.k_BSKH, k_BTKH, keys)
  v_BSKH = _read_positions(cache.v_BSKH, v_BTKH, values)
  s_1S = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)[None]
  if c.rope is not None and c.rope.scaling == "dynamic":
    k_BSKH = apply_rope(k_BSKH, *rope_tables(c.rope, s_1S, c.H, lengths_B1))
  o_BTNH = attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    q_positions_BT=positions_BT,
    k_positions_BS=s_1S,
    window=c.window,
    cap=c.cap,
    scale=_scale(c),
  )
  has_room_BT = positions_BT < k_BSKH.shape[1]
  return cache, jnp.where(has_room_BT[:, :, None, None], o_BTNH, jnp.nan)


def _write_positions(
  cached: Held, x_BTKH: jax.Array, positions_BT: jax.Array, quant: QuantSpec
) -> Held:
  """Writes each row's T entries at their positions; those at position -1, padding, nowhere.

  On a mesh every device writes its own rows and heads, without communication.
  """

  def write(cached: Held, x_BTKH: jax.Array, positions_BT: jax.Array) -> Held:
    return write_places(cached, hold(x_BTKH, quant), positions_BT)

  if not is_sharded():
    return write(cached, x_BTKH, positions_BT)
  layouts = jax.tree.map(_layout, (cached, x_BTKH, positions_BT))
  return jax.shard_map(write, in_specs=layouts, out_specs=layouts[0])(cached, x_BTKH, positions_BT)


def _read_positions(cached: Held, like_BTKH: jax.Array, quant: QuantSpec) -> jax.Array:
  """Returns all that is cached, [B, S, K, H], in the dtype of what is written."""
  if isinstance(cached, jax.Array):
    return cached

  def read_codes(cached: Packed) -> jax.Array:
    return read(cached, quant, like_BTKH.shape[3], like_BTKH.dtype)

  if not is_sharded():
    return read_codes(cached)
  layouts = jax.tree.map(_layout, cached)
  return jax.shard_map(read_codes, in_specs=(layouts,), out_specs=layouts["codes"])(cached)


def _layout(x: jax.Array) -> P:
  """Returns how a mesh splits an array of a cache, or one that is written into it."""
  return spec(x.shape, *_AXES[: x.ndim])
