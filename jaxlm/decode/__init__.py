"""Decodes: samples and generates text. Empty caches come from `Transformer.init_cache`."""

from jaxlm.decode.generation import generate
from jaxlm.decode.sampling import Sampler

__all__ = ["Sampler", "generate"]
