"""Computes gated feed-forwards (Shazeer 2020, arXiv 2002.05202, equation 6): SwiGLU, GEGLU."""

# B batch, T positions, D model, F feed-forward width

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ComputeConfig, MlpConfig, ModelConfig
from jaxlm.models.linear import Linear, Roles, declare_parts
from pallas_kernels.common.checks import check_shape
from sharding.rules import all_gather


@jax.custom_vjp
def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
  """Returns silu(gate) up. Its backward pass keeps only the two arguments.

  It has reverse-mode gradients only.
  """
  check_shape("up_BTF", up_BTF, gate_BTF.shape)
  return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_forward(
  gate_BTF: jax.Array, up_BTF: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_backward(
  residuals: tuple[jax.Array, jax.Array], dy_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
  gate_BTF, up_BTF = residuals
  # the sigmoid as a tanh: cheap, and no term of the forward pass, which XLA would store and load
  share_BTF = 0.5 * jnp.tanh(0.5 * gate_BTF) + 0.5
  slope_BTF = share_BTF * (1 + gate_BTF * (1 - share_BTF))
  return dy_BTF * up_BTF * slope_BTF, dy_BTF * gate_BTF * share_BTF


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


_GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "silu": swiglu,
  "gelu": lambda gate_BTF, up_BTF: jax.nn.gelu(gate_BTF, approximate=False) * up_BTF,
  "gelu_tanh": lambda gate_BTF, up_BTF: jax.nn.gelu(gate_BTF, approximate=True) * up_BTF,
}


class Mlp(nn.Module):
  """Computes down(act(gate(x)) up(x))."""

  spec: MlpConfig
  config: ModelConfig
  compute: ComputeConfig
  layers: tuple[int, ...]

  def setup(self) -> None:
    """Makes the projections."""
    D, F = self.config.D, self.spec.F
    options: dict[str, Any] = {"compute": self.compute, "layers": self.layers}
    options |= {"rules": self.config.quant, "biased": self.spec.bias}
    inner, outer = ("batch", "length", "act_mlp"), ("batch", "norm_length", None)
    self.gate = Linear((D, F), D**-0.5, ("embed", "mlp"), inner, **options)
    self.up = Linear((D, F), D**-0.5, ("embed", "mlp"), inner, **options)
    down_std = (F * 2 * self.config.layers) ** -0.5
    self.down = Linear((F, D), down_std, ("mlp", "embed"), outer, **options)

  def declare(self) -> Roles:
    """Creates the parameters and returns their roles."""
    return declare_parts(self, "gate", "up", "down")

  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the layer's output [B, T, D] and its statistics, of which there are none."""
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    inner_BTF = _GATED[self.spec.activation](self.gate(x_BTD), self.up(x_BTD))
    return self.down(inner_BTF), {}
