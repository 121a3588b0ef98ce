"""Every named attention against its own recurrence, written out with matrices in float64."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of keys, V of values
import functools

import chex
import jax
import numpy as np
import pytest

from pallas_kernels.delta_attention import (
  delta_net,
  gated_delta_rule,
  gated_delta_rule_2,
  gated_linear_attention,
  kimi_delta_attention,
  lightning_attention,
)

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

B, T, N, K, V = 1, 40, 2, 6, 5


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def arrays():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, B, T, N, K))
  gates = dict(
    decay_BTNK=-rng.uniform(0, 2, size=(B, T, N, K)),
    decay_BTN=-rng.uniform(0, 2, size=(B, T, N)),
    beta_BTN=rng.uniform(size=(B, T, N)),
    erase_BTNK=rng.uniform(size=(B, T, N, K)),
    write_BTNV=rng.uniform(size=(B, T, N, V)),
    slope_N=np.array([0.25, 0.0625]),
  )
  return q, k, rng.normal(size=(B, T, N, V)), gates


# one head and one token: the state before it, unit key, value, and this token's gates
def kimi(S, k, v, g):
  beta = g["beta_BTN"]
  kept = (np.eye(K) - beta * np.outer(k, k)) @ np.diag(np.exp(g["decay_BTNK"]))
  return kept @ S + beta * np.outer(k, v)


def gated_delta(S, k, v, g):
  beta, alpha = g["beta_BTN"], np.exp(g["decay_BTN"])
  return alpha * (S - beta * np.outer(k, k @ S)) + beta * np.outer(k, v)


def delta(S, k, v, g):
  old = k @ S
  new = g["beta_BTN"] * v + (1 - g["beta_BTN"]) * old
  return S - np.outer(k, old) + np.outer(k, new)


def gated_delta_2(S, k, v, g):
  kept = (np.eye(K) - np.outer(k, g["erase_BTNK"] * k)) * np.exp(g["decay_BTNK"])[None]
  return kept @ S + np.outer(k, g["write_BTNV"] * v)


def gated_linear(S, k, v, g):
  return np.exp(g["decay_BTNK"])[:, None] * S + k[:, None] * v[None]


def lightning(S, k, v, g):
  return np.exp(-g["slope_N"]) * S + np.outer(k, v)


PRESETS = {
  kimi_delta_attention: (kimi, ["decay_BTNK", "beta_BTN"]),
  gated_delta_rule: (gated_delta, ["decay_BTN", "beta_BTN"]),
  delta_net: (delta, ["beta_BTN"]),
  gated_delta_rule_2: (gated_delta_2, ["decay_BTNK", "erase_BTNK", "write_BTNV"]),
  gated_linear_attention: (gated_linear, ["decay_BTNK"]),
  lightning_attention: (lightning, ["slope_N"]),
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
@pytest.mark.parametrize(
  "implementation", ["reference", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_is_its_own_recurrence(preset, implementation):
  recurrence, names = PRESETS[preset]
  q, k, v, gates = arrays()
  linear = preset in (gated_linear_attention, lightning_attention)
  scale = 1.0 if preset is lightning_attention else K**-0.5
  want_BTNV = np.zeros((B, T, N, V))
  for n in range(N):
    S = np.zeros((K, V))
    for t in range(T):
      here = {name: g[n] if name == "slope_N" else g[0, t, n] for name, g in gates.items()}
      qt, kt = (q, k) if linear else (unit(q), unit(k))
      S = recurrence(S, kt[0, t, n], v[0, t, n], here)
      want_BTNV[0, t, n] = scale * qt[0, t, n] @ S
  inputs = [x.astype(np.float32) for x in (q, k, v, *(gates[name] for name in names))]
  got_BTNV = jax.jit(lambda *x: preset(*x, implementation=implementation))(*inputs)
  chex.assert_trees_all_close(got_BTNV, want_BTNV.astype(np.float32), atol=1e-5)


@pytest.mark.slow
def test_equal_decay_of_all_channels_is_the_gated_delta_rule():
  q, k, v, gates = (x if isinstance(x, dict) else x.astype(np.float32) for x in arrays())
  decay_BTN, beta_BTN = (gates[name].astype(np.float32) for name in ("decay_BTN", "beta_BTN"))
  decay_BTNK = np.broadcast_to(decay_BTN[..., None], k.shape)
  one = jax.jit(functools.partial(gated_delta_rule, implementation="xla"))
  channels = jax.jit(functools.partial(kimi_delta_attention, implementation="xla"))
  want_BTNV = one(q, k, v, decay_BTN, beta_BTN)
  chex.assert_trees_all_close(channels(q, k, v, decay_BTNK, beta_BTN), want_BTNV, atol=1e-5)
