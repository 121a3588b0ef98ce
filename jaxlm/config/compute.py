"""Configures how a model is computed; nothing here changes what its weights mean."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
  """Configures how a model is computed. Weights keep their own type; none of this is in them."""

  dtype: Literal["float32", "bfloat16"] = "float32"
  """compute type; norms, softmax, logits and losses are computed in float32 whatever it is"""
  reduce_dtype: Literal["float32", "bfloat16"] = "float32"
  """type in which FSDP sums the gradients of weight matrices over devices (reduce-scatter); those
  of looked-up embedding rows are sent in it, or in a narrower compute type, and summed in float32
  where their row lies"""
  attention_implementation: Literal["auto", "reference", "xla", "splash", "cudnn"] = "auto"
  """auto: splash on TPU and cudnn on GPU where they can, else xla; a named one runs or raises"""
  remat: Literal["none", "full", "dots", "names"] = "none"
  """recomputed in the backward pass: nothing, all, all but matmul outputs, all but named arrays"""
  scan: Literal["auto", "always", "never"] = "auto"
  """run the layers by lax.scan; auto: not on CPU up to 8 layers, where a Python loop is faster"""
