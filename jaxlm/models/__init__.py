"""Models: pure functions of arrays and the thin modules that own their parameters."""

from jaxlm.models.transformer import Transformer

__all__ = ["Transformer"]
