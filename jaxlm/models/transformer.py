"""Runs the decoder: embed, run the stacks of layers, finish. Each stack is one scan."""

# B batch, T positions, D model, V vocabulary, R repeats of one stack

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, ModelConfig
from jaxlm.config.quant import find_spec
from jaxlm.models.block import Block
from jaxlm.models.embedding import Embedding
from jaxlm.models.head import Head
from jaxlm.models.linear import Linear, Roles
from jaxlm.models.mixers import MIXERS
from jaxlm.models.mixers.context import Context
from jaxlm.models.norms import RMSNorm
from jaxlm.models.parts import formats_of_repeats, make_blocks, make_head
from pallas_kernels.attention.mask import soft_cap
from pallas_kernels.common.checks import check, check_dtype, check_shape
from pallas_kernels.common.errors import UnsupportedError
from pallas_kernels.common.platform import platform
from sharding.context.order import Order, permutation, ring_size
from sharding.rules import all_gather, gather_layers, shard, shard_layers

Params = dict[str, Any]

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "names": jax.checkpoint_policies.save_only_these_names("attention_out", "feedforward_in"),
  "dots": jax.checkpoint_policies.save_only_these_names("product"),
}
# on CPU a Python loop over a few layers is faster than scan; more cost too much compile time
_UNROLLED_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Transformer:
  """Models text causally by functions of parameters, which are a plain nested dict.

  Parameters: `embed`; `stacks` {"0": {"0": ..., ...}, ...} with an entry for each of
  `config.stacks`, and in it one for each spec of a repeat, whose arrays have a leading axis R;
  `norm`; and `head` unless tied.
  """

  config: ModelConfig
  compute: ComputeConfig = ComputeConfig()

  def init(self, key: jax.Array) -> Params:
    """Draws float32 parameters, on a mesh sharded from the start; no forward pass is traced."""

    def draw(module: nn.Module, repeats: int | None, number: int) -> Params:
      def declare(key: jax.Array) -> Params:
        return module.init(key, method="declare")["params"]

      own_key = jax.random.fold_in(key, number)
      if repeats is None:
        return declare(own_key)
      return shard_layers(jax.vmap(declare)(jax.random.split(own_key, repeats)))

    return self._map_modules(draw)

  def apply(
    self,
    params: Params,
    ids_BT: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    in_order: bool = False,
    order: Order = "contiguous",
    cache: Any = None,
    key: jax.Array | None = None,
    logits: bool = True,
  ) -> Any:
    """Returns logits [B, T, V] in float32 of ids [B, T] int32; with a `cache`, also its update.

    positions: int32 [B or 1, T], in any order, by default 0 .. T-1. They decide what a token sees:
      those of its segment at its own position and before, in a window those less than it behind.
    segment_ids: int32 [B or 1, T], for packed rows; attention stays within a segment.
    in_order: promises that positions count up by one along each segment, which stands in one piece
      (padding aside), as the loader's rows do. Attention then goes by the order of the row: the
      fused kernels know no other. Default positions need no promise; a cache makes no use of it.
    order: which token of its row stands in which column of all [B, T] arguments, on a mesh with
      context_ring (`sharding.context.order`, and `jaxlm.data.ring` for batches). What `in_order`
      and default positions say is then said of rows in their own order.
    cache: from `init_cache`; the T positions are written into it and see what is there. Here
      positions may be -1: padding, which is written nowhere and which nothing sees. The logits of
      a position that the cache has no room for are NaN.
    key: of a training step, for formats that round gradients at random (`jaxlm.config.quant`).
    logits: False gives, in place of logits, the states [B, T, D] that `head` multiplies.
    """
    x_BTD, cache = self.run_layers(
      params,
      ids_BT,
      positions=positions,
      segment_ids=segment_ids,
      in_order=in_order,
      order=order,
      cache=cache,
      key=key,
    )
    out = self.finish(params, x_BTD, logits=logits)
    return out if cache is None else (out, cache)

  def run_layers(
    self,
    params: Params,
    ids_BT: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    in_order: bool = False,
    order: Order = "contiguous",
    cache: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Embeds and runs all stacks; arguments as in `apply`.

    Returns the states before the final norm, [B, T, D], and the updated cache or None.
    """
    _check_rows(ids_BT, positions, segment_ids)
    if cache is not None and segment_ids is not None:
      raise UnsupportedError("segment_ids: rows of several segments have no decode cache")
    B, T = ids_BT.shape
    context = self.context(T, positions, segment_ids, in_order, order)
    context = dataclasses.replace(context, key=key)
    if cache is not None:
      positions_BT = jnp.broadcast_to(context.positions_BT, (B, T))
      context = dataclasses.replace(context, positions_BT=shard(positions_BT, "batch", "length"))
    x_BTD = self.embed(params, ids_BT)
    updated = {}
    for index in range(len(self.config.stacks)):
      name = str(index)
      before = None if cache is None else cache[name]
      stack = params["stacks"][name]
      x_BTD, updated[name], _ = self.run_stack(index, stack, x_BTD, context, before)
    return x_BTD, None if cache is None else updated

  def context(
    self,
    T: int,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    in_order: bool,
    order: Order,
  ) -> Context:
    """Returns what all layers share; arguments as in `apply`, for rows of T tokens."""
    if positions is None:
      positions = jnp.asarray(permutation(order, T, ring_size()))[None]
      in_order = True
    return Context(positions, segment_ids, in_order, order)

  def embed(self, params: Params, ids_BT: jax.Array) -> jax.Array:
    """Returns the states before the first layer, [B, T, D] in the compute type."""
    x_BTD = _call(self._embedding, params["embed"], ids_BT)
    if self.config.embed_scale == "root_width":
      x_BTD = x_BTD * jnp.asarray(self.config.D**0.5, x_BTD.dtype)
    return x_BTD

  def run_stack(
    self, index: int, stack: Params, x_BTD: jax.Array, context: Context, cache: Any = None
  ) -> tuple[jax.Array, Any, Any]:
    """Runs layers of stack `index` of the configuration: all, or any slice of their repeats.

    `stack` and `cache` have a leading axis of as many repeats as are to be run. Where `stage`
    splits it, every device gathers all of them: training has `sharding.pipeline` instead. Returns
    x, the updated cache or None, and the layers' statistics, both stacked likewise.
    """
    stack = gather_layers(stack)
    repeats = jax.tree.leaves(stack)[0].shape[0]
    outs = []
    runs = self._runs(index, repeats)
    caches = cache if len(runs) > 1 and cache is not None else (cache,) * len(runs)
    for (start, stop), part, before in zip(runs, _cut(stack, runs), caches):
      blocks = self.blocks(index, start, stop)
      own = dataclasses.replace(context, key=_fold_in(context.key, index, start))
      x_BTD, out = self._run_repeats(blocks, (part, before), x_BTD, own)
      outs.append(out)
    updated, statistics = zip(*outs)
    if cache is not None:
      cache = updated if len(runs) > 1 else updated[0]
    return x_BTD, cache, _join(statistics)

  def _runs(self, index: int, repeats: int) -> list[tuple[int, int]]:
    """Returns the first repeat, and the one after the last, of runs with the same formats."""
    if not self.config.quant:
      return [(0, repeats)]
    formats = formats_of_repeats(self.config, index)
    cuts = [r for r in range(1, len(formats)) if formats[r] != formats[r - 1]]
    if cuts and repeats < len(formats):
      rule = "tell layers apart, which stages of a pipeline, and other slices of a stack, cannot"
      raise UnsupportedError(f"model.quant: rules {rule}")
    return list(zip([0, *cuts], [*cuts, repeats]))

  def _run_repeats(
    self, blocks: dict[str, Block], stack_and_cache: Any, x_BTD: jax.Array, context: Context
  ) -> tuple[jax.Array, Any]:
    """Runs repeats that are computed alike; returns x, and what they return, stacked."""
    repeats = jax.tree.leaves(stack_and_cache)[0].shape[0]
    scanned = self._scans and repeats > 1
    runs = {name: self._with_remat(block, scanned) for name, block in blocks.items()}

    keys = None if context.key is None else jax.random.split(context.key, repeats)

    def run_repeat(x_BTD: jax.Array, one_repeat: Any) -> tuple[jax.Array, Any]:
      (params, caches), key = one_repeat
      updated, statistics = {}, {}
      for name, run in runs.items():
        before = None if caches is None else caches[name]
        own = dataclasses.replace(context, key=_fold_in(key, int(name)))
        x_BTD, updated[name], statistics[name] = run(params[name], x_BTD, own, before)
      return x_BTD, (updated, statistics)

    if scanned:
      return jax.lax.scan(run_repeat, x_BTD, (stack_and_cache, keys))
    outs = []
    rows = [None] * repeats if keys is None else list(keys)
    for one_repeat in zip(_unstack(stack_and_cache, repeats), rows):
      x_BTD, out = run_repeat(x_BTD, one_repeat)
      outs.append(out)
    return x_BTD, jax.tree.map(lambda *layers: jnp.stack(layers), *outs)

  def finish(self, params: Params, x_BTD: jax.Array, *, logits: bool = True) -> jax.Array:
    """Norms the last states and returns float32 logits [B, T, V]; or the normed states alone."""
    x_BTD = _call(self._norm, params["norm"], x_BTD)
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    if not logits:
      return _call(self._head, self._head_params(params), x_BTD, method="input_in_use")
    return soft_cap(_call(self._head, self._head_params(params), x_BTD), self.config.logit_cap)

  def head(self, params: Params) -> Head:
    """Returns what makes logits of the normed states, for losses that never hold all logits."""
    spec = find_spec(self.config.quant, "head")
    if spec.gradient or spec.product:
      rule = "the loss never holds the logits' gradient: only weight and activation have formats"
      raise UnsupportedError(f"model.quant: matmul 'head': {rule}")
    weights = {"params": self._head_params(params)}
    w_DV: Any = self._head.apply(weights, method="weight_in_use")
    if self.config.tied:
      return Head(w_DV.T, "vd", self.config.logit_cap)
    return Head(w_DV, "dv", self.config.logit_cap)

  def init_cache(self, batch: int, length: int) -> Any:
    """Returns empty decode caches, in the structure of the stacks.

    They hold `length` positions of `batch` rows in every layer, in the compute type, or in bytes
    where a rule rounds them. Of a stack whose repeats have different formats there is a tuple with
    one entry for each run of equal ones.
    """
    caches: dict[str, Any] = {}
    sizes = (batch, length, self.compute.dtype)
    for index, (_, repeats) in enumerate(self.config.stacks):
      runs = tuple(
        {
          name: self._init_caches(block, *sizes)
          for name, block in self.blocks(index, start, stop).items()
        }
        for start, stop in self._runs(index, repeats)
      )
      caches[str(index)] = runs if len(runs) > 1 else runs[0]
    return caches

  def _init_caches(self, block: Block, batch: int, length: int, dtype: str) -> Any:
    """Returns the empty caches of the layers that a block computes, stacked."""
    mixer = block.spec.mixer

    def one_layer(_: jax.Array) -> Any:
      make = MIXERS[type(mixer)].init_cache
      return make(mixer, self.config, batch, length, dtype, block.layers)

    return jax.vmap(one_layer)(jnp.arange(len(block.layers)))  # keeps the sharding of one layer's

  def blocks(self, index: int, start: int = 0, stop: int | None = None) -> dict[str, Block]:
    """Returns the blocks of one repeat of stack `index`, in order; each knows its layers.

    These are those of the repeats from `start` to `stop`, by default to the last.
    """
    return make_blocks(self.config, self.compute, index, start, stop)

  @property
  def _embedding(self) -> Embedding:
    return Embedding(self.config.V, self.config.D, self.compute, parent=None)

  @property
  def _norm(self) -> RMSNorm:
    c = self.config
    return RMSNorm(c.D, c.norm_eps, c.norm_offset, parent=None)

  def _head_params(self, params: Params) -> Params:
    return {"weight": params["embed"]["weight"].T} if self.config.tied else params["head"]

  @property
  def _head(self) -> Linear:
    return make_head(self.config, self.compute)

  @property
  def _scans(self) -> bool:
    if self.compute.scan == "auto":
      return platform() != "cpu" or self.config.layers > _UNROLLED_LAYERS
    return self.compute.scan == "always"

  def _with_remat(self, block: Block, scanned: bool) -> Callable:
    def run(params: Params, x_BTD: jax.Array, context: Context, cache: Any) -> Any:
      rngs = {} if context.key is None else {"rounding": context.key}
      return block.apply({"params": params}, x_BTD, context, cache, rngs=rngs)

    remat = self.compute.remat
    if remat == "none":
      return run
    return jax.checkpoint(run, policy=_REMAT_POLICIES[remat], prevent_cse=not scanned)

  def _map_modules(self, create: Callable[[nn.Module, int | None, int], Any]) -> dict[str, Any]:
    """Calls create(module, repeats or None, a number of its own) for all; a tree like params."""
    tree: dict[str, Any] = {
      "embed": create(self._embedding, None, 0),
      "norm": create(self._norm, None, 1),
    }
    if not self.config.tied:
      tree["head"] = create(self._head, None, 2)
    tree["stacks"], number = {}, 3
    for index, (_, repeats) in enumerate(self.config.stacks):
      stack = tree["stacks"][str(index)] = {}
      for name, block in self.blocks(index).items():
        stack[name] = create(block, repeats, number)
        number += 1
    return tree


@functools.cache
def roles(config: ModelConfig) -> Roles:
  """Returns each parameter's role in a tree like params.

  One of "embedding", "matrix", "head", "norm", "bias", "taps" (of short convolutions), "scale" and
  "decayed_scale" (that formats learn) and "packed" (bytes, which do not train): what an
  optimizer groups by.
  """

  def declared(module: nn.Module, repeats: int | None, number: int) -> Roles:
    declared_roles: list[Roles] = []

    def declare(key: jax.Array) -> None:
      declared_roles.append(module.init_with_output(key, method="declare")[0])

    jax.eval_shape(declare, jax.random.key(0))
    return declared_roles[0]

  return Transformer(config)._map_modules(declared)


def _check_rows(
  ids_BT: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
) -> None:
  """Raises UserError, naming the argument, unless all are whole numbers of the same rows."""
  check_shape("ids_BT", ids_BT, (None, None))
  check_dtype("ids_BT", ids_BT, jnp.integer)
  B, T = ids_BT.shape
  for name, x in (("positions", positions), ("segment_ids", segment_ids)):
    if x is not None:
      check_shape(name, x, (None, T))
      check(x.shape[0] in (1, B), f"{name}.shape", tuple(x.shape), f"must have 1 or {B} rows")
      check_dtype(name, x, jnp.integer)


def _call(module: nn.Module, params: Params, *arguments: Any, method: str = "__call__") -> Any:
  return module.apply({"params": params}, *arguments, method=method)


def _fold_in(key: jax.Array | None, *data: int) -> jax.Array | None:
  """Returns a key of its own for these numbers, or None for None."""
  if key is None:
    return None
  for number in data:
    key = jax.random.fold_in(key, number)
  return key


def _cut(tree: Any, runs: list[tuple[int, int]]) -> list[Any]:
  """Cuts the leading axis of every leaf into these runs."""
  if len(runs) == 1:
    return [tree]
  leaves, structure = jax.tree.flatten(tree)
  columns = [jnp.split(leaf, [start for start, _ in runs[1:]]) for leaf in leaves]
  return [jax.tree.unflatten(structure, part) for part in zip(*columns)]


def _join(trees: Sequence[Any]) -> Any:
  """Joins the leading axes of trees that are alike."""
  return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def _unstack(tree: Any, R: int) -> list[Any]:
  """Returns one tree per row of the leading axis.

  By `split`, whose gradient is one concatenation instead of R padded sums.
  """
  leaves, structure = jax.tree.flatten(tree)
  columns = [[part[0] for part in jnp.split(leaf, R)] for leaf in leaves]
  return [jax.tree.unflatten(structure, row) for row in zip(*columns)]
