"""Computes the loss of a large-vocabulary classifier without its logits in memory."""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.filtering import Aux

__all__ = ["Aux", "linear_cross_entropy"]
