"""Random calls of `delta_attention`, and the recurrence and its gradient in numpy, in float64."""

# B batch, T positions, H heads of queries and keys, N heads of values, K width of queries and keys,
# V width of values
from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_attention import delta_attention

TOLERANCE = {"o": 1e-5, "state": 1e-5}
GRADIENT_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of `delta_attention` on random arrays; a gate is "channels", "heads" or None."""

  T: int = 130
  B: int = 2
  H: int = 1
  N: int = 2
  K: int = 20
  V: int = 12
  decay: str | None = "channels"
  erase: str | None = "heads"
  write: str | None = "heads"
  segments: bool = False

  def arrays(self, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Returns inputs by name, with keys of length 1, and cotangents of output and state."""
    rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
    B, T, H, N, K, V = self.B, self.T, self.H, self.N, self.K, self.V
    arrays = {
      "q": rng.normal(size=(B, T, H, K)),
      "k": rng.normal(size=(B, T, H, K)),
      "v": rng.normal(size=(B, T, N, V)),
      "state": rng.normal(size=(B, N, K, V)),
      "do": rng.normal(size=(B, T, N, V)),
      "dstate": rng.normal(size=(B, N, K, V)),
    }
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
    for name, channels in (("decay", K), ("erase", K), ("write", V)):
      kind = getattr(self, name)
      if kind is not None:
        arrays[name] = rng.uniform(size=(B, T, N, channels if kind == "channels" else 1))
    if self.decay is not None:
      arrays["decay"] *= -0.5
    state_dtype = np.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
    arrays = {
      name: x.astype(state_dtype if "state" in name else dtype) for name, x in arrays.items()
    }
    if self.segments:
      ids = np.sort(rng.integers(0, 4, (B, T)), axis=1)
      ids[:, T // 2] = 7  # a segment of one position, and a name that comes back
      arrays["segment_ids"] = ids.astype(np.int32)
    return arrays


def as_gate(x: Any) -> Any:
  """Returns a gate of width 1 without its last axis, as one for each head is given."""
  return x[..., 0] if x is not None and x.shape[-1] == 1 else x


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def _run(arrays, *, implementation, options):
  inputs = {n: x for n, x in arrays.items() if n not in ("do", "dstate", "segment_ids")}

  def attend(inputs):
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    gates = {n: as_gate(inputs.get(n)) for n in ("decay", "erase", "write")}
    rest = {n: inputs.get(n) for n in ("a_log_N", "dt_bias")}
    return delta_attention(
      q,
      k,
      v,
      **gates,
      **rest,
      initial_state_BNKV=inputs["state"],
      segment_ids_BT=arrays.get("segment_ids"),
      return_state=True,
      implementation=implementation,
      **dict(options),
    )

  (o, state), pull = jax.vjp(attend, inputs)
  (gradients,) = pull((arrays["do"], arrays["dstate"]))
  return {"o": o, "state": state, **{f"d{name}": x for name, x in gradients.items()}}


def run(arrays: dict[str, Any], implementation: str, **options: Any) -> dict[str, np.ndarray]:
  """Returns output, final state and gradients by one implementation; shares compilations."""
  results = _run(arrays, implementation=implementation, options=tuple(options.items()))
  return {name: np.asarray(x) for name, x in results.items()}


def recur(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns what `run` does, by the recurrence and its reverse, token by token in float64."""
  x = {n: a if n == "segment_ids" else np.asarray(a, np.float64) for n, a in arrays.items()}
  (B, T, H, K), N = x["q"].shape, x["v"].shape[2]
  scale, group = K**-0.5, N // H
  q, k = (np.repeat(x[name], group, axis=2) for name in "qk")
  decay, erase = (x.get(name, np.zeros((B, T, N, 1))) for name in ("decay", "erase"))
  write = x.get("write", np.ones((B, T, N, 1)))
  ids = x.get("segment_ids", np.zeros((B, T), int))
  S, states, decayed, added = x["state"], [], [], []
  o = np.zeros(x["v"].shape)
  for t in range(T):
    if t:
      S = np.where((ids[:, t] != ids[:, t - 1])[:, None, None, None], 0, S)
    S = np.exp(decay[:, t])[..., None] * S
    r = write[:, t] * x["v"][:, t] - np.einsum("bnk,bnkv->bnv", erase[:, t] * k[:, t], S)
    decayed.append(S)
    S = S + k[:, t][..., None] * r[..., None, :]
    states.append(S)
    added.append(r)
    o[:, t] = scale * np.einsum("bnk,bnkv->bnv", q[:, t], S)
  dS = x["dstate"]
  shapes = {"q": (N, K), "k": (N, K), "v": (N, x["v"].shape[3]), "decay": (N, K), "erase": (N, K)}
  d = {name: np.zeros((B, T, *shape)) for name, shape in (shapes | {"write": shapes["v"]}).items()}
  for t in reversed(range(T)):
    do, r = x["do"][:, t], added[t]
    dS = dS + scale * q[:, t][..., None] * do[..., None, :]
    d["q"][:, t] = scale * np.einsum("bnkv,bnv->bnk", states[t], do)
    dr = np.einsum("bnkv,bnk->bnv", dS, k[:, t])
    derased = -np.einsum("bnkv,bnv->bnk", decayed[t], dr)
    d["k"][:, t] = np.einsum("bnkv,bnv->bnk", dS, r) + erase[:, t] * derased
    d["erase"][:, t] = k[:, t] * derased
    d["v"][:, t], d["write"][:, t] = write[:, t] * dr, x["v"][:, t] * dr
    dS = dS - (erase[:, t] * k[:, t])[..., None] * dr[..., None, :]
    d["decay"][:, t] = np.sum(dS * decayed[t], axis=-1)
    dS = np.exp(decay[:, t])[..., None] * dS
    if t:
      dS = np.where((ids[:, t] != ids[:, t - 1])[:, None, None, None], 0, dS)
  d = {name: gradient for name, gradient in d.items() if name in x}
  for name in ("decay", "erase", "write"):
    if name in x and x[name].shape[-1] == 1:
      d[name] = np.sum(d[name], axis=-1, keepdims=True)
  for name in "qk":
    d[name] = d[name].reshape(B, T, H, group, K).sum(axis=3)
  gradients = {f"d{name}": gradient for name, gradient in d.items()}
  return {"o": o, "state": S, **gradients, "dstate": dS}


def assert_close(
  got: dict[str, Any], want: dict[str, Any], tolerance: float | dict[str, float] | None = None
) -> None:
  """Compares by the norm of the difference, relative to that of what is wanted.

  By default 1e-5 for output and state, 1e-4 for gradients.
  """
  assert got.keys() == want.keys()
  for name in want:
    ours, theirs = np.asarray(got[name], np.float64), np.asarray(want[name], np.float64)
    limit = tolerance
    if tolerance is None:
      limit = TOLERANCE.get(name, GRADIENT_TOLERANCE)
    elif isinstance(tolerance, dict):
      limit = tolerance[name]
    error, norm = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
    assert ours.shape == theirs.shape, name
    assert error <= limit * norm + 1e-30, f"{name}: {error / (norm + 1e-300):.2e} > {limit}"


@pytest.fixture(name="Case", scope="session")
def case_fixture():
  return Case


@pytest.fixture(name="run", scope="session")
def run_fixture():
  return run


@pytest.fixture(name="recur", scope="session")
def recur_fixture():
  return recur


@pytest.fixture(name="assert_close", scope="session")
def assert_close_fixture():
  return assert_close
