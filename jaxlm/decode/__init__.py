"""Decoding: sampling and generation. Empty caches come from `Transformer.init_cache`."""

from jaxlm.decode.generate import generate
from jaxlm.decode.sampling import Sampler

__all__ = ["Sampler", "generate"]
