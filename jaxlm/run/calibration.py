"""Finds the codes of a model's weights on some text: by GPTQ, AWQ, or OmniQuant's clipping.

Inputs are those of the model as it was saved, all from one forward pass: errors of earlier layers
are not made up for by later ones.
"""

# F output channels, D input width, B batch, T positions

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig, check
from jaxlm.config.formats import Format, UniformFormat
from jaxlm.config.quant import find_spec
from jaxlm.quant import awq, gptq
from jaxlm.quant.apply import turn
from jaxlm.quant.capture import capture
from jaxlm.quant.groups import Encoded
from jaxlm.quant.pack_model import Solve
from jaxlm.run.saved_run import SavedRun

Method = Literal["nearest", "gptq", "awq", "omniquant"]
METHODS = get_args(Method)


def solve_on_text(
  saved: SavedRun, config: ModelConfig, params: Any, method: Method, ids_BT: jax.Array
) -> tuple[Any, Solve | None]:
  """Returns the parameters to round under the rules of `config`, and what finds their codes.

  AWQ changes the parameters, whose codes are then the nearest ones; the others find codes. Raises
  UserError for a method that does not exist, and for formats that it is not written for.
  """
  if method == "awq":
    return awq.scale_channels(config, params, _activity(saved, ids_BT)), None
  solvers = {"gptq": _gptq, "omniquant": _clip}
  check(method in solvers, "method", method, f"must be one of {', '.join(METHODS)}")
  hessians = _hessians(saved, config, ids_BT)

  def solve(name: str, w_FD: jax.Array, format: Format) -> Encoded:
    return solvers[method](name, w_FD, format, hessians[name])

  return params, solve


def _activity(saved: SavedRun, ids_BT: jax.Array) -> dict[str, jax.Array]:
  """Returns mean |x| of the inputs of every matmul, float32 [D]."""

  def read(name: str, x_BTD: jax.Array, y_BTF: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(x_BTD.astype(jnp.float32)), axis=(0, 1))

  return capture(saved.config.model, saved.params, ids_BT, read, saved.config.compute)


def _hessians(saved: SavedRun, config: ModelConfig, ids_BT: jax.Array) -> dict[str, jax.Array]:
  """Returns 2 x^T x / Z of the inputs of every matmul, rotated as the rules say, float32 [D, D]."""

  def read(name: str, x_BTD: jax.Array, y_BTF: jax.Array) -> jax.Array:
    x_BTD = turn(x_BTD, find_spec(config.quant, name).hadamard)
    return gptq.hessian(x_BTD.reshape(-1, x_BTD.shape[-1]))

  return capture(saved.config.model, saved.params, ids_BT, read, saved.config.compute)


def _gptq(name: str, w_FD: jax.Array, format: Format, hessian_DD: jax.Array) -> Encoded:
  rule = f"has {format}: GPTQ is for equally spaced levels that are not learned"
  check(isinstance(format, UniformFormat), "gptq", name, rule)
  return gptq.solve(w_FD, hessian_DD, cast(UniformFormat, format))


def _clip(name: str, w_FD: jax.Array, format: Format, hessian_DD: jax.Array) -> Encoded:
  rule = f"has {format}: learned clipping is for affine levels per row, as of recipe affine:4"
  good = isinstance(format, UniformFormat) and (format.grid, format.shared) == ("affine", "row")
  check(good, "omniquant", name, rule)
  damping = gptq.DAMPING * jnp.mean(jnp.diagonal(hessian_DD)) * jnp.eye(len(hessian_DD))
  root_DD = jnp.linalg.cholesky(hessian_DD + damping, upper=True)  # outputs err as on the inputs
  bits = cast(UniformFormat, format).bits
  return awq.encode_clipped(w_FD, *awq.learn_clipping(w_FD, root_DD, bits), bits)
