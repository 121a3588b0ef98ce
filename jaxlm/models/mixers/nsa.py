"""Computes native sparse attention (Yuan et al. 2025, arXiv 2502.11089).

A query attends to compressed blocks, to the blocks that their probabilities select, and to a
window (`pallas_kernels.sparse_attention`); a gate of each head weighs the three. Keys are
compressed before they are rotated, and a compressed key turns with the position of its first token.
"""

# B batch, T query positions, S key positions, D model, N query heads, K key heads, H width of
# queries and keys, U width of values, C compressed blocks, L tokens of a compressed block,
# W window, X = L H, F hidden width of the compression, Z heads times width, R hidden width of gates

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, ModelConfig, NsaConfig
from jaxlm.config.quant import PLAIN
from jaxlm.models.linear import Linear, Roles, declare_parts, sharded_normal, sharded_zeros
from jaxlm.models.mixers.context import Context
from jaxlm.models.mixers.shards import check_whole_rows, run_on_rows_and_heads
from jaxlm.models.mixers.steps import (
  bring_back,
  bring_to_front,
  join,
  last_inputs,
  order_steps,
  write_places,
)
from jaxlm.models.rope import apply_rope, rope_tables
from jaxlm.quant.apply import turn
from jaxlm.quant.cache import Held, Specs, cache_specs, empty, hold, read, round_heads
from pallas_kernels.attention import attention
from pallas_kernels.sparse_attention import (
  BlockSizes,
  KeysValues,
  block_starts,
  compress_linear,
  compress_mean,
  compress_mlp,
  nsa_attention,
  nsa_select,
  nsa_selected_attention,
)
from sharding.rules import all_gather, all_gather_weight, shard, spec

BRANCHES = ("compressed", "selected", "window")
_NOWHERE = 2**30


class NsaCache(NamedTuple):
  """Holds what the three branches of one layer read; rotated, but for `raw`.

  Keys and values that rules round are held as codes and scales.
  """

  seen_B: jax.Array
  """int32, the position that comes next"""
  k_compressed_BCKH: Held
  v_compressed_BCKU: Held
  k_raw_BLKH: jax.Array
  """last tokens of the compressed branch, from which the next block is made: not rounded"""
  v_raw_BLKU: jax.Array
  k_selected_BSKH: Held
  v_selected_BSKU: Held
  k_window_BWKH: Held
  v_window_BWKU: Held


class Nsa(nn.Module):
  """Projects, attends by three gated branches, projects back."""

  spec: NsaConfig
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]

  def setup(self) -> None:
    """Makes the projections, the gate and the compression of keys and of values."""
    c, D, U = self.spec, self.config.D, self.spec.value_width
    for count, axis in ((c.N, "heads"), (c.K, "kv_heads")):
      spec((count,), axis)  # refuses a mesh that would split a head
    linear: Callable[..., Linear] = functools.partial(
      Linear, compute=self.compute, rules=self.config.quant, layers=self.layers
    )
    heads = ("batch", "length", "act_heads")
    self.q = linear((D, c.N * c.H), D**-0.5, ("embed", "heads"), heads)
    for branch in self._branches:
      for name, width in (("k", c.H), ("v", U)):
        project = linear((D, c.K * width), D**-0.5, ("embed", "kv_heads"), heads)
        setattr(self, f"{name}_{branch}", project)
    own = ("batch", "norm_length", None)
    gate: Any = (D, 3 * c.N), D**-0.5, ("embed", "heads")
    if (R := c.gate_hidden) is not None:
      self.gate_up = linear((D, R), D**-0.5, ("embed", None), own)
      gate = (R, 3 * c.N), R**-0.5, (None, "heads")
    self.gate = linear(*gate, heads, out_dtype="float32")
    out_std = (c.N * U * 2 * self.config.layers) ** -0.5
    self.o = linear((c.N * U, D), out_std, ("heads", "embed"), own)
    for name, shape in c.compression_shapes.items():
      draw: tuple[Any, ...] = (sharded_normal, shape, shape[1] ** -0.5, *_MATRIX)
      if name.endswith("position"):
        draw = (sharded_zeros, shape, "kv_heads", None, None)
      setattr(self, name, self.param(name, *draw))

  @property
  def _branches(self) -> tuple[str, ...]:
    return BRANCHES[:1] if self.spec.shared else BRANCHES

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    names = [f"{name}_{branch}" for branch in self._branches for name in "kv"]
    names += [] if self.spec.gate_hidden is None else ["gate_up"]
    roles = declare_parts(self, "q", *names, "gate", "o")
    own = self.spec.compression_shapes
    return roles | {n: "embedding" if n.endswith("position") else "matrix" for n in own}

  @staticmethod
  def init_cache(
    spec: NsaConfig,
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: str,
    layers: Sequence[int],
  ) -> NsaCache:
    """Returns an empty cache of any of `layers`, which have the same formats."""
    c, specs = spec, cache_specs(spec, config.quant, layers)
    blocks = max(0, (length - c.length) // c.stride + 1)
    sizes = {"compressed": blocks, "raw": c.length, "selected": length}
    sizes |= {"window": min(c.window, length)}
    held = [
      empty((batch, size, c.K, width), specs.get(f"{branch}.{part}", PLAIN), dtype)
      for branch, size in sizes.items()
      for part, width in (("keys", c.H), ("values", c.value_width))
    ]
    axes = ("batch", None, "act_heads", None)
    zeros = jax.tree.map(lambda x: shard(x, *axes[: x.ndim]), held)
    return NsaCache(shard(jnp.zeros(batch, jnp.int32), "batch"), *zeros)

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: NsaCache | None = None
  ) -> tuple[jax.Array, NsaCache | None, dict[str, jax.Array]]:
    """Returns the layer's output [B, T, D], its updated cache or None, and no statistics."""
    check_whole_rows("NsaConfig", context.in_order, cache is not None)
    # the gates' hidden states are whole on every device, which computes them for its own tokens
    gate_in = None if self.spec.gate_hidden is None else jax.nn.gelu(self.gate_up(x_BTD))
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    gate_in = x_BTD if gate_in is None else all_gather(gate_in, "batch", "length", None)
    arrays: dict[str, Any] = {"q_BTZ": self.q(x_BTD), "gate_BTZ": self.gate(gate_in)}
    for branch in self._branches:
      for name in "kv":
        arrays[f"{name}_{branch}_BTZ"] = getattr(self, f"{name}_{branch}")(x_BTD)
    for name in self.spec.compression_shapes:
      if name.endswith("position"):
        arrays[f"{name}_KLH"] = getattr(self, name)
      else:
        compute = (self.compute.dtype, self.compute.reduce_dtype)
        weight = all_gather_weight(getattr(self, name), ("kv_heads", None, None), *compute)
        arrays[f"{name}_KXF"] = weight
    arrays["positions_BT"] = context.positions_BT
    quant = cache_specs(self.spec, self.config.quant, self.layers)
    if cache is None:
      arrays["segment_ids_BT"] = context.segment_ids_BT
      attend = functools.partial(_attend, self.spec, quant)
      outs = run_on_rows_and_heads(attend, arrays, ("o_BTZ",))
      return self.o(outs["o_BTZ"]), None, {}
    held = {_name(path, x): x for path, x in jax.tree_util.tree_leaves_with_path(cache)}
    structure = jax.tree.structure(cache)

    def attend_cached(**arrays: jax.Array) -> dict[str, jax.Array]:
      before = jax.tree.unflatten(structure, [arrays.pop(name) for name in held])
      o_BTZ, after = _attend_cached(self.spec, quant, before, **arrays)
      return {"o_BTZ": o_BTZ, **dict(zip(held, jax.tree.leaves(after)))}

    outs = run_on_rows_and_heads(attend_cached, arrays | held, ("o_BTZ", *held))
    return self.o(outs.pop("o_BTZ")), jax.tree.unflatten(structure, list(outs.values())), {}


_MATRIX = ("kv_heads", "embed", None)


def _name(path: tuple[Any, ...], x: jax.Array) -> str:
  """Returns the name of an array of the cache, with a letter for each axis."""
  field, letters = path[0].name.rsplit("_", 1)
  return "_".join((field, *(part.key for part in path[1:]), letters[: x.ndim]))


def _attend(
  c: NsaConfig,
  quant: Specs,
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array | None = None,
  **arrays: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the heads' outputs, o [B, T, N * U]; all of one device's rows and heads."""
  q_BTNH, gates_BTNX, branches = _split(c, arrays)
  S = q_BTNH.shape[1]
  sizes = {"length": c.length, "stride": c.stride}
  starts_BC = block_starts(S, **sizes, segment_ids_BS=segment_ids_BT)
  rows = max(len(positions_BT), len(starts_BC))
  first_BC = jnp.take_along_axis(
    jnp.broadcast_to(positions_BT, (rows, S)),
    jnp.broadcast_to(jnp.minimum(starts_BC, S - 1), (rows, starts_BC.shape[1])),
    axis=1,
  )
  k_BCKH, v_BCKU = _compress(c, arrays, *branches["compressed"], starts_BC)
  pairs = {"compressed": (_rotate(c, k_BCKH, first_BC), v_BCKU)}
  for branch in BRANCHES[1:]:
    k_BSKH, v_BSKU = branches[branch]
    pairs[branch] = (_rotate(c, k_BSKH, positions_BT), v_BSKU)
  rounded = {
    branch: KeysValues(
      round_heads(_turn(k_BSKH, quant), quant[f"{branch}.keys"]),
      round_heads(v_BSKU, quant[f"{branch}.values"]),
    )
    for branch, (k_BSKH, v_BSKU) in pairs.items()
  }
  o_BTNU = nsa_attention(
    _turn(_rotate(c, q_BTNH, positions_BT), quant),
    rounded["compressed"],
    rounded["selected"],
    rounded["window"],
    gates_BTNX,
    sizes=_sizes(c),
    segment_ids_BS=segment_ids_BT,
  )
  return {"o_BTZ": o_BTNU.reshape(*o_BTNU.shape[:2], -1)}


def _attend_cached(
  c: NsaConfig,
  quant: Specs,
  cache: NsaCache,
  positions_BT: jax.Array,
  **arrays: jax.Array,
) -> tuple[jax.Array, NsaCache]:
  """Returns the heads' outputs, o [B, T, N * U], and the updated cache."""
  seen_B = cache.seen_B
  steps = order_steps(positions_BT, seen_B)
  arrays = {n: bring_to_front(x, steps) if "_BT" in n else x for n, x in arrays.items()}
  q_BTNH, gates_BTNX, branches = _split(c, arrays)
  index_1T = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None]
  at_BT = jnp.where(steps.is_token_BT, seen_B[:, None] + index_1T, -1)
  q_BTNH = _turn(_rotate(c, q_BTNH, at_BT), quant)

  def hold_pair(branch: str, k_BTKH: jax.Array, v_BTKU: jax.Array) -> list[Held]:
    specs = quant[f"{branch}.keys"], quant[f"{branch}.values"]
    return [hold(x, s) for x, s in zip((_turn(k_BTKH, quant), v_BTKU), specs)]

  def read_pair(branch: str, held: Sequence[Held]) -> list[jax.Array]:
    specs, widths = (quant[f"{branch}.keys"], quant[f"{branch}.values"]), (c.H, c.value_width)
    return [read(x, s, width, q_BTNH.dtype) for x, s, width in zip(held, specs, widths)]

  raw = [join(*pair) for pair in zip((cache.k_raw_BLKH, cache.v_raw_BLKU), branches["compressed"])]
  index_BC, compressed = _compress_next(c, arrays, raw[0], raw[1], seen_B, steps.count_B)
  blocks = [cache.k_compressed_BCKH, cache.v_compressed_BCKU]
  blocks = write_places(blocks, hold_pair("compressed", *compressed), index_BC)
  k_BCKH, v_BCKU = read_pair("compressed", blocks)
  chosen = nsa_select(q_BTNH, k_BCKH, v_BCKU, sizes=_sizes(c), positions_BT=at_BT)

  k_BTKH, v_BTKU = branches["selected"]
  selected = hold_pair("selected", _rotate(c, k_BTKH, at_BT), v_BTKU)
  selected = write_places([cache.k_selected_BSKH, cache.v_selected_BSKU], selected, at_BT)
  k_BSKH, v_BSKU = read_pair("selected", selected)
  o_selected_BTNU, _ = nsa_selected_attention(
    q_BTNH, k_BSKH, v_BSKU, chosen.indices_BTKI, block=c.block, positions_BT=at_BT
  )

  k_BTKH, v_BTKU = branches["window"]
  window = hold_pair("window", _rotate(c, k_BTKH, at_BT), v_BTKU)
  window = jax.tree.map(join, [cache.k_window_BWKH, cache.v_window_BWKU], window)
  k_BWKH, v_BWKU = read_pair("window", window)
  past_1W = jnp.arange(k_BWKH.shape[1] - at_BT.shape[1], dtype=jnp.int32)[None]
  keys_at_BS = jnp.concatenate((seen_B[:, None] - past_1W[:, ::-1] - 1, at_BT), axis=1)
  o_window_BTNU = attention(
    q_BTNH,
    k_BWKH,
    v_BWKU,
    q_positions_BT=at_BT,
    k_positions_BS=jnp.where(keys_at_BS < 0, _NOWHERE, keys_at_BS),
    window=c.window,
  )
  outputs = (chosen.o_BTNU, o_selected_BTNU, o_window_BTNU)
  parts = [gates_BTNX[..., i, None] * o.astype(jnp.float32) for i, o in enumerate(outputs)]
  o_BTNU = sum(parts[1:], parts[0]).astype(q_BTNH.dtype)
  has_room_BT = at_BT < k_BSKH.shape[1]
  o_BTNU = jnp.where(has_room_BT[..., None, None], o_BTNU, jnp.nan)
  last = functools.partial(last_inputs, steps=steps)
  after = NsaCache(steps.seen_B, *blocks, *map(last, raw), *selected, *jax.tree.map(last, window))
  return bring_back(o_BTNU.reshape(*o_BTNU.shape[:2], -1), steps), after


def _sizes(c: NsaConfig) -> BlockSizes:
  return BlockSizes(length=c.length, stride=c.stride, block=c.block, count=c.count, window=c.window)


def _split(
  c: NsaConfig, arrays: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
  """Returns queries, gates in [0, 1] and each branch's keys and values, all by heads."""
  B, T, _ = arrays["q_BTZ"].shape
  q_BTNH = arrays["q_BTZ"].reshape(B, T, -1, c.H)
  gates_BTNX = jax.nn.sigmoid(arrays["gate_BTZ"].reshape(B, T, -1, 3))
  branches = {}
  for branch in BRANCHES:
    source = BRANCHES[0] if c.shared else branch
    k_BTKH = arrays[f"k_{source}_BTZ"].reshape(B, T, -1, c.H)
    branches[branch] = (k_BTKH, arrays[f"v_{source}_BTZ"].reshape(B, T, -1, c.value_width))
  return q_BTNH, gates_BTNX, branches


def _rotate(c: NsaConfig, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
  return x_BTNH if c.rope is None else apply_rope(x_BTNH, *rope_tables(c.rope, positions_BT, c.H))


def _turn(x_BTNH: jax.Array, quant: Specs) -> jax.Array:
  """Returns queries or keys rotated as the rules say, which is the same for all branches."""
  return turn(x_BTNH, quant[f"{BRANCHES[0]}.keys"].hadamard)


def _compress(
  c: NsaConfig,
  arrays: Mapping[str, jax.Array],
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  starts_BC: jax.Array,
) -> list[jax.Array]:
  """Returns the key, not rotated, and the value of each block that begins at `starts_BC`."""
  if c.compression == "mean":
    return [compress_mean(x_BSKZ, starts_BC, length=c.length) for x_BSKZ in (k_BSKH, v_BSKU)]
  compressed = []
  for name, x_BSKZ in (("k", k_BSKH), ("v", v_BSKU)):
    K, width = x_BSKZ.shape[2:]
    up_KLHF = arrays[f"{name}_up_KXF"].reshape(K, c.length, width, -1)
    position_KLH = arrays[f"{name}_position_KLH"]
    if c.compression == "linear":
      compressed.append(compress_linear(x_BSKZ, starts_BC, up_KLHF, position_KLH))
    else:
      down_KFZ = arrays[f"{name}_down_KXF"]
      compressed.append(compress_mlp(x_BSKZ, starts_BC, up_KLHF, down_KFZ, position_KLH))
  return compressed


def _compress_next(
  c: NsaConfig,
  arrays: Mapping[str, jax.Array],
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  seen_B: jax.Array,
  count_B: jax.Array,
) -> tuple[jax.Array, list[jax.Array]]:
  """Returns numbers, keys and values of the blocks whose last token is one of this call.

  Keys and values are the last L of before and then those of this call. Where there is no such
  block the number is -1.
  """
  S = k_BSKH.shape[1]
  most = (S - c.length) // c.stride + 1
  first_B = jnp.maximum(-((c.length - 1 - seen_B) // c.stride), 0)
  index_BC = first_B[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
  exists_BC = index_BC * c.stride + c.length <= (seen_B + count_B)[:, None]
  starts_BC = index_BC * c.stride - seen_B[:, None] + c.length
  starts_BC = jnp.where(exists_BC, starts_BC, S)
  k_BCKH, v_BCKU = _compress(c, arrays, k_BSKH, v_BSKU, starts_BC)
  k_BCKH = _rotate(c, k_BCKH, index_BC * c.stride)
  return jnp.where(exists_BC, index_BC, -1), [k_BCKH, v_BCKU]
