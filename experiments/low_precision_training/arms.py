"""Lists what is trained: bf16, FP8, and 4-bit formats with some parts of their recipes."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

from experiments.low_precision_training.blocks import WatchedText
from experiments.small_quantized import quantized
from jaxlm.config import ComputeConfig, QuantRule, QuantSpec, TrainConfig
from jaxlm.config.formats import BlockFormat, Fp8Format
from jaxlm.config.quant import EmulatedProduct
from jaxlm.recipes import Rules
from jaxlm.train.task import Task

PARTS = ("hadamard", "stochastic", "squares", "last layer")
"""of the 4-bit recipes: random Hadamard on the operands of the weight's gradient, stochastic
rounding of gradients, one scale for a square of the weight, the last layer in bf16"""
NONE, RECIPE = "none", "+".join(PARTS)
PAIRS = tuple(f"{a}+{b}" for i, a in enumerate(PARTS) for b in PARTS[i + 1 :])
FP4 = {"mxfp4": 32, "nvfp4": 16}
"""sides of the Hadamard matrix and of the weight's squares"""
FP8 = ("tiles", "tensor", "square gradients")
ARMS = (
  ("plain", "bfloat16"),
  ("plain", "float32"),
  *(("fp8", part) for part in FP8),
  *((format, parts) for format in FP4 for parts in (NONE, *PAIRS, RECIPE)),
  ("nvfp4", f"{RECIPE}+square gradients"),
)
"""formats and what is used of them. None, any two, or all four parts: half of all 16 combinations,
from which each part's effect follows whatever pairs of parts do together"""


def rules_of(format: str, parts: str, layers: int, size: int) -> Rules:
  """Returns the rules of an arm; `size` numbers share a scale in FP8, along an axis or two."""
  if format == "plain":
    return ()
  words = parts.split("+")
  square = cast(Literal["group", "block"], "block" if "square gradients" in words else "group")
  if format == "fp8":
    tile = Fp8Format(size=size)
    product = EmulatedProduct(
      weight=Fp8Format(size=size, shared="block"),
      activation=tile,
      gradient=dataclasses.replace(tile, shared=square),
    )
    if parts == "tensor":
      tensor = Fp8Format(shared="tensor")
      product = EmulatedProduct(weight=tensor, activation=tensor, gradient=tensor)
  else:
    elements = cast(Literal["mxfp4", "nvfp4"], format)
    product = EmulatedProduct(
      weight=BlockFormat(elements=elements, shared="block" if "squares" in words else "group"),
      activation=BlockFormat(elements=elements),
      gradient=BlockFormat(elements=elements, stochastic="stochastic" in words, shared=square),
      hadamard=FP4[format] if "hadamard" in words else 0,
    )
  plain = (QuantRule(match=f"layers[.]{layers - 1}[.].*"),) if "last layer" in words else ()
  return (*plain, QuantRule(match="layers.*", spec=QuantSpec(product=product)))


def make_task(config: TrainConfig, format: str, parts: str) -> tuple[TrainConfig, Task]:
  """Returns a run of an arm; plain ones measure how unequal the gradients of tokens are."""
  dtype = cast(Literal["bfloat16", "float32"], parts if format == "plain" else "bfloat16")
  config = dataclasses.replace(config, compute=ComputeConfig(dtype=dtype))
  model = config.model
  config, task = quantized(config, rules_of(format, parts, model.layers, min(model.D, 128)))
  return config, WatchedText(config, task.text) if format == "plain" else task
