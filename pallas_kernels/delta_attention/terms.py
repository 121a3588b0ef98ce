"""Holds the records of delta attention, and what is done to single tokens: norm, gates, resets."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of queries and keys,
# V width of values; X is K, V or 1
from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WIPE = -1e30
"""Log decay that leaves nothing; finite, since 0 times it must be 0."""
NORM_EPSILON = 1e-6


class Tokens(NamedTuple):
  """Holds what belongs to positions; the leading axes are [B, T] and heads, or others in chunks."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  decay: jax.Array | None  # float32 [..., N, K or 1]; what the gate is made of, if there is one
  erase: jax.Array | None  # [..., N, K or 1]
  write: jax.Array | None  # [..., N, V or 1]
  reset: jax.Array | None  # bool [B, T], true where a segment starts


class GateParameters(NamedTuple):
  """Holds the parameters of the decay's gate, or None without one."""

  a_log_N: jax.Array | None
  bias_NX: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Holds the arguments of `delta_attention` that are no arrays, checked."""

  scale: float
  l2norm: bool = False
  gate: str | None = None
  lower_bound: float = -5.0
  interpret: Any = False
  coarse: bool = False
  """Whether gates may be as exact as bfloat16 is, for which a TPU kernel asks."""


class Gated(NamedTuple):
  """Holds tokens after norm and gates, in the dtype of sums; erase and write are multiplied in."""

  q: jax.Array  # scaled
  k: jax.Array
  erased_k: jax.Array | None  # b k; None where nothing is erased
  v: jax.Array  # w v
  decay: jax.Array | None  # log decay g, at most 0


def sum_dtype(dtype: Any) -> jnp.dtype:
  """Returns the dtype of products, sums and states: float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def apply_gates(tokens: Tokens, gate: GateParameters, options: Options) -> Gated:
  """Normalises queries and keys and turns gates into factors; `reset` is not looked at.

  Arrays are [..., heads, width]; `gate` broadcasts against the decay.
  """
  dtype = sum_dtype(tokens.q.dtype)
  q, k, v = (x.astype(dtype) for x in (tokens.q, tokens.k, tokens.v))
  if options.l2norm:
    q, k = normalise(q, options.scale, options.coarse), normalise(k, 1.0, options.coarse)
  else:
    q = options.scale * q
  group = v.shape[-2] // q.shape[-2]
  q, k = (x if group == 1 else jnp.repeat(x, group, axis=-2) for x in (q, k))
  erased_k = None if tokens.erase is None else tokens.erase.astype(dtype) * k
  v = v if tokens.write is None else tokens.write.astype(dtype) * v
  decay = tokens.decay
  if decay is not None:
    decay, bias = decay.astype(dtype), gate.bias_NX
    rate, leading = None, (1,) * (decay.ndim - 2)
    if gate.a_log_N is not None:
      rate = jnp.exp(gate.a_log_N.astype(dtype)).reshape(*leading, -1, 1)
    if bias is not None:
      bias = bias.astype(dtype).reshape(*leading, *bias.shape)
    decay = log_decay(decay, rate, bias, options)
  return Gated(q, k, erased_k, v, decay)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def normalise(x: jax.Array, scale: float, coarse: bool) -> jax.Array:
  """Returns scale x / sqrt(sum x^2 + 1e-6) over the last axis; with `coarse` to a millionth."""
  return x * _norm_factor(x, scale, coarse)


@normalise.defjvp
def _normalise_jvp(scale: float, coarse: bool, primals: Any, tangents: Any) -> Any:
  """Differentiates without a quotient, which takes a TPU many operations."""
  (x,), (dx,) = primals, tangents
  factor = _norm_factor(x, scale, coarse)
  y = x * factor
  along = jnp.sum(y * dx, axis=-1, keepdims=True) / (scale * scale or 1.0)
  return y, factor * (dx - y * along)


def _norm_factor(x: jax.Array, scale: float, coarse: bool) -> jax.Array:
  """Returns scale / sqrt(sum x^2 + 1e-6); a root takes v5e ten vector operations."""
  squares = jnp.sum(x * x, axis=-1, keepdims=True) + NORM_EPSILON
  return scale * (jnp.exp2(-0.5 * jnp.log2(squares)) if coarse else jax.lax.rsqrt(squares))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softplus(x: jax.Array, coarse: bool) -> jax.Array:
  """Returns log(1 + exp(x)); with `coarse` to a thousandth, which takes few vector operations."""
  return jnp.maximum(x, 0) + _softplus_tail(x, coarse)


@softplus.defjvp
def _softplus_jvp(coarse: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  """Differentiates without a quotient: sigmoid(x) is exp(x - softplus(x))."""
  (x,), (dx,) = primals, tangents
  tail = _softplus_tail(x, coarse)
  return jnp.maximum(x, 0) + tail, jnp.exp(jnp.minimum(x, 0) - tail) * dx


def _softplus_tail(x: jax.Array, coarse: bool) -> jax.Array:
  """Returns log(1 + exp(-|x|))."""
  small = jnp.exp(-jnp.abs(x))
  if not coarse:
    return jnp.log1p(small)
  return jnp.where(small < 1e-3, small, jnp.log(1 + small))


def log_decay(
  x: jax.Array, rate: jax.Array | None, bias: jax.Array | None, options: Options
) -> jax.Array:
  """Returns the log decay g, at least `WIPE`, from what its gate is given; all broadcast.

  "softplus": g = -rate softplus(x + bias), "lower_bound": g = lower_bound sigmoid(rate (x + bias)),
  with rate = exp(a_log); None: g = x.
  """
  if options.gate is not None:
    assert rate is not None
    x = x if bias is None else x + bias
    if options.gate == "softplus":
      x = -rate * softplus(x, options.coarse)
    else:
      x = options.lower_bound * jax.nn.sigmoid(rate * x)
  return jnp.where(x < WIPE, WIPE, x)  # a maximum's gradient divides
