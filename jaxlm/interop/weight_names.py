"""Lists which parameter of this project's tree is which tensor of a Hub checkpoint.

The tree stacks the repeats of each of `ModelConfig.stacks` on a leading axis. The Hub has one
tensor per layer, and matrices as [out, in].
"""

# D model, N query heads, K key heads, H head width, F feed-forward, V vocabulary

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.config import AttentionConfig, LayerSpec, ModelConfig
from pallas_kernels.common.errors import UnsupportedError

Path = tuple[str, ...]
# Rotary tables and causal masks, which older programs store; they are computed here.
_BUFFERS = re.compile(
  r"(model\.)?(layers\.\d+\.self_attn\.)?"
  r"(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|masked_bias|causal_mask)"
)


class Weight(NamedTuple):
  """Names one parameter of the tree and the tensors that hold it."""

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
    """Returns the shape of one tensor in the file."""
    return self.shape[::-1] if self.transposed else self.shape

  @property
  def size(self) -> int:
    """Returns the number of entries of one tensor."""
    return math.prod(self.shape)


def list_weights(c: ModelConfig) -> Iterator[Weight]:
  """Yields all parameters of the model, stack by stack."""
  embed, name = ("embed", "weight"), "model.embed_tokens.weight"
  yield Weight(embed, (c.V, c.D), (name,), stacked=False, transposed=False)
  first = 0
  for index, (specs, repeats) in enumerate(c.stacks):
    end = first + len(specs) * repeats
    for slot, spec in enumerate(specs):
      layers = range(first + slot, end, len(specs))
      for (module, parameter), (suffix, shape) in _block(c, spec).items():
        names = tuple(f"model.layers.{layer}.{suffix}" for layer in layers)
        path = ("stacks", str(index), str(slot), *module.split("/"), parameter)
        yield Weight(path, shape, names, stacked=True, transposed=len(shape) == 2)
    first = end
  yield Weight(("norm", "weight"), (c.D,), ("model.norm.weight",), stacked=False, transposed=False)
  if not c.tied:
    head = ("head", "weight")
    yield Weight(head, (c.D, c.V), ("lm_head.weight",), stacked=False, transposed=True)


def is_buffer(name: str) -> bool:
  """Returns whether a tensor of this name holds what the model computes itself."""
  return _BUFFERS.fullmatch(name) is not None


def count_tensors(c: ModelConfig) -> int:
  """Returns how many tensors `list_weights` names, without listing them."""
  return sum(len(_block(c, spec)) for spec in c.layer_specs) + (2 if c.tied else 3)


def _block(c: ModelConfig, spec: LayerSpec) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
  """Maps (module, parameter) of a layer to its name below the layer on the Hub, and its shape."""
  mixer, F, feedforward_bias = spec.mixer, spec.feedforward.F, spec.feedforward.bias
  if not isinstance(mixer, AttentionConfig):
    kind = type(mixer).__name__
    raise UnsupportedError(f"model: a layer is a {kind}, for which the Hub's names are not known")
  Q, Z = mixer.N * mixer.H, mixer.K * mixer.H
  linears = {
    ("mixer/q", "self_attn.q_proj"): ((c.D, Q), mixer.qkv_bias),
    ("mixer/k", "self_attn.k_proj"): ((c.D, Z), mixer.qkv_bias),
    ("mixer/v", "self_attn.v_proj"): ((c.D, Z), mixer.qkv_bias),
    ("mixer/o", "self_attn.o_proj"): ((Q, c.D), mixer.out_bias),
    ("feedforward/gate", "mlp.gate_proj"): ((c.D, F), feedforward_bias),
    ("feedforward/up", "mlp.up_proj"): ((c.D, F), feedforward_bias),
    ("feedforward/down", "mlp.down_proj"): ((F, c.D), feedforward_bias),
  }
  norms = {"mixer_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
  if c.post_norms:
    norms["mixer_post_norm"] = "post_attention_layernorm"
    norms["feedforward_norm"] = "pre_feedforward_layernorm"
    norms["feedforward_post_norm"] = "post_feedforward_layernorm"

  table: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
  for (module, name), (shape, biased) in linears.items():
    table[(module, "weight")] = (f"{name}.weight", shape)
    if biased:
      table[(module, "bias")] = (f"{name}.bias", shape[1:])
  table |= {(module, "weight"): (f"{name}.weight", (c.D,)) for module, name in norms.items()}
  if mixer.qk_norm:
    for name in ("q_norm", "k_norm"):
      table[(f"mixer/{name}", "weight")] = (f"self_attn.{name}.weight", (mixer.H,))
  return table
