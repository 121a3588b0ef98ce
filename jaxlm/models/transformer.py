"""The decoder: embed -> blocks -> norm -> head. Blocks of one kind are stacked on a leading axis and run by scan."""

# B batch, T positions, D model, V vocabulary, L layers of one kind

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig
from jaxlm.models.attention import Attention, Context, KVCache
from jaxlm.models.dense_attention import soft_cap
from jaxlm.models.linear import linear, sharded_normal
from jaxlm.models.mlp import Mlp
from jaxlm.models.norms import RMSNorm
from sharding.rules import all_gather, is_sharded, out_sharding, shard

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "names": jax.checkpoint_policies.save_only_these_names("attention_out", "mlp_in"),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_UNROLLED_LAYERS = (
  8  # on CPU a Python loop over a few layers is faster than scan; more cost too much compile time
)


class Block(nn.Module):
  """Pre-norm residual block: x += attention(norm(x)); x += mlp(norm(x)), both normed again under `post_norms`."""

  config: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: KVCache | None = None):
    """x [B, T, D] -> (x [B, T, D], this layer's updated cache or None)."""
    c = self.config
    normed_BTD = RMSNorm(c, name="attention_norm")(x_BTD)
    mixed_BTD, cache = Attention(c, self.kind, name="attention")(normed_BTD, context, cache)
    if c.post_norms:
      mixed_BTD = RMSNorm(c, name="attention_post_norm")(mixed_BTD)
    x_BTD = checkpoint_name(x_BTD + mixed_BTD, "mlp_in")
    fed_BTD = Mlp(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x_BTD))
    if c.post_norms:
      fed_BTD = RMSNorm(c, name="mlp_post_norm")(fed_BTD)
    return x_BTD + fed_BTD, cache


class Transformer(nn.Module):
  """A causal language model.

  Parameters: `embed` [V, D], `blocks` {"0": ..., "1": ...} one stack per entry of `config.attention` with leading
  axis L = layers / entries (layer i is row i // entries of stack i % entries), `norm`, and `head` [D, V] unless tied.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self, ids_BT: jax.Array, *, positions=None, segment_ids=None, cache=None, logits: bool = True
  ):
    """ids [B, T] int32 -> logits [B, T, V] float32; with a `cache`, (logits, updated cache).

    positions: int32 [B or 1, T], by default 0 .. T-1. segment_ids: int32 [B, T], for packed rows; attention stays
    within a segment. cache: from `jaxlm.decode.init_cache`; the T positions are written into it and see what is there.
    logits: False gives, in place of logits, the states [B, T, D] that the head (`jaxlm.models.head`) multiplies.
    """
    c = self.config
    dtype = jnp.dtype(c.dtype)
    positions_BT = jnp.arange(ids_BT.shape[1])[None] if positions is None else positions
    length = ids_BT.shape[1] if cache is None else jnp.max(positions_BT) + 1
    context = Context(positions_BT, length, segment_ids)

    embed_VD = self.param("embed", sharded_normal, (c.V, c.D), c.D**-0.5, "vocab", "embed")
    x_BTD = _lookup(embed_VD, ids_BT).astype(dtype)
    if c.embed_scale == "root_width":
      x_BTD = x_BTD * jnp.asarray(c.D**0.5, dtype)
    blocks = [Block(c, kind, parent=None) for kind in c.attention]
    stacks = self.param("blocks", _init_stacks, blocks, c.layers // len(blocks), x_BTD, context)
    x_BTD, cache = _run(blocks, stacks, x_BTD, context, cache, c)
    x_BTD = all_gather(RMSNorm(c, name="norm")(x_BTD), "batch", "length", None)
    if c.tied:
      head_DV = embed_VD.T
    else:
      head_DV = self.param("head", sharded_normal, (c.D, c.V), c.D**-0.5, "embed", "vocab")
    if not logits:
      return x_BTD if cache is None else (x_BTD, cache)
    logits_BTV = linear(x_BTD, head_DV, (None, "vocab"), ("batch", "length", "act_vocab")).astype(
      jnp.float32
    )
    logits_BTV = soft_cap(logits_BTV, c.logit_cap)
    return logits_BTV if cache is None else (logits_BTV, cache)


def _lookup(embed_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """Rows of the embedding; on a mesh each device looks up its own part of T in the gathered table."""
  if not is_sharded():
    return embed_VD[ids_BT]
  ids_BT = shard(ids_BT, "batch", "norm_length")
  shape = (*ids_BT.shape, embed_VD.shape[1])
  table_VD = all_gather(embed_VD, None, None)
  return table_VD.at[ids_BT].get(out_sharding=out_sharding(shape, "batch", "norm_length", None))


def _init_stacks(
  key: jax.Array, blocks: list[Block], L: int, x_BTD: jax.Array, context: Context
) -> dict[str, Any]:
  def stack(block: Block, key: jax.Array) -> Any:
    return jax.vmap(lambda key: block.init(key, x_BTD, context)["params"])(jax.random.split(key, L))

  return {str(i): stack(block, jax.random.fold_in(key, i)) for i, block in enumerate(blocks)}


def _run(
  blocks: list[Block], stacks: dict, x_BTD: jax.Array, context: Context, cache, c: ModelConfig
):
  """All layers in order; `cache` has the structure {"0": KVCache stacked on L, ...} of the stacks, or is None."""

  def apply(block: Block, params: Any, x_BTD: jax.Array, layer_cache: KVCache | None):
    return block.apply({"params": params}, x_BTD, context, layer_cache)

  def group(x_BTD: jax.Array, params_and_cache: Any):
    params, caches = params_and_cache
    updated = {}
    for i, block in enumerate(blocks):
      run: Callable = functools.partial(apply, block)
      if c.remat != "none":
        run = jax.checkpoint(run, policy=_REMAT_POLICIES[c.remat], prevent_cse=not scanned)
      x_BTD, updated[str(i)] = run(params[str(i)], x_BTD, caches[str(i)])
    return x_BTD, updated

  scanned = _use_scan(c)
  no_cache = {str(i): None for i in range(len(blocks))}
  per_group = (stacks, no_cache if cache is None else cache)
  if scanned:
    x_BTD, updated = jax.lax.scan(group, x_BTD, per_group)
  else:
    outs = []
    for group_args in _unstack(per_group, c.layers // len(blocks)):
      x_BTD, out = group(x_BTD, group_args)
      outs.append(out)
    updated = jax.tree.map(lambda *layers: jnp.stack(layers), *outs)
  return x_BTD, None if cache is None else updated


def _use_scan(c: ModelConfig) -> bool:
  if c.scan == "auto":
    return jax.default_backend() != "cpu" or c.layers > _UNROLLED_LAYERS
  return c.scan == "always"


def _unstack(tree: Any, L: int) -> list[Any]:
  """One tree per row of the leading axis. By `split`, whose gradient is one concatenation instead of L padded sums."""
  leaves, structure = jax.tree.flatten(tree)
  columns = [[part[0] for part in jnp.split(leaf, L)] for leaf in leaves]
  return [jax.tree.unflatten(structure, row) for row in zip(*columns)]
