"""Scales input channels by how active they are before rounding (Lin et al. 2023, arXiv 2306.00978).

And learns how far to clip, as OmniQuant does (Shao et al. 2023, arXiv 2308.13137).
"""

# F output channels, D contracted axis, Z samples, K key heads, G query heads per key head, H width

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import AttentionConfig, ComputeConfig, ModelConfig, check
from jaxlm.config.formats import Format
from jaxlm.config.quant import find_spec
from jaxlm.models.parts import make_blocks
from jaxlm.quant.apply import learned_names, quantize
from jaxlm.quant.groups import Encoded
from jaxlm.quant.rotation import Params, check_layers

GRID = 20
_READERS = {
  "mixer_norm": ("mixer.q", "mixer.k", "mixer.v"),
  "mixer.v": ("mixer.o",),
  "feedforward_norm": ("feedforward.gate", "feedforward.up"),
  "feedforward.up": ("feedforward.down",),
}
"""What makes the input of matmuls, up to factors of its channels, and these matmuls."""


@functools.partial(jax.jit, static_argnums=2)
def find_scales(w_FD: jax.Array, activity_D: jax.Array, format: Format) -> jax.Array:
  """Returns factors [D] that input channels are divided by and weights multiplied by.

  They are activity^rho over the root of their largest times their smallest, with rho of 20 values
  from 0 to 1 chosen for the least ||(w - round(w s) / s) diag(activity)||; activity is mean |x|.
  The caller folds 1 / s into what makes the input: a norm's gain, or the output channels of `up`.
  """

  def scales(rho: jax.Array) -> jax.Array:
    s_D = jnp.maximum(activity_D, 1e-4) ** rho
    return s_D / jnp.sqrt(jnp.max(s_D) * jnp.min(s_D))

  def error(rho: jax.Array) -> jax.Array:
    s_D = scales(rho)[None]
    rounded_FD = quantize(w_FD * s_D, format) / s_D
    return jnp.sum(jnp.square((w_FD - rounded_FD) * activity_D[None]))

  grid = jnp.arange(GRID) / GRID
  return scales(grid[jnp.argmin(jax.lax.map(error, grid))])


def scale_channels(
  config: ModelConfig, params: Params, activity: Mapping[str, jax.Array]
) -> Params:
  """Returns the same function with input channels scaled before their weights are rounded.

  `activity` is mean |x| of the inputs of each matmul, [D], by name. Norms, `v` and `up` take the
  inverse factors. Raises UserError for formats that learn scales or are rotated by a rule, and for
  matmuls of the same input that have different ones.
  """
  check_layers(config)
  params = jax.tree.map(lambda w: w, params)
  for index, stack in params["stacks"].items():
    for place, block in make_blocks(config, ComputeConfig(), int(index)).items():
      assert isinstance(block.spec.mixer, AttentionConfig)  # check_layers has looked
      for row, layer in enumerate(block.layers):
        for maker, readers in _READERS.items():
          names = [f"layers.{layer}.{reader}" for reader in readers]
          heads = block.spec.mixer if maker == "mixer.v" else None
          linears = [_part(stack[place], reader) for reader in readers]
          s_D = _scale_inputs(config, names, linears, row, activity[names[0]], heads)
          _divide(config, _part(stack[place], maker), row, s_D)
  if not config.tied:
    s_D = _scale_inputs(config, ["head"], [params["head"]], ..., activity["head"], None)
    _divide(config, params["norm"], ..., s_D)
  return params


def _part(block: Params, path: str) -> Params:
  return functools.reduce(lambda tree, name: tree[name], path.split("."), block)


def _scale_inputs(
  config: ModelConfig,
  names: Sequence[str],
  linears: Sequence[Params],
  row: Any,
  activity_D: jax.Array,
  heads: AttentionConfig | None,
) -> jax.Array:
  """Scales the input channels of matmuls that read the same input; returns what undoes it.

  Channels of `heads` that are copies of a key head's get the same factors, one for each of these.
  """
  format = _shared_format(config, names)
  if heads is not None:
    x_KGH = activity_D.reshape(heads.K, -1, heads.H)
    activity_D = jnp.broadcast_to(jnp.mean(x_KGH, axis=1, keepdims=True), x_KGH.shape).reshape(-1)
  s_D = jnp.ones_like(activity_D)
  if format is not None:
    w_FD = jnp.concatenate([linear["weight"][row].T for linear in linears])
    s_D = find_scales(w_FD, activity_D, format)
  for linear in linears:
    linear["weight"] = linear["weight"].at[row].multiply(s_D[:, None])
  return s_D if heads is None else s_D.reshape(heads.K, -1, heads.H)[:, 0].reshape(-1)


def _divide(config: ModelConfig, maker: Params, row: Any, s_D: jax.Array) -> None:
  """Divides the outputs of a norm, whose factor is offset + weight, or of a linear layer."""
  weight = maker["weight"][row]
  if weight.ndim == 1:
    weight = (weight + config.norm_offset) / s_D - config.norm_offset
  else:
    weight = weight / s_D[None]
  maker["weight"] = maker["weight"].at[row].set(weight)
  if "bias" in maker:
    maker["bias"] = maker["bias"].at[row].divide(s_D)


def _shared_format(config: ModelConfig, names: Sequence[str]) -> Format | None:
  specs = [find_spec(config.quant, name) for name in names]
  rule = "read the same channels, which are scaled for one format of weights"
  check(len({spec.weight for spec in specs}) == 1, "awq", ", ".join(names), rule)
  format = specs[0].weight
  good = not learned_names(format) and not any(spec.hadamard for spec in specs)
  rule = f"has {format}: AWQ is for formats that are neither learned nor rotated by a rule"
  check(good, "awq", names[0], rule)
  return format


def clipped_affine(w_FD: jax.Array, high_F: jax.Array, low_F: jax.Array, bits: int) -> jax.Array:
  """Returns weights on 2^bits levels from sigmoid(low) min to sigmoid(high) max of each row.

  Gradients reach the two bounds, straight through the rounding.
  """
  step, bottom = _step_and_bottom(w_FD, high_F, low_F, bits)
  v_FD = w_FD / step - bottom / step
  v_FD = v_FD + jax.lax.stop_gradient(jnp.round(v_FD) - v_FD)
  return jnp.clip(v_FD, 0, 2**bits - 1) * step + bottom


def _step_and_bottom(
  w_FD: jax.Array, high_F: jax.Array, low_F: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
  top = jax.nn.sigmoid(high_F)[:, None] * jnp.max(w_FD, axis=1, keepdims=True)
  bottom = jax.nn.sigmoid(low_F)[:, None] * jnp.min(w_FD, axis=1, keepdims=True)
  return jnp.maximum((top - bottom) / (2**bits - 1), 1e-8), bottom


def learn_clipping(
  w_FD: jax.Array, x_ZD: jax.Array, bits: int, *, steps: int = 100, rate: float = 1e-2
) -> tuple[jax.Array, jax.Array]:
  """Returns (high [F], low [F]) for `clipped_affine` that lower the error of x w^T, by Adam.

  Both start at 4, that is at 0.982 of the range.
  """
  optimizer = optax.adam(rate)

  def loss(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.square(x_ZD @ (clipped_affine(w_FD, *bounds, bits) - w_FD).T))

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    bounds, state = carry
    directions, state = optimizer.update(jax.grad(loss)(bounds), state)
    return (optax.apply_updates(bounds, directions), state), None

  start = (jnp.full(len(w_FD), 4.0), jnp.full(len(w_FD), 4.0))
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0][0])
  return run((start, optimizer.init(start)))


def encode_clipped(w_FD: jax.Array, high_F: jax.Array, low_F: jax.Array, bits: int) -> Encoded:
  """Returns the codes and scales of `clipped_affine`, as those of an affine format per row."""
  step, bottom = _step_and_bottom(w_FD, high_F, low_F, bits)
  codes_FD = jnp.clip(jnp.round(w_FD / step - bottom / step), 0, 2**bits - 1).astype(jnp.int32)
  return Encoded(codes_FD, step[:, 0], -(bottom / step)[:, 0])
