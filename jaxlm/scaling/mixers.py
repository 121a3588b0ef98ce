"""Counts parameters and FLOPs of one mixer: its projections, and what happens between them."""

# D model, N query heads (of a recurrence: value heads), K key heads, H width of queries and keys,
# U width of values, C positions of a chunk, X counted tokens

from __future__ import annotations

import math

import numpy as np

from jaxlm.config import AttentionConfig, ConvConfig, KdaConfig, MixerConfig, NsaConfig

_CHUNK = 64


def projection_entries(D: int, mixer: MixerConfig) -> int:
  """Counts the entries of the matrices that multiply every token."""
  match mixer:
    case AttentionConfig():
      return 2 * D * mixer.N * mixer.H + 2 * D * mixer.K * mixer.H
    case ConvConfig():
      return 3 * D * D
    case NsaConfig():
      U, sets = mixer.value_width, 1 if mixer.shared else 3
      keys_and_values = sets * D * mixer.K * (mixer.H + U)
      R = mixer.gate_hidden
      gates = 3 * D * mixer.N if R is None else R * (D + 3 * mixer.N)
      return D * mixer.N * mixer.H + keys_and_values + gates + mixer.N * U * D
    case KdaConfig():
      U, R, rule = mixer.value_width, mixer.bottleneck, mixer.recurrence
      entries = 2 * D * mixer.K * mixer.H + 2 * D * mixer.N * U
      decay = {"channel": R * (D + mixer.N * mixer.H), "head": D * mixer.N}
      entries += decay.get(rule.decay, 0) + rule.erases * D * mixer.N
      return entries + (mixer.out_gate != "none") * R * (D + mixer.N * U)


def other_entries(D: int, mixer: MixerConfig) -> int:
  """Counts norms, biases, taps, gates' parameters and what compresses blocks."""
  match mixer:
    case AttentionConfig():
      biases = (mixer.N + 2 * mixer.K) * mixer.H * mixer.qkv_bias + D * mixer.out_bias
      return biases + 2 * mixer.H * mixer.qk_norm
    case ConvConfig():
      return mixer.taps * D
    case NsaConfig():
      return sum(math.prod(shape) for shape in mixer.compression_shapes.values())
    case KdaConfig():
      U = mixer.value_width
      taps = mixer.conv * (2 * mixer.K * mixer.H + mixer.N * U)
      gates = {"channel": mixer.N * (mixer.H + 1), "head": 2 * mixer.N}
      return U + taps + gates.get(mixer.recurrence.decay, 0)


def mixing_flops(mixer: MixerConfig, keys_X: np.ndarray) -> float:
  """Returns FLOPs, forward and backward, of all products between the projections.

  `keys_X` are, for each token, the tokens of its segment up to itself, int. Attention multiplies
  queries with the keys they see and weights with values. Native sparse attention does so in each
  branch and compresses a block every `stride` tokens. A recurrence is counted in its chunk form,
  6 H U + C (2 H + U) + C^2 for a token and head forward with C = 64 (arXiv 2510.26692, equation 13,
  with U = H), and without erasing 4 H U + C (H + U). Taps and elementwise work do not count.
  """
  match mixer:
    case AttentionConfig():
      pairs = int(np.minimum(keys_X, mixer.window or keys_X.max(initial=0)).sum(dtype=np.int64))
      return 12 * mixer.N * mixer.H * pairs
    case ConvConfig():
      return 0
    case KdaConfig():
      H, U, C = mixer.H, mixer.value_width, _CHUNK
      forward = 6 * H * U + C * (2 * H + U) + C * C
      if not mixer.recurrence.erases:
        forward = 4 * H * U + C * (H + U)
      return 3 * mixer.N * forward * keys_X.size
    case NsaConfig():
      pairs = sum(int(x.sum(dtype=np.int64)) for x in visible_keys(mixer, keys_X).values())
      blocks = int((keys_X >= mixer.length).sum()) / mixer.stride
      names = [name for name in mixer.compression_shapes if not name.endswith("position")]
      entries = sum(math.prod(mixer.compression_shapes[name]) for name in names)
      return 6 * mixer.N * (mixer.H + mixer.value_width) * pairs + 6 * entries * blocks


def visible_keys(mixer: NsaConfig, keys_X: np.ndarray) -> dict[str, np.ndarray]:
  """Returns how many keys each branch of native sparse attention shows to each token, int."""
  complete_X = np.maximum((keys_X - mixer.length) // mixer.stride + 1, 0)
  in_own_block_X = (keys_X - 1) % mixer.block + 1
  most_X = (mixer.count - 1) * mixer.block + in_own_block_X
  return {
    "compressed": complete_X,
    "selected": np.minimum(keys_X, most_X),
    "window": np.minimum(keys_X, mixer.window),
  }
