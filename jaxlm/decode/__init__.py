"""Decoding: caches, sampling, generation."""

from jaxlm.decode.cache import init_cache
from jaxlm.decode.generate import generate
from jaxlm.decode.sampling import Sampler

__all__ = ["Sampler", "generate", "init_cache"]
