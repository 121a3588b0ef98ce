"""Computes Kimi delta attention (arXiv 2510.26692) and the recurrences that it contains.

A head keeps a state S [H, U]. A token decays it, erases what it holds for the token's key, writes
the value under that key and reads with the query (`pallas_kernels.delta_attention`). Gated delta
rule: arXiv 2412.06464; DeltaNet: 2406.06484; gated linear attention: 2312.06635; Lightning
attention: 2401.04658, with the same slopes in all layers.
"""

# B batch, T positions, D model, N value heads, K key heads, H width of queries and keys, U width of
# values, Z heads times width, W taps, P = W - 1 inputs before the first position

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ComputeConfig, KdaConfig, ModelConfig
from jaxlm.models.convolution import short_convolution
from jaxlm.models.linear import Linear, Roles, declare_parts, sharded_normal
from jaxlm.models.mixers.attention import split_heads
from jaxlm.models.mixers.context import Context
from jaxlm.models.mixers.shards import check_whole_rows, run_on_rows_and_heads
from jaxlm.models.mixers.steps import (
  bring_back,
  bring_to_front,
  join,
  last_inputs,
  mask_padding,
  order_steps,
)
from jaxlm.models.norms import RMSNorm
from pallas_kernels.delta_attention import delta_attention, delta_step
from sharding.rules import all_gather, own_part, shard, spec, weight_shape


class KdaCache(NamedTuple):
  """Holds the states of one layer and the last inputs of its convolutions."""

  seen_B: jax.Array
  """int32, the position that comes next"""
  state_BNHU: jax.Array
  """float32"""
  q_inputs_BPZ: jax.Array
  k_inputs_BPZ: jax.Array
  v_inputs_BPZ: jax.Array


class Kda(nn.Module):
  """Projects, convolves over a few tokens, runs the recurrence, norms, gates, projects back."""

  spec: KdaConfig
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]

  def setup(self) -> None:
    """Makes the projections, convolutions, gates and the norm."""
    c, D, rule = self.spec, self.config.D, self.spec.recurrence
    Z, V, R = c.K * c.H, c.N * c.value_width, c.bottleneck
    for count, axis in ((c.N, "heads"), (c.K, "kv_heads")):
      spec((count,), axis)  # refuses a mesh that would split a head
    linear: Callable[..., Linear] = functools.partial(
      Linear, compute=self.compute, rules=self.config.quant, layers=self.layers
    )
    heads, own = ("batch", "length", "act_heads"), ("batch", "norm_length", None)
    self.q = linear((D, Z), D**-0.5, ("embed", "kv_heads"), heads)
    self.k = linear((D, Z), D**-0.5, ("embed", "kv_heads"), heads)
    self.v = linear((D, V), D**-0.5, ("embed", "heads"), heads)
    out_std = (V * 2 * self.config.layers) ** -0.5
    self.o = linear((V, D), out_std, ("heads", "embed"), ("batch", "norm_length", None))
    self.o_norm = RMSNorm(c.value_width, self.config.norm_eps, self.config.norm_offset)
    exact: Callable[..., Linear] = functools.partial(linear, out=heads, out_dtype="float32")
    if rule.erases:
      self.beta = exact((D, c.N), D**-0.5, ("embed", "heads"))
    if rule.decay == "channel":
      self.decay_down = linear((D, R), D**-0.5, ("embed", None), own)
      self.decay_up = exact((R, c.N * c.H), R**-0.5, (None, "heads"))
    elif rule.decay == "head":
      self.decay = exact((D, c.N), D**-0.5, ("embed", "heads"))
    if self._is_gated:
      self.A_log = self.param("A_log", _draw_rates, c.N)
      self.dt_bias = self.param("dt_bias", _draw_steps, c.N * self._decays_per_head)
    if c.out_gate != "none":
      self.gate_down = linear((D, R), D**-0.5, ("embed", None), own)
      self.gate_up = linear((R, V), R**-0.5, (None, "heads"), heads)
    if c.conv:
      for name, channels, axis in (("q", Z, "kv_heads"), ("k", Z, "kv_heads"), ("v", V, "heads")):
        draw = (sharded_normal, (c.conv, channels), c.conv**-0.5, None, axis)
        setattr(self, f"{name}_conv", self.param(f"{name}_conv", *draw))

  @property
  def _is_gated(self) -> bool:
    return self.spec.recurrence.decay in ("channel", "head")

  @property
  def _bottlenecks(self) -> list[str]:
    names = {"decay_down": self.spec.recurrence.decay == "channel"}
    names |= {"gate_down": self.spec.out_gate != "none"}
    return [name for name, exists in names.items() if exists]

  @property
  def _decays_per_head(self) -> int:
    return self.spec.H if self.spec.recurrence.decay == "channel" else 1

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    names = ["q", "k", "v", "o", "o_norm"]
    names += ["beta"] if self.spec.recurrence.erases else []
    decays = {"channel": ["decay_down", "decay_up"], "head": ["decay"]}
    names += decays.get(self.spec.recurrence.decay, [])
    names += ["gate_down", "gate_up"] if self.spec.out_gate != "none" else []
    roles = declare_parts(self, *names)
    if self._is_gated:
      roles |= {"A_log": "bias", "dt_bias": "bias"}
    return roles | ({f"{name}_conv": "taps" for name in "qkv"} if self.spec.conv else {})

  @staticmethod
  def init_cache(
    spec: KdaConfig,
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: str,
    layers: Sequence[int],
  ) -> KdaCache:
    """Returns an empty cache of any of `layers`, which is as large for any `length`."""
    c, past = spec, max(spec.conv - 1, 0)
    state_BNHU = jnp.zeros((batch, c.N, c.H, c.value_width), jnp.float32)
    zeros = [jnp.zeros((batch, past, c.K * c.H), dtype)] * 2
    zeros.append(jnp.zeros((batch, past, c.N * c.value_width), dtype))
    return KdaCache(
      shard(jnp.zeros(batch, jnp.int32), "batch"),
      shard(state_BNHU, "batch", "act_heads", None, None),
      *(shard(x_BPZ, "batch", None, "act_heads") for x_BPZ in zeros),
    )

  def __call__(
    self, x_BTD: jax.Array, context: Context, cache: KdaCache | None = None
  ) -> tuple[jax.Array, KdaCache | None, dict[str, jax.Array]]:
    """Returns the layer's output [B, T, D], its updated cache or None, and no statistics."""
    c, rule = self.spec, self.spec.recurrence
    check_whole_rows(f"KdaConfig(rule={c.rule!r})", context.in_order, cache is not None)
    # bottlenecks are whole on every device, which computes them for its own tokens
    bottlenecks = {name: getattr(self, name)(x_BTD) for name in self._bottlenecks}
    low_BTR = {n: all_gather(x, "batch", "length", None) for n, x in bottlenecks.items()}
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    arrays: dict[str, Any] = {f"{name}_BTZ": getattr(self, name)(x_BTD) for name in "qkv"}
    if c.conv:
      arrays |= {f"{name}_taps_WZ": getattr(self, f"{name}_conv") for name in "qkv"}
    if rule.erases:
      arrays["beta_BTN"] = self.beta(x_BTD)
    if rule.decay == "channel":
      arrays["decay_BTZ"] = self.decay_up(low_BTR["decay_down"])
    elif rule.decay == "head":
      arrays["decay_BTZ"] = self.decay(x_BTD)
    elif rule.decay == "fixed":
      arrays["slope_N"] = _slopes(c.N)
    if self._is_gated:
      arrays |= {"A_log_N": self.A_log, "dt_bias_Z": self.dt_bias}
    if cache is None:
      arrays["segment_ids_BT"] = context.segment_ids_BT
      outs = run_on_rows_and_heads(functools.partial(_mix, c), arrays, ("o_BTZ",))
    else:
      arrays |= {"positions_BT": context.positions_BT, **cache._asdict()}
      results = ("o_BTZ", *KdaCache._fields)
      outs = run_on_rows_and_heads(functools.partial(_mix_cached, c), arrays, results)
    o_BTZ = outs.pop("o_BTZ")
    o_BTNU = self.o_norm(split_heads(o_BTZ, c.value_width))
    if c.out_gate != "none":
      gate_BTNU = split_heads(self.gate_up(low_BTR["gate_down"]), c.value_width)
      gate_BTNU = _GATES[c.out_gate](gate_BTNU.astype(jnp.float32))
      o_BTNU = (o_BTNU.astype(jnp.float32) * gate_BTNU).astype(o_BTNU.dtype)
    y_BTD = self.o(o_BTNU.reshape(o_BTZ.shape))
    return y_BTD, None if cache is None else KdaCache(**outs), {}


_GATES = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu}
_SHUT = -1e30  # a gate's input that leaves the state as it is


def _draw_rates(key: jax.Array, heads: int) -> jax.Array:
  """Returns logs of rates, uniform in [1, 16], float32 [N]."""
  size = weight_shape((heads,), "heads")
  return shard(jnp.log(jax.random.uniform(key, size, jnp.float32, 1.0, 16.0)), "heads")


def _draw_steps(key: jax.Array, width: int) -> jax.Array:
  """Returns what softplus makes steps of, log-uniform in [0.001, 0.1], float32 [Z]."""
  size = weight_shape((width,), "heads")
  steps_Z = jnp.exp(jax.random.uniform(key, size, jnp.float32, np.log(1e-3), np.log(1e-1)))
  return shard(steps_Z + jnp.log(-jnp.expm1(-steps_Z)), "heads")


def _slopes(N: int) -> jax.Array:
  """Returns the decay of each head per token as a negative log, 2^(-8 (n + 1) / N), float32 [N]."""
  slope_N = jnp.exp2(-8 * (jnp.arange(N, dtype=jnp.float32) + 1) / N)
  return own_part(shard(slope_N, "act_heads"), "act_heads")


def _mix(
  c: KdaConfig, segment_ids_BT: jax.Array | None = None, **arrays: jax.Array
) -> dict[str, jax.Array]:
  """Returns the heads' outputs, o [B, T, N * U]; all of one device's rows and heads."""
  qkv, options = _terms(c, arrays, segment_ids_BT)
  o_BTNU = delta_attention(*qkv, segment_ids_BT=segment_ids_BT, **options)
  return {"o_BTZ": o_BTNU.reshape(arrays["v_BTZ"].shape)}


def _mix_cached(
  c: KdaConfig,
  positions_BT: jax.Array,
  seen_B: jax.Array,
  state_BNHU: jax.Array,
  **arrays: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the heads' outputs and the updated arrays of the cache."""
  steps = order_steps(positions_BT, seen_B)
  arrays = {n: bring_to_front(x, steps) if "_BT" in n else x for n, x in arrays.items()}
  (q_BTKH, k_BTKH, v_BTNU), options = _terms(c, arrays)
  k_BTKH = mask_padding(k_BTKH, steps)  # which writes and erases nothing
  if (decay := options["decay"]) is not None:
    is_token = jnp.expand_dims(steps.is_token_BT, range(2, decay.ndim))
    options["decay"] = jnp.where(is_token, decay, 0 if options["gate"] is None else _SHUT)
  if q_BTKH.shape[1] == 1:
    qkv = (q_BTKH[:, 0], k_BTKH[:, 0], v_BTNU[:, 0])
    options |= {n: x[:, 0] for n in ("decay", "erase", "write") if (x := options[n]) is not None}
    o_BNU, state_BNHU = delta_step(*qkv, state_BNHU, **options)
    o_BTNU = o_BNU[:, None]
  else:
    options |= {"initial_state_BNKV": state_BNHU, "return_state": True}
    o_BTNU, state_BNHU = delta_attention(q_BTKH, k_BTKH, v_BTNU, **options)
  inputs = {
    name: last_inputs(join(arrays[name], arrays[f"{name[0]}_BTZ"]), steps)
    for name in KdaCache._fields
    if name.endswith("_inputs_BPZ")
  }
  o_BTZ = bring_back(o_BTNU.reshape(arrays["v_BTZ"].shape), steps)
  return {"o_BTZ": o_BTZ, "seen_B": steps.seen_B, "state_BNHU": state_BNHU, **inputs}


def _terms(
  c: KdaConfig, arrays: Mapping[str, jax.Array], segment_ids_BT: jax.Array | None = None
) -> tuple[list[jax.Array], dict[str, Any]]:
  """Returns queries, keys and values, and the options of `delta_attention` for this rule."""
  rule, qkv = c.recurrence, []
  for name, width in (("q", c.H), ("k", c.H), ("v", c.value_width)):
    x_BTZ, taps_WZ = arrays[f"{name}_BTZ"], arrays.get(f"{name}_taps_WZ")
    y_BTZ = x_BTZ.astype(jnp.float32)
    if taps_WZ is not None:
      y_BTZ = short_convolution(x_BTZ, taps_WZ, segment_ids_BT, arrays.get(f"{name}_inputs_BPZ"))
    positive = rule.features == "positive" and name != "v"
    y_BTZ = jax.nn.elu(y_BTZ) + 1 if positive else jax.nn.silu(y_BTZ)
    qkv.append(y_BTZ.astype(x_BTZ.dtype).reshape(*x_BTZ.shape[:2], -1, width))
  B, T, N, _ = qkv[2].shape
  options: dict[str, Any] = {"decay": None, "erase": None, "write": None, "gate": None}
  options["l2norm"] = rule.features == "unit"
  options["scale"] = 1.0 if rule.decay == "fixed" else None
  if rule.erases:
    most = 2 if c.negative_eigenvalues else 1
    options["erase"] = options["write"] = most * jax.nn.sigmoid(arrays["beta_BTN"])
  if rule.decay == "fixed":
    options["decay"] = jnp.broadcast_to(-arrays["slope_N"][None, None], (B, T, N))
  elif rule.decay != "none":
    options["gate"] = "softplus" if c.decay_bound is None else "lower_bound"
    options["lower_bound"] = -5.0 if c.decay_bound is None else c.decay_bound
    widths = (N, c.H) if rule.decay == "channel" else (N,)
    options["decay"] = arrays["decay_BTZ"].reshape(B, T, *widths)
    options |= {"a_log_N": arrays["A_log_N"], "dt_bias": arrays["dt_bias_Z"].reshape(widths)}
  return qkv, options
