"""Defines models: pure functions of arrays, and the thin modules that own their parameters."""

from jaxlm.models.head import Head
from jaxlm.models.transformer import Transformer, roles

__all__ = ["Head", "Transformer", "roles"]
