"""Weights in bytes are written as compressed-tensors has them, and read back as the same floats."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxlm.config import QuantRule, QuantSpec, decoder
from jaxlm.config.formats import BitnetFormat, LsqFormat, ParetoqFormat, QuestFormat, UniformFormat
from jaxlm.config.quant import find_spec
from jaxlm.interop import huggingface
from jaxlm.interop.compressed_tensors import packed_tensors
from jaxlm.interop.safetensors import MappedFile, read_header
from jaxlm.models import Transformer
from jaxlm.models.parts import list_matmuls
from jaxlm.quant.pack_model import pack_model
from jaxlm.quant.packing import pack_weight, unpack_weight
from pallas_kernels.common.errors import UserError

MODEL = decoder(V=32, D=24, F=40, N=2, K=1, H=12, layers=2)
FORMATS = {
  "mixer[.]q": UniformFormat(shared="group", size=8, scale_dtype="bfloat16"),
  "mixer[.](k|v)": UniformFormat(bits=8),
  "mixer[.]o": UniformFormat(bits=3),
  "feedforward[.]gate": LsqFormat(bits=2),
  "feedforward[.]up": ParetoqFormat(bits="ternary"),
  "feedforward[.]down": BitnetFormat(),
}
BITS = {ParetoqFormat: 2, BitnetFormat: 2}
HUB = {
  **{f"mixer.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
  **{f"feedforward.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def with_rules(**specs):
  rules = (QuantRule(match=f"layers.*{part}", spec=QuantSpec(**s)) for part, s in specs.items())
  return dataclasses.replace(MODEL, quant=tuple(rules))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  config = with_rules(**{part: {"weight": format} for part, format in FORMATS.items()})
  params = Transformer(config).init(jax.random.key(0))
  config, packed = pack_model(config, params)
  folder = tmp_path_factory.mktemp("hub") / "model"
  huggingface.save(folder, config, packed)
  return config, packed, folder


def test_the_words_of_a_weight():
  """Two rows of three codes with 4 bits: 8 is added to each, the first has the low bits."""
  format = UniformFormat()
  packed = pack_weight(np.float32([[7, -7, 1], [0, 14, 0]]), format)
  tensors = dict(packed_tensors("q.weight", packed, format, 3))
  values = {name: tensor.read().tolist() for name, tensor in tensors.items()}
  assert values == {
    "q.weight_packed": [[0x91F], [0x8F8]],
    "q.weight_scale": [[1.0], [2.0]],
    "q.weight_shape": [2, 3],
  }


@pytest.mark.slow
def test_every_weight_is_its_codes_times_its_scales(written):
  """By the layout's definition: code + 2^(bits-1) in as many bits, one after the other."""
  config, packed, folder = written
  entries = read_header(folder / "model.safetensors")
  file = MappedFile(folder / "model.safetensors")

  def read(name):
    return np.asarray(file.view(entries.pop(name)))

  for matmul in list_matmuls(config)[:-1]:
    part = functools.reduce(lambda tree, key: tree[key], matmul.path, packed)
    for row, name in enumerate(matmul.names):
      _, layer, inner = name.split(".", 2)
      stem = f"model.layers.{layer}.{HUB[inner]}.weight"
      words, scale, (F, D) = (read(f"{stem}_{suffix}") for suffix in ("packed", "scale", "shape"))
      format = find_spec(config.quant, name).weight
      bits = BITS[type(format)] if type(format) in BITS else format.bits
      assert words.dtype == np.int32 and words.shape == (F, -(-D * bits // 32))
      stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : D * bits]
      codes = stream.reshape(F, D, bits) @ (1 << np.arange(bits)) - 2 ** (bits - 1)
      got = codes * np.repeat(scale.astype(np.float32), D // scale.shape[1], axis=1)
      own = {key.removeprefix("packed_"): leaf[row] for key, leaf in part.items()}
      np.testing.assert_allclose(got, unpack_weight(own, format, D), rtol=1e-6, atol=1e-7)
  norms = [n for n in entries if "norm" in n]
  assert set(entries) == {"model.embed_tokens.weight", "lm_head.weight", *norms}


@pytest.mark.slow
def test_the_configuration_names_each_format_with_its_layers(written):
  values = json.loads((written[2] / "config.json").read_text())["quantization_config"]
  assert (values["quant_method"], values["format"]) == ("compressed-tensors", "pack-quantized")
  assert values["ignore"] == ["lm_head"]
  groups = {tuple(g["targets"]): g["weights"] for g in values["config_groups"].values()}
  assert len(groups) == len(FORMATS)
  want = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
  want |= {"strategy": "group", "group_size": 8}
  assert groups[tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))] == want
  with pytest.raises(UserError, match="quantization_config"):
    huggingface.load(written[2])


@pytest.mark.parametrize(
  "spec, message",
  [
    ({"weight": UniformFormat(grid="affine")}, "with a level at zero"),
    ({"weight": QuestFormat(hadamard=8)}, "with a level at zero"),
    ({"weight": UniformFormat(), "activation": UniformFormat(bits=8)}, "no other formats"),
    ({"weight": UniformFormat(), "hadamard": 8}, "no other formats"),
  ],
)
def test_what_the_layout_cannot_hold_is_refused(spec, message, tmp_path):
  config = with_rules(**{"mixer[.]q": spec | {"packed": True}})
  with pytest.raises(UserError, match=message):
    huggingface.save(tmp_path / "model", config, {})
  assert not (tmp_path / "model").exists()
