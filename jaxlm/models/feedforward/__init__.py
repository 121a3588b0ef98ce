"""Holds the layers that work on each position by itself.

A feed-forward is called with x, returns (the layer's output, statistics) and declares its
parameters.
"""

from typing import Any

from jaxlm.config import MlpConfig
from jaxlm.models.feedforward.mlp import Mlp

FEEDFORWARDS: dict[type, Any] = {MlpConfig: Mlp}
