"""Decodes: samples and generates text with a cache, which `Transformer.init_cache` makes."""

from jaxlm.decode.generate import generate
from jaxlm.decode.sampling import Sampler

__all__ = ["Sampler", "generate"]
