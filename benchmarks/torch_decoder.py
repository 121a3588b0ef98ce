"""The same decoder as `jaxlm.models.Transformer` in plain PyTorch, for the speed comparison."""

# B batch, T positions, D model, N query heads, K key heads, H head width, V vocabulary

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
  def __init__(self, D: int, eps: float):
    super().__init__()
    self.w_D, self.eps = nn.Parameter(torch.ones(D)), eps

  def forward(self, x_BTD):
    return F.rms_norm(x_BTD, self.w_D.shape, self.w_D, self.eps)


def rope(x_BNTH, cos_TR, sin_TR):
  left, right = x_BNTH.chunk(2, dim=-1)
  return torch.cat((left * cos_TR - right * sin_TR, right * cos_TR + left * sin_TR), dim=-1)


class Block(nn.Module):
  def __init__(self, config, spec):
    super().__init__()
    c, D, F = spec.mixer, config.D, spec.feedforward.F
    self.c = c
    self.attention_norm, self.mlp_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)
    self.w_qkv = nn.Linear(D, (c.N + 2 * c.K) * c.H, bias=False)
    self.w_o = nn.Linear(c.N * c.H, D, bias=False)
    self.w_gate, self.w_up = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
    self.w_down = nn.Linear(F, D, bias=False)

  def forward(self, x_BTD, cos_TR, sin_TR):
    c = self.c
    B, T, D = x_BTD.shape
    qkv = self.w_qkv(self.attention_norm(x_BTD)).view(B, T, c.N + 2 * c.K, c.H).transpose(1, 2)
    q, k, v = qkv.split((c.N, c.K, c.K), dim=1)
    q, k = rope(q, cos_TR, sin_TR), rope(k, cos_TR, sin_TR)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.N != c.K)
    x_BTD = x_BTD + self.w_o(o.transpose(1, 2).reshape(B, T, c.N * c.H))
    h_BTD = self.mlp_norm(x_BTD)
    return x_BTD + self.w_down(F.silu(self.w_gate(h_BTD)) * self.w_up(h_BTD))


class Decoder(nn.Module):
  def __init__(self, c, length: int):
    super().__init__()
    self.embed = nn.Embedding(c.V, c.D)
    self.blocks = nn.ModuleList(Block(c, spec) for spec in c.layer_specs)
    self.norm, self.head = RMSNorm(c.D, c.norm_eps), nn.Linear(c.D, c.V, bias=False)
    mixer = c.layer_specs[0].mixer
    f_R = mixer.rope.theta ** (-2 * torch.arange(mixer.H // 2, dtype=torch.float32) / mixer.H)
    angles_TR = torch.arange(length, dtype=torch.float32)[:, None] * f_R
    self.register_buffer("cos_TR", angles_TR.cos())
    self.register_buffer("sin_TR", angles_TR.sin())

  def forward(self, ids_BT, targets_BT):
    x_BTD = self.embed(ids_BT)
    for block in self.blocks:
      x_BTD = block(x_BTD, self.cos_TR, self.sin_TR)
    logits_BTV = self.head(self.norm(x_BTD))
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def load(model: Decoder, params: dict) -> dict[str, tuple[nn.Parameter, bool]]:
  """Copies jaxlm's parameters into the model.

  Returns name -> (parameter, transposed), to read gradients back by the same names.
  """
  named = {
    "embed/weight": (model.embed.weight, False),
    "norm/weight": (model.norm.w_D, False),
    "head/weight": (model.head.weight, True),
  }
  stacks = {key: value for key, value in params.items() if key.startswith("stacks/0/0/")}
  for i, block in enumerate(model.blocks):
    named |= {
      f"{i}/mixer_norm/weight": (block.attention_norm.w_D, False),
      f"{i}/feedforward_norm/weight": (block.mlp_norm.w_D, False),
      f"{i}/mixer/o/weight": (block.w_o.weight, True),
      f"{i}/feedforward/gate/weight": (block.w_gate.weight, True),
      f"{i}/feedforward/up/weight": (block.w_up.weight, True),
      f"{i}/feedforward/down/weight": (block.w_down.weight, True),
      f"{i}/mixer/qkv/weight": (block.w_qkv.weight, True),
    }
  flat = flatten_layers(params, stacks, len(model.blocks))
  with torch.no_grad():
    for name, (parameter, transposed) in named.items():
      value = torch.from_numpy(flat[name].copy())
      parameter.copy_(value.T if transposed else value)
  return named


def flatten_layers(tree: dict, stacks: dict, layers: int) -> dict:
  """Returns one entry per layer and parameter, q, k and v side by side."""
  import numpy as np

  flat = {key: value for key, value in tree.items() if key not in stacks}
  for key, stacked in stacks.items():
    for i in range(layers):
      flat[f"{i}/{key.removeprefix('stacks/0/0/')}"] = stacked[i]
  for i in range(layers):
    parts = [flat.pop(f"{i}/mixer/{name}/weight") for name in "qkv"]
    flat[f"{i}/mixer/qkv/weight"] = np.concatenate(parts, axis=1)
  return flat
