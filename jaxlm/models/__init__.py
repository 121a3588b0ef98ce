"""Models: pure functions of arrays and the thin modules that own their parameters."""

from jaxlm.models.head import Head, head
from jaxlm.models.transformer import Transformer

__all__ = ["Head", "Transformer", "head"]
