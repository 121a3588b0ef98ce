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
from pallas_kernels.sparse_attention.pallas_tpu import make_plan
from pallas_kernels.sparse_attention.places import BlockSizes, Options, Places
from pallas_kernels.sparse_attention.tpu_forward import call_forward
from pallas_kernels.sparse_attention.tpu_gradients import call_gradients
from pallas_kernels.sparse_attention.tpu_tiles import ALIGN, LANES, Plan
from pallas_kernels.sparse_attention.unions import Unions

TOKENS, HEADS, KEY_HEADS, WIDTH, CHOSEN, BLOCK = 65_536, 64, 4, 128, 16, 64

TILES = (6.3, 1.4)
"""Tiles of 4 blocks of a group of 8 query blocks, without and with a comparison of positions: of
random walks with a memory of 50 tokens (`python -m benchmarks.sparse_unions`)."""


def sparse_cases() -> Iterator[Case]:
  """Yields the kernels of selected attention for measured unions, and splash attention's.

  The kernels alone, whose steps do not depend on what makes the lists: sorting these at full length
  takes minutes to compile. FLOPs are those of the chosen tokens: two products, and five.
  """
  product = 2.0 * TOKENS * HEADS * CHOSEN * BLOCK * WIDTH
  G = HEADS // KEY_HEADS
  q = array(KEY_HEADS, TOKENS * G, WIDTH)
  keys = (array(KEY_HEADS, TOKENS + ALIGN, WIDTH),) * 2
  shape = (KEY_HEADS, TOKENS * G // LANES, 1, LANES)
  positions, numbers = array(*shape, dtype=jnp.int32), array(*shape, dtype=jnp.float32)
  start_AXU: Any = array(*shape[:2], CHOSEN * LANES // G, dtype=jnp.int32)
  bits_AXUW: Any = array(*start_AXU.shape, 1, dtype=jnp.int32)
  full_AX: Any = array(*shape[:2], dtype=jnp.int32)
  unions = Unions(start_AXU, bits_AXUW, full_AX)

  def plan() -> Plan:
    q_BTNH: Any = array(1, TOKENS, HEADS, WIDTH)
    v_BSKU: Any = array(1, TOKENS, KEY_HEADS, WIDTH)
    options = Options(sizes=BlockSizes(block=BLOCK, count=CHOSEN), scale=WIDTH**-0.5)
    places = Places(jnp.zeros((1, TOKENS), jnp.int32))
    return make_plan(q_BTNH, v_BSKU, CHOSEN, places, options)

  def run(call: Any, *args: Any) -> Any:
    return call(*args[:-1], args[-1].rows(plan().stacked, plan().step_blocks), plan())

  for kernel, call, arrays, products, chips in (
    ("forward", call_forward, (q, *keys, positions), 2, ()),
    # elsewhere the gradients of so many keys do not fit in VMEM
    ("gradients", call_gradients, (q, q, *keys, positions, numbers, numbers), 5, ("v5e", "v6e")),
  ):
    yield Case(
      name=f"sparse attention, {kernel}",
      shape=f"{TOKENS} x {HEADS} heads of {KEY_HEADS} x {WIDTH}, {CHOSEN} blocks of {BLOCK} bf16",
      fn=functools.partial(run, call),
      args=(*arrays, unions),
      flops=products * product,
      kernel=f"nsa_selected_{kernel}",
      trips=TILES,
      chips=chips,
    )
  yield from splash_cases()


@functools.cache
def splash() -> Any:
  """Returns splash attention of one causal head; going through its mask takes seconds.

  Blocks of 1024: 2080 of the 4096 steps multiply.
  """
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((TOKENS, TOKENS))])
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  blocks: dict[str, Any] = dict.fromkeys(names, 1024)
  sizes = splash_attention_kernel.BlockSizes(
    **blocks, block_kv_compute=512, block_kv_dkv_compute=512
  )
  return splash_attention_kernel.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )


def splash_cases() -> Iterator[Case]:
  """Yields splash attention at the same shape: one head, 64 of which take 64 times the cycles."""

  def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return splash()(q, k, v)

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(forward(q, k, v).astype(jnp.float32))

  product = 1.0 * TOKENS**2 * WIDTH
  for kernel, products in (("forward", 2), ("dq", 3), ("dkv", 4)):
    yield Case(
      name=f"splash attention beside sparse, {kernel}",
      shape=f"{TOKENS} x 1 head x {WIDTH} causal bf16",
      fn=jax.grad(loss, (0, 1, 2)) if products > 2 else forward,
      args=(array(1, TOKENS, WIDTH),) * 3,
      flops=products * product,
      kernel=kernel if products > 2 else "fwd",
      prepare=splash,
    )
