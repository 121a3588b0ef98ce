"""Computes native sparse attention, whole or one branch at a time."""

# B batch, T query positions, S key positions, N query heads, K key heads, G = N / K,
# H width of queries and keys, U width of values, C compressed blocks,
# I selected blocks of a query, X = 3 branches: compressed, selected, window
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention
from pallas_kernels.attention.checks import check_spread_alike
from pallas_kernels.common.checks import check, check_choice, check_dtype, check_shape
from pallas_kernels.common.platform import choose_implementation
from pallas_kernels.common.shards import check_not_sharded, run_on_shards, sharded_axes
from pallas_kernels.sparse_attention import checks, nonfinite, reference, selection, window
from pallas_kernels.sparse_attention.compression import block_starts
from pallas_kernels.sparse_attention.places import (
  PAPER_SIZES,
  BlockSizes,
  Options,
  make_places,
  segment_firsts,
)

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


class Selection(NamedTuple):
  """Holds what `nsa_select` returns."""

  o_BTNU: jax.Array  # output of the compressed branch, in the inputs' dtype
  lse_BTN: jax.Array  # its logsumexp, float32 or wider; -inf where a query sees no block
  indices_BTKI: jax.Array  # selected blocks, int32, ascending, then -1


class KeysValues(NamedTuple):
  """Holds the keys and values of one branch."""

  k: jax.Array  # [B, S, K, H], of the compressed branch [B, C, K, H]
  v: jax.Array  # [B, S, K, U], of the compressed branch [B, C, K, U]


def nsa_attention(
  q_BTNH: jax.Array,
  compressed: KeysValues,
  selected: KeysValues,
  windowed: KeysValues,
  gates_BTNX: jax.Array,
  *,
  sizes: BlockSizes = PAPER_SIZES,
  positions_BT: jax.Array | None = None,
  segment_ids_BS: jax.Array | None = None,
  scale: float | None = None,
  return_indices: bool = False,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> Any:
  """Returns the gated sum of attention to compressed blocks, to selected blocks and in a window.

  Blocks are selected by the probabilities of the compressed blocks (`nsa_select`), attended to
  token by token (`nsa_selected_attention`), and the window is that of
  `pallas_kernels.attention`. The three sets of keys and values are independent, and may be one.

  Args:
    q_BTNH: queries, float [B, T, N, H].
    compressed: keys [B, C, K, H] and values [B, C, K, U] of blocks, such as `compress_mlp` makes
      of those at `block_starts`; K divides N, U need not be H.
    selected: keys [B, S, K, H] and values [B, S, K, U].
    windowed: likewise.
    gates_BTNX: float [B, T, N, 3], the weights of the branches in the order above.
    sizes: of blocks and of the window, in tokens.
    positions_BT: integers [B or 1, T], which of the S keys each query stands at, by default the
      last T; -1 for a query that sees nothing. For decoding, where keys are a cache.
    segment_ids_BS: integers [B or 1, S], each segment in one piece. Blocks count from the segment's
      first token: rows of several segments give what each gives alone.
    scale: factor of the logits, by default H^-1/2.
    return_indices: also return the selected blocks, int32 [B, T, K, I].
    implementation: of the selected branch and, for "reference", of all; see
      `nsa_selected_attention`.
    interpret: as there.

  Returns:
    The output [B, T, N, U] in the queries' dtype, with return_indices in a tuple with the blocks.

  Raises:
    UserError: shapes, dtypes and sizes that do not fit.
    UnsupportedError: what the named implementation cannot do.

  Source: arXiv 2502.11089, equations 5 to 12.
  """
  q_BTNH, gates_BTNX = jnp.asarray(q_BTNH), jnp.asarray(gates_BTNX)
  check_shape("gates_BTNX", gates_BTNX, (*q_BTNH.shape[:3], 3))
  check_dtype("gates_BTNX", gates_BTNX, jnp.floating)
  T, S = q_BTNH.shape[1], selected[0].shape[1]
  where: dict[str, Any] = {"segment_ids_BS": segment_ids_BS, "scale": scale}
  names: dict[str, Any] = where | {"positions_BT": positions_BT, "implementation": implementation}
  if positions_BT is None and T != S:
    names["positions_BT"] = jnp.arange(S - T, S, dtype=jnp.int32)[None]
  whole = implementation if implementation == "reference" else None
  chosen = nsa_select(q_BTNH, *compressed, sizes=sizes, **names | {"implementation": whole})
  o_selected_BTNU, _ = nsa_selected_attention(
    q_BTNH, *selected, chosen.indices_BTKI, block=sizes.block, interpret=interpret, **names
  )
  o_windowed_BTNU = _window(q_BTNH, *windowed, positions_BT, segment_ids_BS, sizes, scale, whole)
  branches = (chosen.o_BTNU, o_selected_BTNU, o_windowed_BTNU)
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  gates_BTNX = gates_BTNX.astype(dtype)
  parts = [gates_BTNX[..., i, None] * o.astype(dtype) for i, o in enumerate(branches)]
  o_BTNU = sum(parts[1:], parts[0]).astype(q_BTNH.dtype)
  return (o_BTNU, chosen.indices_BTKI) if return_indices else o_BTNU


def nsa_select(
  q_BTNH: jax.Array,
  k_BCKH: jax.Array,
  v_BCKU: jax.Array,
  *,
  sizes: BlockSizes = PAPER_SIZES,
  positions_BT: jax.Array | None = None,
  segment_ids_BS: jax.Array | None = None,
  scale: float | None = None,
  implementation: Implementation | None = None,
) -> Selection:
  """Returns attention to the compressed blocks, and the blocks that its probabilities select.

  Query t sees compressed block i where it sees all its tokens, i stride + length - 1 <= t. The
  score of a block of `sizes.block` tokens is the probability of the compressed blocks, counted once
  for every stride that they share, summed over the heads of a group. Each query takes the `count`
  best blocks, its segment's first, its own and the one before it among them, none after its own; of
  equal scores the lower index. Gradients flow through output and logsumexp, not through the choice.

  Args:
    q_BTNH: queries, float [B, T, N, H].
    k_BCKH: keys of the compressed blocks in order, [B, C, K, H]. Without segments C may be more
      than the queries see, as in a cache.
    v_BCKU: their values, [B, C, K, U].
    sizes: length and stride of compressed blocks, size and count of the selected ones.
    positions_BT: integers [B or 1, T], by default 0 .. T - 1; -1 for a query that sees nothing.
    segment_ids_BS: integers [B or 1, S] of the tokens that the blocks were made of. Then block c is
      the one at `block_starts(S, ..., segment_ids_BS=)[:, c]`, and selected blocks count from the
      first token of the query's segment.
    scale: factor of the logits, by default H^-1/2.
    implementation: "xla", also for None, works by blocks of queries and has no array of T x C
      entries; "reference" has T x C of them for each head.

  Raises:
    UserError, UnsupportedError: as `nsa_attention`.

  Source: arXiv 2502.11089, equations 7 to 10. Equation 9 is read with indices that count from 1.
  """
  check_choice("implementation", implementation, (None, "reference", "xla"))
  q_BTNH, k_BCKH, v_BCKU = jnp.asarray(q_BTNH), jnp.asarray(k_BCKH), jnp.asarray(v_BCKU)
  checks.check_keys(("k_BCKH", "v_BCKU"), q_BTNH, k_BCKH, v_BCKU)
  options = checks.make_options(sizes, scale, q_BTNH.shape[-1], False)
  (B, T, _, _), C = q_BTNH.shape, k_BCKH.shape[1]
  positions_BT, segment_ids_BS = jax.tree.map(jnp.asarray, (positions_BT, segment_ids_BS))
  S = C * sizes.stride + sizes.length - 1 if segment_ids_BS is None else segment_ids_BS.shape[-1]
  checks.check_places(B, T, S, positions_BT, segment_ids_BS)
  if positions_BT is None:
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
  if segment_ids_BS is not None:
    whole = max(0, (S - sizes.length) // sizes.stride + 1)
    rule = f"S={S} tokens have C={whole} compressed blocks"
    check(C == whole, "k_BCKH.shape", k_BCKH.shape, rule)
  local = functools.partial(_select_locally, options=options, S=S, dense=implementation)
  arrays = (q_BTNH, k_BCKH, v_BCKU)
  rows = (positions_BT, segment_ids_BS)
  return Selection(*_on_shards(local, arrays, (), rows, outputs=3))


def nsa_selected_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  indices_BTKI: jax.Array,
  *,
  block: int = 64,
  positions_BT: jax.Array | None = None,
  segment_ids_BS: jax.Array | None = None,
  scale: float | None = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns causal attention of each query to the tokens of its own list of blocks.

  The forward and the backward pass visit selected blocks only, and sums have a fixed order. Any
  lists do, also those of another indexer. A query whose list names no block that it sees gets
  output 0, logsumexp -inf and passes on no gradient. Logits, softmax and sums are float32 (float64
  for float64 inputs). NaN in a key or value reaches the queries that see it, NaN in a query or in
  its output's gradient the gradients of the keys that it sees.

  Args:
    q_BTNH: queries, float [B, T, N, H].
    k_BSKH: keys of the same dtype, [B, S, K, H]; K divides N.
    v_BSKU: values of the same dtype, [B, S, K, U]; U need not be H.
    indices_BTKI: integers [B, T, K, I] in any order: block j holds tokens [j block, (j + 1) block)
      of the query's segment. An entry that names no block, such as -1, is skipped, and one that is
      there twice counts once.
    block: tokens of a block.
    positions_BT: integers [B or 1, T], which of the S keys each query stands at, by default the
      last T; -1 for a query that sees nothing.
    segment_ids_BS: integers [B or 1, S], each segment in one piece.
    scale: factor of the logits, by default H^-1/2.
    implementation: None takes the kernel of the platform, "pallas_tpu" or on Hopper "pallas_gpu"
      (16-bit inputs), where it can run the call, else "xla", and logs its choice once. "xla" runs
      the queries of each block together, in memory linear in T; up to 8 queries gather their keys
      instead. "reference" has T x S logits.
    interpret: True, or the interpreter's parameters, runs a named kernel on CPU.

  Returns:
    The output [B, T, N, U] in the inputs' dtype, and the logsumexp [B, T, N], float32 (float64 for
    float64 inputs); both have reverse-mode gradients.

  Raises:
    UserError, UnsupportedError: as `nsa_attention`.

  Source: arXiv 2502.11089, equations 11 and 12.
  """
  q_BTNH, k_BSKH, v_BSKU = jnp.asarray(q_BTNH), jnp.asarray(k_BSKH), jnp.asarray(v_BSKU)
  indices_BTKI = jnp.asarray(indices_BTKI)
  checks.check_keys(("k_BSKH", "v_BSKU"), q_BTNH, k_BSKH, v_BSKU)
  (B, T, _, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
  check_dtype("indices_BTKI", indices_BTKI, jnp.integer)
  check_shape("indices_BTKI", indices_BTKI, (B, T, K, None))
  positions_BT, segment_ids_BS = jax.tree.map(jnp.asarray, (positions_BT, segment_ids_BS))
  checks.check_places(B, T, S, positions_BT, segment_ids_BS)
  sizes = BlockSizes(length=block, stride=block, block=block)
  options = checks.make_options(sizes, scale, H, interpret)
  name = choose(implementation, q_BTNH, k_BSKH, v_BSKU, options)
  local = functools.partial(_attend_locally, name=name, options=options)
  arrays, rows = (q_BTNH, k_BSKH, v_BSKU), (positions_BT, segment_ids_BS)
  fused = name in KERNELS.values()
  o_BTNU, lse_BTN = _on_shards(local, arrays, (indices_BTKI,), rows, 2, fused)
  return o_BTNU, lse_BTN


def load(name: str) -> ModuleType:
  """Returns the module of an implementation, imported when it is first chosen."""
  return importlib.import_module(f"{__package__}.{name}")


def choose(
  implementation: Implementation | None,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array,
  options: Options,
) -> str:
  """Returns the implementation to run; raises UnsupportedError when the named one cannot."""

  def unsupported(name: str) -> str | None:
    return load(name).unsupported(q_BTNH, k_BSKH, v_BSKU, options)

  return choose_implementation(
    "nsa_selected_attention", implementation, KERNELS, unsupported, options.interpret
  )


def _select_locally(q_BTNH, k_BCKH, v_BCKU, positions_BT, segment_ids_BS, *, options, S, dense):
  """Attends to compressed blocks and selects on one device."""
  sizes, (B, T) = options.sizes, q_BTNH.shape[:2]
  arrays, K = (q_BTNH, k_BCKH, v_BCKU), k_BCKH.shape[2]
  places = make_places(T, S, positions_BT, segment_ids_BS)
  starts_BC = block_starts(
    S, length=sizes.length, stride=sizes.stride, segment_ids_BS=segment_ids_BS
  )
  if dense == "reference":
    return reference.compress_and_select(*arrays, starts_BC, places, S, options)
  v_BCKU, bad_BCK = nonfinite.hide(v_BCKU)
  # a query sees a compressed block like a key at the block's last token
  segments: dict[str, Any] = {}
  if segment_ids_BS is not None:
    at_BC = jnp.minimum(starts_BC, S - 1)
    owners_BC = jnp.take_along_axis(segment_firsts(segment_ids_BS), at_BC, axis=1)
    segments = {"q_segment_ids_BT": places.firsts_BT, "k_segment_ids_BS": owners_BC}
  o_BTNU, lse_BTN = attention(
    q_BTNH,
    k_BCKH,
    v_BCKU,
    q_positions_BT=places.positions_BT,
    k_positions_BS=starts_BC + (sizes.length - 1),
    scale=options.scale,
    return_lse=True,
    **segments,
  )
  if 0 in (B, T):
    return o_BTNU, lse_BTN, jnp.zeros((B, T, K, sizes.count), jnp.int32)
  # the blocks that a query sees are a range: they are in order
  rows = max(starts_BC.shape[0], places.positions_BT.shape[0])
  starts_BC = jnp.broadcast_to(starts_BC, (rows, starts_BC.shape[1]))
  search = jax.vmap(lambda starts_C, at_T: jnp.searchsorted(starts_C, at_T))
  seen_from_BT = search(starts_BC, jnp.broadcast_to(places.starts_BT(), (rows, T)))
  after_BT = jnp.broadcast_to(places.positions_BT - (sizes.length - 2), (rows, T))
  seen_to_BT = search(starts_BC, after_BT)
  o_BTNU = nonfinite.mark(o_BTNU, bad_BCK, seen_from_BT, seen_to_BT)
  fixed = jax.lax.stop_gradient((q_BTNH, k_BCKH, lse_BTN))
  return o_BTNU, lse_BTN, selection.select(*fixed, starts_BC, places, S, options)


def _attend_locally(
  q_BTNH, k_BSKH, v_BSKU, indices_BTKI, positions_BT, segment_ids_BS, *, name, options
):
  """Attends to selected blocks on one device."""
  (B, T, N, _), (S, U) = q_BTNH.shape, (k_BSKH.shape[1], v_BSKU.shape[3])
  if 0 in (B, T, S, indices_BTKI.shape[3]):
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    return jnp.zeros((B, T, N, U), q_BTNH.dtype), jnp.full((B, T, N), -jnp.inf, dtype)
  places = make_places(T, S, positions_BT, segment_ids_BS)
  return load(name).attend(q_BTNH, k_BSKH, v_BSKU, indices_BTKI, places, options)


def _window(q_BTNH, k_BSKH, v_BSKU, positions_BT, segment_ids_BS, sizes, scale, dense):
  """Attends in the window, on every device's rows and heads."""
  k_BSKH, v_BSKU = jnp.asarray(k_BSKH), jnp.asarray(v_BSKU)
  checks.check_keys(("windowed.k_BSKH", "windowed.v_BSKU"), q_BTNH, k_BSKH, v_BSKU)
  options = checks.make_options(sizes, scale, q_BTNH.shape[-1], False)
  local = functools.partial(window.attend, options=options, implementation=dense)
  rows = (positions_BT, segment_ids_BS)
  return _on_shards(local, (q_BTNH, k_BSKH, v_BSKU), (), rows, outputs=1)[0]


def _on_shards(
  local: Callable[..., Any],
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  lists: tuple[jax.Array, ...],
  rows: tuple[jax.Array | None, ...],
  outputs: int,
  fused: bool = False,
) -> Any:
  """Calls `local` on every device's rows and heads, without communication between them."""
  q_BTNH, k_BSKH, v_BSKU = arrays
  for name, array in (("q_BTNH", q_BTNH), ("k_BSKH", k_BSKH), ("v_BSKU", v_BSKU)):
    for dimension in (1, 3):
      check_not_sharded(name, array, dimension)
  batch, heads = sharded_axes(q_BTNH, 0), sharded_axes(q_BTNH, 2)
  for name, array in (("k_BSKH", k_BSKH), ("v_BSKU", v_BSKU)):
    check_spread_alike(name, array, (batch, (), heads))
  if not batch and not heads:
    return local(*arrays, *lists, *rows)
  by_row = [batch if array is not None and array.shape[0] > 1 else () for array in rows]
  layouts = (*((batch, (), heads, ()),) * (3 + len(lists)), *((axes, ()) for axes in by_row))
  out_specs = tuple(P(batch or None, None, heads or None) for _ in range(outputs))
  return run_on_shards(local, (*arrays, *lists, *rows), layouts, out_specs, check_vma=not fused)
