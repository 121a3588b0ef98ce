"""Gated feed-forward (Shazeer 2020, arXiv 2002.05202, equation 6): SwiGLU, GEGLU."""

# B batch, T positions, D model, F feed-forward width

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.models.linear import linear, sharded_normal, sharded_zeros
from sharding.rules import all_gather


@jax.custom_vjp
def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
  """silu(gate) up. Its backward pass keeps nothing but the two arguments; reverse-mode gradients only."""
  return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_forward(
  gate_BTF: jax.Array, up_BTF: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_backward(
  residuals: tuple[jax.Array, jax.Array], dy_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
  gate_BTF, up_BTF = residuals
  # the sigmoid as a tanh: cheap, and not a term of the forward pass, which XLA would then store and load
  share_BTF = 0.5 * jnp.tanh(0.5 * gate_BTF) + 0.5
  return dy_BTF * up_BTF * share_BTF * (
    1 + gate_BTF * (1 - share_BTF)
  ), dy_BTF * gate_BTF * share_BTF


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


_GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "silu": swiglu,
  "gelu": lambda gate_BTF, up_BTF: jax.nn.gelu(gate_BTF, approximate=False) * up_BTF,
  "gelu_tanh": lambda gate_BTF, up_BTF: jax.nn.gelu(gate_BTF, approximate=True) * up_BTF,
}


class Mlp(nn.Module):
  """down(act(gate(x)) up(x)). Weights: w_gate and w_up [D, F], w_down [F, D]; with biases b_gate, b_up, b_down."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    x_BTD = all_gather(x_BTD, "batch", "length", None)
    w_gate = self.param("w_gate", sharded_normal, (c.D, c.F), c.D**-0.5, "embed", "mlp")
    w_up = self.param("w_up", sharded_normal, (c.D, c.F), c.D**-0.5, "embed", "mlp")
    w_down = self.param(
      "w_down", sharded_normal, (c.F, c.D), (c.F * 2 * c.layers) ** -0.5, "mlp", "embed"
    )
    b_gate = b_up = b_down = None
    if c.mlp_bias:
      b_gate, b_up = (self.param(name, sharded_zeros, (c.F,), "mlp") for name in ("b_gate", "b_up"))
      b_down = self.param("b_down", sharded_zeros, (c.D,), None)
    gate_BTF, up_BTF = (
      linear(x_BTD, w, (None, "mlp"), ("batch", "length", "act_mlp"), b)
      for w, b in ((w_gate, b_gate), (w_up, b_up))
    )
    inner_BTF = _GATED[c.activation](gate_BTF, up_BTF)
    return linear(inner_BTF, w_down, ("mlp", None), ("batch", "norm_length", None), b_down)
