"""Gated feed-forward (Shazeer 2020, arXiv 2002.05202, equation 6): SwiGLU, GEGLU."""

# B batch, T positions, D model, F feed-forward width

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from jaxlm.config import ModelConfig
from jaxlm.models.linear import linear, sharded_normal, sharded_zeros
from sharding.rules import gather

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Mlp(nn.Module):
  """down(act(gate(x)) up(x)). Weights: w_gate and w_up [D, F], w_down [F, D]; with biases b_gate, b_up, b_down."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    x_BTD = gather(x_BTD, "batch", "length", None)
    w_gate = self.param("w_gate", sharded_normal, (c.D, c.F), c.D**-0.5, "embed", "mlp")
    w_up = self.param("w_up", sharded_normal, (c.D, c.F), c.D**-0.5, "embed", "mlp")
    w_down = self.param("w_down", sharded_normal, (c.F, c.D), (c.F * 2 * c.layers) ** -0.5, "mlp", "embed")
    b_gate = b_up = b_down = None
    if c.mlp_bias:
      b_gate, b_up = (self.param(name, sharded_zeros, (c.F,), "mlp") for name in ("b_gate", "b_up"))
      b_down = self.param("b_down", sharded_zeros, (c.D,), None)
    gate_BTF, up_BTF = (
      linear(x_BTD, w, (None, "mlp"), ("batch", "length", "act_mlp"), b) for w, b in ((w_gate, b_gate), (w_up, b_up))
    )
    inner_BTF = _ACTIVATIONS[c.activation](gate_BTF) * up_BTF
    return linear(inner_BTF, w_down, ("mlp", None), ("batch", "norm_length", None), b_down)
