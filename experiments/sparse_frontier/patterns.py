"""Runs a trained dense model whose attention a training-free pattern makes sparse.

Patterns of prefill act on all queries. Those of a cache and of decoding act on the last query,
which reads the answer; those before it have seen all keys. A pattern keeps about `share` of the
keys; its blocks, pages and ends are those of arXiv 2504.17768 in proportion to the length.
"""

# B rows, T positions, S key positions, D model, N query heads, K key heads, H head width,
# U width of values, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import AttentionConfig
from jaxlm.models import Transformer
from jaxlm.models.block import Block
from jaxlm.models.mixers.attention import split_heads
from jaxlm.models.rope import apply_rope, rope_tables
from pallas_kernels.sparse_attention import training_free as sparse

Mask = Callable[[jax.Array, jax.Array, float], jax.Array]
"""(queries, keys, share) -> bool [B, T, N, S]: what each query attends to"""
MASS = {1 / 16: 0.5, 1 / 8: 0.7, 1 / 4: 0.9, 1 / 2: 0.97}
"""share -> the mass that FlexPrefill keeps, which decides its density by the input"""


def dense(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float = 1.0) -> jax.Array:
  """Returns the causal mask."""
  T, N, S = *q_BTNH.shape[1:3], k_BSKH.shape[1]
  causal_TS = jnp.arange(T)[:, None] + (S - T) >= jnp.arange(S)[None]
  return jnp.broadcast_to(causal_TS[None, :, None], (len(q_BTNH), T, N, S))


def vertical_slash(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float) -> jax.Array:
  """Returns half of the share as columns and half as diagonals."""
  S = k_BSKH.shape[1]
  lines = max(2, round(share * S / 2))
  forced = sparse.Lines(last=S // 8, first=1, near=min(lines, S // 64))
  return sparse.vertical_slash_mask(q_BTNH, k_BSKH, verticals=lines, slashes=lines, lines=forced)


def flex_prefill(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float) -> jax.Array:
  """Returns each head's fewest lines with the mass that belongs to this share."""
  S = k_BSKH.shape[1]
  forced = sparse.Lines(last=S // 8, first=1, near=S // 64)
  return sparse.flex_prefill_mask(q_BTNH, k_BSKH, mass=MASS[share], least=S // 64, lines=forced)


def block_sparse(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float) -> jax.Array:
  """Returns the blocks with the best means, of which three are forced."""
  S, block = k_BSKH.shape[1], _page(k_BSKH)
  blocks = max(3, round(share * S / block))
  return sparse.block_sparse_mask(q_BTNH, k_BSKH, blocks=blocks, block=block)


def quest(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float) -> jax.Array:
  """Returns the pages with the greatest bounds of q k, and the last query's own."""
  S, page = k_BSKH.shape[1], _page(k_BSKH)
  budget = round(share * S)
  page_BKP = sparse.quest_pages(q_BTNH[:, -1], k_BSKH, budget=budget, page=page)
  return _for_the_last(q_BTNH, k_BSKH, _named_by(page_BKP, jnp.arange(S) // page))


def snapkv(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float) -> jax.Array:
  """Returns the tokens that the last queries attend to most."""
  S = k_BSKH.shape[1]
  token_BKC = sparse.snapkv_tokens(q_BTNH, k_BSKH, capacity=round(share * S), kept=_kept(S))
  return _for_the_last(q_BTNH, k_BSKH, _named_by(token_BKC, jnp.arange(S)))


def ada_snapkv(q_BTNH: jax.Array, k_BSKH: jax.Array, share: float) -> jax.Array:
  """Returns such tokens with a capacity that heads share."""
  S = k_BSKH.shape[1]
  kept_BKS = sparse.ada_snapkv_mask(q_BTNH, k_BSKH, capacity=round(share * S), kept=_kept(S))
  return _for_the_last(q_BTNH, k_BSKH, kept_BKS)


PREFILL: dict[str, Mask] = {
  "vertical-slash": vertical_slash,
  "FlexPrefill": flex_prefill,
  "block-sparse": block_sparse,
}
CACHE: dict[str, Mask] = {"Quest": quest, "SnapKV": snapkv, "Ada-SnapKV": ada_snapkv}


def _page(k_BSKH: jax.Array) -> int:
  return max(4, k_BSKH.shape[1] // 64)


def _kept(S: int) -> sparse.Kept:
  return sparse.Kept(last=S // 16, kernel=5, first=1, near=S // 64)


def _named_by(name_BKC: jax.Array, name_S: jax.Array) -> jax.Array:
  """Returns bool [B, K, S]: whether a key's name is in the list."""
  return (name_BKC[..., None] == name_S[None, None, None]).any(axis=2)


def _for_the_last(q_BTNH: jax.Array, k_BSKH: jax.Array, kept_BKS: jax.Array) -> jax.Array:
  """Returns the causal mask, in which the last query sees only these keys of its group."""
  mask_BTNS = dense(q_BTNH, k_BSKH)
  kept_BNS = jnp.repeat(kept_BKS, q_BTNH.shape[2] // k_BSKH.shape[2], axis=1)
  return mask_BTNS.at[:, -1].set(kept_BNS)


@functools.partial(jax.jit, static_argnames=("model", "pattern", "share"))
def read_answers(
  model: Transformer, params: Any, ids_BT: jax.Array, *, pattern: str = "dense", share: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Returns the likeliest id after the last token, int [B], and the share of keys attended to.

  The share is of causal pairs for patterns of prefill and of the last query's keys for others; the
  mean over layers of attention.
  """
  mask = (PREFILL | CACHE | {"dense": dense})[pattern]
  in_prefill, densities = pattern in PREFILL, []
  x_BTD = model.embed(params, ids_BT)
  context = model.context(ids_BT.shape[1], None, None, True, "contiguous")

  def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array) -> jax.Array:
    mask_BTNS = mask(q_BTNH, k_BSKH, share)
    seen = mask_BTNS if in_prefill else mask_BTNS[:, -1:]
    densities.append(1 - sparse.sparsity(seen))
    return sparse.masked_attention(q_BTNH, k_BSKH, v_BSKU, mask_BTNS)

  def run(block: Block, x_BTD: jax.Array) -> jax.Array:
    y_BTD = block.mixer_norm(x_BTD)
    if isinstance(block.spec.mixer, AttentionConfig):
      mixed_BTD = _attend(block.mixer, y_BTD, context.positions_BT, attend)
    else:
      mixed_BTD = block.mixer(y_BTD, context)[0]
    x_BTD = x_BTD + mixed_BTD
    return x_BTD + block.feedforward(block.feedforward_norm(x_BTD))[0]

  for index, (_, repeats) in enumerate(model.config.stacks):
    for repeat in range(repeats):
      for name, block in model.blocks(index).items():
        own = jax.tree.map(lambda x, r=repeat: x[r], params["stacks"][str(index)][name])
        x_BTD = block.apply({"params": own}, x_BTD, method=run)
  logits_BTV = model.finish(params, x_BTD[:, -1:])
  return jnp.argmax(logits_BTV[:, 0], axis=-1), jnp.mean(jnp.stack(densities))


def _attend(mixer: Any, x_BTD: jax.Array, positions_BT: jax.Array, attend: Any) -> jax.Array:
  """Returns the output of an attention layer whose product with keys is `attend`."""
  c = mixer.spec
  q_BTNH, k_BTKH, v_BTKH = (split_heads(p(x_BTD), c.H) for p in (mixer.q, mixer.k, mixer.v))
  if c.rope is not None:
    tables = rope_tables(c.rope, positions_BT, c.H)
    q_BTNH, k_BTKH = apply_rope(q_BTNH, *tables), apply_rope(k_BTKH, *tables)
  o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
  return mixer.o(o_BTNH.reshape(*x_BTD.shape[:2], -1))
