"""Rotates a model without changing its function, so that no channel stands out (QuaRot, SpinQuant).

Ashkboos et al. 2024 (arXiv 2404.00456), Liu et al. 2024 (arXiv 2405.16406). R1 turns the residual
stream, R2 the values of each head, R3 queries and keys after their rotary embedding, R4 the inputs
of `down`. R1 and R2 are folded into the weights here; R3 and R4 are Hadamard matrices that are
computed online, by rules: `hadamard` of the specs of caches and of `down`.
"""

# D model, K key heads, G query heads per key head, H head width, R repeats of one stack, F and Z
# any other axis of a weight

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import AttentionConfig, MlpConfig, ModelConfig, check
from jaxlm.quant.turning import turn
from pallas_kernels.common.errors import UnsupportedError

Params = dict[str, Any]


def fold_norms(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
  """Returns the same function with norms whose factor is 1: the weights after them take it over.

  A tied head becomes a weight of its own. The embedding keeps its mean: an RMSNorm, other than a
  LayerNorm, does not remove it. Raises UnsupportedError for norms of outputs.
  """
  check_layers(config)
  params = jax.tree.map(lambda w: w, params)
  offset = config.norm_offset

  def fold(norm: Params, *linears: Params) -> None:
    gain = norm["weight"] + offset
    for linear in linears:
      linear["weight"] = gain[..., None] * linear["weight"]
    norm["weight"] = jnp.full_like(norm["weight"], 1 - offset)

  for block in _blocks(params):
    fold(block["mixer_norm"], *(block["mixer"][name] for name in "qkv"))
    fold(block["feedforward_norm"], *(block["feedforward"][name] for name in ("gate", "up")))
  if config.tied:
    params["head"] = {"weight": params["embed"]["weight"].T}
  fold(params["norm"], params["head"])
  return dataclasses.replace(config, tied=False), params


def rotate_residual(config: ModelConfig, params: Params, r1_DD: jax.Array) -> Params:
  """Returns the parameters with the residual stream turned by an orthogonal matrix, x -> x R1.

  Norms must have been folded; raises UserError where they have not.
  """
  check_folded(config, params)
  params = jax.tree.map(lambda w: w, params)

  def reads(linear: Params) -> None:  # w [.., D, F]
    linear["weight"] = jnp.einsum("de,...df->...ef", r1_DD, linear["weight"], precision="highest")

  def writes(linear: Params) -> None:  # w [.., Z, D], bias [.., D]
    linear["weight"] = jnp.einsum("...zd,de->...ze", linear["weight"], r1_DD, precision="highest")
    if "bias" in linear:
      linear["bias"] = jnp.einsum("...d,de->...e", linear["bias"], r1_DD, precision="highest")

  writes(params["embed"])
  reads(params["head"])
  for block in _blocks(params):
    for name in "qkv":
      reads(block["mixer"][name])
    writes(block["mixer"]["o"])
    for name in ("gate", "up"):
      reads(block["feedforward"][name])
    writes(block["feedforward"]["down"])
  return params


def rotate_heads(config: ModelConfig, params: Params, r2: list[jax.Array]) -> Params:
  """Returns the parameters with the values of every head turned, by one matrix a layer.

  `r2` has for each block of each stack, in order, orthogonal matrices [R, H, H]. All query heads
  of a key head use its matrix, which is the layer's.
  """
  params = jax.tree.map(lambda w: w, params)
  for (spec, block), r2_RHH in zip(_specs_and_blocks(config, params), r2, strict=True):
    H = spec.mixer.H
    v, o = block["mixer"]["v"], block["mixer"]["o"]
    R, D, Z = v["weight"].shape
    heads = v["weight"].reshape(R, D, Z // H, H)
    turned = jnp.einsum("rdkh,rhi->rdki", heads, r2_RHH, precision="highest")
    v["weight"] = turned.reshape(R, D, Z)
    if "bias" in v:
      turned = jnp.einsum("rkh,rhi->rki", v["bias"].reshape(R, Z // H, H), r2_RHH)
      v["bias"] = turned.reshape(R, Z)
    Q = o["weight"].shape[1]
    heads = o["weight"].reshape(R, Q // H, H, D)
    turned = jnp.einsum("rnhd,rhi->rnid", heads, r2_RHH, precision="highest")
    o["weight"] = turned.reshape(R, Q, D)
  return params


def random_hadamard(key: jax.Array, n: int, dtype: Any = jnp.float32) -> jax.Array:
  """Returns an orthogonal matrix [n, n]: a Hadamard matrix whose rows have random signs.

  Raises UserError where n is not a power of two times 1, 12, 20, 28 or 40.
  """
  signs = jax.random.rademacher(key, (n,), dtype)
  return signs[:, None] * turn(jnp.eye(n, dtype=dtype), n)


def random_orthogonal(key: jax.Array, n: int, dtype: Any = jnp.float32) -> jax.Array:
  """Returns an orthogonal matrix [n, n], drawn uniformly; there is one for every n."""
  q_NN, r_NN = jnp.linalg.qr(jax.random.normal(key, (n, n), dtype))
  return q_NN * jnp.sign(jnp.diagonal(r_NN))[None]


def rotate(
  config: ModelConfig, params: Params, key: jax.Array, draw: Callable = random_hadamard
) -> tuple[ModelConfig, Params]:
  """Returns the same function with folded norms and random R1 and R2."""
  config, params = fold_norms(config, params)
  r1_DD, r2 = draw_rotations(config, key, draw, params["embed"]["weight"].dtype)
  return config, rotate_heads(config, rotate_residual(config, params, r1_DD), r2)


def draw_rotations(
  config: ModelConfig, key: jax.Array, draw: Callable = random_hadamard, dtype: Any = jnp.float32
) -> tuple[jax.Array, list[jax.Array]]:
  """Returns random R1 [D, D], and R2 [R, H, H] for each block of each stack."""
  check_layers(config)
  first, *others = jax.random.split(key, 1 + sum(len(specs) for specs, _ in config.stacks))
  r1_DD, r2 = draw(first, config.D, dtype), []
  specs = [(spec, repeats) for specs, repeats in config.stacks for spec in specs]
  for (spec, repeats), one in zip(specs, others):
    assert isinstance(spec.mixer, AttentionConfig)  # check_layers has looked
    H = spec.mixer.H
    r2.append(jnp.stack([draw(own, H, dtype) for own in jax.random.split(one, repeats)]))
  return r1_DD, r2


def _blocks(params: Params) -> list[Params]:
  return [block for stack in params["stacks"].values() for block in stack.values()]


def _specs_and_blocks(config: ModelConfig, params: Params) -> list[tuple[Any, Params]]:
  specs = [spec for specs, _ in config.stacks for spec in specs]
  return list(zip(specs, _blocks(params), strict=True))


def check_layers(config: ModelConfig) -> None:
  """Raises UnsupportedError for parts through which factors of weights cannot be carried."""
  if config.post_norms:
    raise UnsupportedError("model.post_norms: norms of outputs do not commute with a rotation")
  for spec in config.layer_specs:
    kinds = type(spec.mixer), type(spec.feedforward)
    if kinds != (AttentionConfig, MlpConfig):
      names = " and ".join(kind.__name__ for kind in kinds)
      rule = "rotations and scaled channels are written for attention and gated feed-forwards"
      raise UnsupportedError(f"model: {rule}, not {names}")


def check_folded(config: ModelConfig, params: Params) -> None:
  """Raises UserError where norms still have gains; of traced parameters it cannot tell."""
  check_layers(config)
  check(not config.tied, "model.tied", True, "fold the norms first: `fold_norms`")
  norms = [
    params["norm"],
    *(b[f"{n}_norm"] for b in _blocks(params) for n in ("mixer", "feedforward")),
  ]
  for norm in norms:
    gain = norm["weight"]
    if not isinstance(gain, jax.core.Tracer):
      good = bool(np.all(np.asarray(gain) + config.norm_offset == 1))
      check(good, "norm", "with gains", "fold the norms first: `fold_norms`")
