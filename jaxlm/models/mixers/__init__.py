"""Holds the layers that exchange information between positions.

A mixer is called with (x, context, cache). It returns (the layer's output, the updated cache or
None, statistics), declares its parameters and makes its own empty decode cache (`init_cache`).
"""

from typing import Any

from jaxlm.config import AttentionConfig, ConvConfig, KdaConfig, NsaConfig
from jaxlm.models.mixers.attention import Attention
from jaxlm.models.mixers.conv import Conv
from jaxlm.models.mixers.kda import Kda
from jaxlm.models.mixers.nsa import Nsa

MIXERS: dict[type, Any] = {
  AttentionConfig: Attention,
  ConvConfig: Conv,
  KdaConfig: Kda,
  NsaConfig: Nsa,
}
