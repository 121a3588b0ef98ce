"""Lists the kernels of selected attention and splash attention at the same shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from pallas_kernels.schedule.case import Case, array
from pallas_kernels.sparse_attention import nsa_selected_attention

TOKENS, HEADS, KEY_HEADS, WIDTH, CHOSEN, BLOCK = 65_536, 64, 4, 128, 16, 64

UNION = 28.3
"""Blocks that 8 queries select together: the mean of random walks with a memory of 50 tokens
(`python -m benchmarks.sparse_unions`)."""

TILES = (6.3, 1.4)
"""Tiles of 4 blocks of a group of 8 such query blocks, the longest of them, from the same table:
those that compare no positions, and those that do."""


def sparse_cases() -> Iterator[Case]:
  """Yields the kernels of selected attention for measured unions, and splash attention's.

  Where the gradients of a head's keys do not fit in VMEM, two kernels make the gradients: that of
  the keys goes through the query blocks of each block, 8 at a time. FLOPs are those of the chosen
  tokens: two products, five, and in two kernels three and four.
  """
  keys = (array(1, TOKENS, KEY_HEADS, WIDTH),) * 2
  args = (
    array(1, TOKENS, HEADS, WIDTH),
    *keys,
    array(1, TOKENS, KEY_HEADS, CHOSEN, dtype=jnp.int32),
  )
  attend = functools.partial(nsa_selected_attention, implementation="pallas_tpu")

  def loss(q: jax.Array, k: jax.Array, v: jax.Array, lists: jax.Array) -> jax.Array:
    return jnp.sum(attend(q, k, v, lists)[0].astype(jnp.float32))

  product = 2.0 * TOKENS * HEADS * CHOSEN * BLOCK * WIDTH
  query_blocks = UNION * TOKENS / 8 / (TOKENS / BLOCK)
  large, small = ("v5e", "v6e"), ("v5p", "tpu7x")  # VMEM of 128 and of 64 MiB
  for kernel, products, trips, chips in (
    ("forward", 2, TILES, ()),
    ("gradients", 5, TILES, large),
    ("dq", 3, TILES, small),
    ("dkv", 4, (1, query_blocks / 8), small),
  ):
    yield Case(
      name=f"sparse attention, {kernel}",
      shape=f"{TOKENS} x {HEADS} heads of {KEY_HEADS} x {WIDTH}, {CHOSEN} blocks of {BLOCK} bf16",
      fn=jax.grad(loss, (0, 1, 2)) if products > 2 else lambda *args: attend(*args)[0],
      args=args,
      flops=products * product,
      kernel=f"nsa_selected_{kernel}",
      trips=trips,
      chips=chips,
    )
  yield from splash_cases()


def splash_cases() -> Iterator[Case]:
  """Yields splash attention at the same shape: one head, 64 of which take 64 times the cycles.

  Blocks of 1024: 2080 of the 4096 steps of a causal head multiply.
  """
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((TOKENS, TOKENS))])
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  blocks: dict[str, Any] = dict.fromkeys(names, 1024)
  sizes = splash_attention_kernel.BlockSizes(
    **blocks, block_kv_compute=512, block_kv_dkv_compute=512
  )
  splash = splash_attention_kernel.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(splash(q, k, v).astype(jnp.float32))

  product = 1.0 * TOKENS**2 * WIDTH
  for kernel, products in (("forward", 2), ("dq", 3), ("dkv", 4)):
    yield Case(
      name=f"splash attention beside sparse, {kernel}",
      shape=f"{TOKENS} x 1 head x {WIDTH} causal bf16",
      fn=jax.grad(loss, (0, 1, 2)) if products > 2 else lambda *args: splash(*args),
      args=(array(1, TOKENS, WIDTH),) * 3,
      flops=products * product,
      kernel=kernel if products > 2 else "fwd",
    )
