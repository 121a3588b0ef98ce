"""Lists which parameter of this project's tree is which tensor of a Hub checkpoint.

The tree stacks blocks of one kind on a leading axis: with a pattern of P kinds, layer i is row
i // P of stack i % P. The Hub has one tensor per layer, and matrices as [out, in].
"""

# D model, N query heads, K key heads, H head width, F feed-forward, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.config import ModelConfig

Path = tuple[str, ...]


class Weight(NamedTuple):
  """One parameter of the tree and the tensors that hold it."""

  path: Path
  """keys from the root of the tree"""
  shape: tuple[int, ...]
  """of one layer, as in the tree"""
  names: tuple[str, ...]
  """name of its tensor, or of the tensor of each row if `stacked`"""
  stacked: bool
  """whether the parameter has a leading axis of layers"""
  transposed: bool
  """whether the file holds the transposed matrix"""

  @property
  def file_shape(self) -> tuple[int, ...]:
    """Shape of one tensor in the file."""
    return self.shape[::-1] if self.transposed else self.shape

  @property
  def size(self) -> int:
    """Number of entries of one tensor."""
    return math.prod(self.shape)


def weights(c: ModelConfig) -> Iterator[Weight]:
  """Yields all parameters of the model, stack by stack."""
  yield Weight(
    ("embed",), (c.V, c.D), ("model.embed_tokens.weight",), stacked=False, transposed=False
  )
  pattern = len(c.attention)
  for stack in range(pattern):
    for (module, parameter), (suffix, shape) in _block(c).items():
      names = tuple(f"model.layers.{layer}.{suffix}" for layer in range(stack, c.layers, pattern))
      path = ("blocks", str(stack), *module.split("/"), parameter)
      yield Weight(path, shape, names, stacked=True, transposed=len(shape) == 2)
  yield Weight(("norm", "w_D"), (c.D,), ("model.norm.weight",), stacked=False, transposed=False)
  if not c.tied:
    yield Weight(("head",), (c.D, c.V), ("lm_head.weight",), stacked=False, transposed=True)


def tensor_count(c: ModelConfig) -> int:
  """Returns how many tensors `weights` names, without listing them."""
  return c.layers * len(_block(c)) + (2 if c.tied else 3)


def _block(c: ModelConfig) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
  """Maps (module, parameter) of a block to the name below the layer and the shape."""
  Q, Z = c.N * c.H, c.K * c.H
  table: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {
    ("attention", "w_q"): ("self_attn.q_proj.weight", (c.D, Q)),
    ("attention", "w_k"): ("self_attn.k_proj.weight", (c.D, Z)),
    ("attention", "w_v"): ("self_attn.v_proj.weight", (c.D, Z)),
    ("attention", "w_o"): ("self_attn.o_proj.weight", (Q, c.D)),
    ("mlp", "w_gate"): ("mlp.gate_proj.weight", (c.D, c.F)),
    ("mlp", "w_up"): ("mlp.up_proj.weight", (c.D, c.F)),
    ("mlp", "w_down"): ("mlp.down_proj.weight", (c.F, c.D)),
    ("attention_norm", "w_D"): ("input_layernorm.weight", (c.D,)),
  }
  if c.post_norms:
    table |= {
      ("attention_post_norm", "w_D"): ("post_attention_layernorm.weight", (c.D,)),
      ("mlp_norm", "w_D"): ("pre_feedforward_layernorm.weight", (c.D,)),
      ("mlp_post_norm", "w_D"): ("post_feedforward_layernorm.weight", (c.D,)),
    }
  else:
    table[("mlp_norm", "w_D")] = ("post_attention_layernorm.weight", (c.D,))
  if c.qk_norm:
    table[("attention/q_norm", "w_D")] = ("self_attn.q_norm.weight", (c.H,))
    table[("attention/k_norm", "w_D")] = ("self_attn.k_norm.weight", (c.H,))
  if c.qkv_bias:
    for letter, width in (("q", Q), ("k", Z), ("v", Z)):
      table[("attention", f"b_{letter}")] = (f"self_attn.{letter}_proj.bias", (width,))
  if c.out_bias:
    table[("attention", "b_o")] = ("self_attn.o_proj.bias", (c.D,))
  if c.mlp_bias:
    for name, width in (("gate", c.F), ("up", c.F), ("down", c.D)):
      table[("mlp", f"b_{name}")] = (f"mlp.{name}_proj.bias", (width,))
  return table
