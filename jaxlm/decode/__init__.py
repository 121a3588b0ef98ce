"""Decodes: samples and generates text with a cache."""

from jaxlm.decode.cache import init_cache
from jaxlm.decode.generate import generate
from jaxlm.decode.sampling import Sampler

__all__ = ["Sampler", "generate", "init_cache"]
