"""Attends to sequences that lie over several devices: Ulysses, ring, and both together."""

from sharding.context.api import hybrid_attention, ring_attention, ulysses_attention
from sharding.context.hybrid import hybrid_attention_shard
from sharding.context.parts import Rows, Variant
from sharding.context.ring import ring_attention_shard
from sharding.context.ulysses import ulysses_attention_shard

__all__ = [
  "Rows",
  "Variant",
  "hybrid_attention",
  "hybrid_attention_shard",
  "ring_attention",
  "ring_attention_shard",
  "ulysses_attention",
  "ulysses_attention_shard",
]
