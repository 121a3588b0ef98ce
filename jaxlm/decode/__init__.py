"""Decodes: samples and generates text. Empty caches come from `Transformer.init_cache`."""

from jaxlm.decode.generation import NoDistribution, generate
from jaxlm.decode.sampling import Sampler

__all__ = ["NoDistribution", "Sampler", "generate"]
