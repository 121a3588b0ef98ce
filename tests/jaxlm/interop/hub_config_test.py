"""config.json of both layouts, read and written; contradictions and unknown keys are refused."""

import dataclasses
import json
import re

import pytest

from jaxlm.config import RopeConfig, decoder, rearrange
from jaxlm.interop.hub_config import parse_config, read_config
from jaxlm.interop.hub_export import write_config

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 128,
  "hidden_size": 48,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
}
SIZES = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type")}
QWEN2, QWEN3, GEMMA2 = ({"model_type": name} | SIZES for name in ("qwen2", "qwen3", "gemma2"))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def parse(values, **changes):
  return parse_config(values | changes, "config.json")[0]


def test_missing_keys_take_the_defaults_of_the_classes():
  plain = {"D": 48, "F": 96, "N": 6, "V": 128, "layers": 2, "rope": RopeConfig()}
  assert parse(LLAMA) == decoder(**plain, K=6, H=8, max_length=2048)
  assert parse(QWEN2, num_attention_heads=32, hidden_size=64) == decoder(
    **plain | {"D": 64, "N": 32}, K=32, H=2, max_length=32768, qkv_bias=True
  )
  assert parse(QWEN3, num_attention_heads=32) == decoder(
    **plain | {"N": 32}, K=32, H=128, max_length=32768, qk_norm=True
  )
  assert parse(GEMMA2, num_attention_heads=4) == decoder(
    **plain | {"N": 4},
    K=4,
    H=256,
    max_length=8192,
    tied=True,
    windows=(4096, None),
    norm_offset=1,
    post_norms=True,
    embed_scale="root_width",
    activation="gelu_tanh",
    query_width=256.0,
    cap=50.0,
    logit_cap=30.0,
  )


def test_defaults_are_those_of_transformers():
  """Where transformers is installed, its classes fill in what the tests above expect.

  None of the many fields that they write besides is refused.
  """
  transformers = pytest.importorskip("transformers")
  for values in (
    LLAMA,
    QWEN2 | {"num_attention_heads": 32},
    QWEN3,
    GEMMA2 | {"num_attention_heads": 4},
  ):
    changes = {"num_attention_heads": 48} if values["model_type"] == "qwen3" else {}
    changes |= {"num_key_value_heads": 48} if changes else {}
    changes |= {"hidden_size": 96, "head_dim": 2} if changes else {}
    values = values | changes | ({"hidden_size": 64} if values["model_type"] == "qwen2" else {})
    filled = transformers.AutoConfig.for_model(**values).to_dict()
    assert parse(json.loads(json.dumps(filled))) == parse(values)


@pytest.mark.parametrize(
  "values, changes, rule",
  [
    (
      LLAMA,
      {"model_type": "mamba"},
      "model_type='mamba': must be one of llama, qwen2, qwen3, gemma2",
    ),
    (LLAMA, {"model_type": "qwen2"}, "architectures=.*must be .'Qwen2ForCausalLM'"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
    (LLAMA, {"model_type": 3}, "model_type='3': must be of type str"),
    (LLAMA, {"num_experts": 8}, "num_experts='8': unknown, and may change the numbers"),
    (LLAMA, {"rope_thetas": 1e5}, "rope_thetas='100000.0': unknown, .*; nearest: rope_theta"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config="),
    (LLAMA, {"sliding_window": 8}, "sliding_window='8': unknown"),
    (LLAMA, {"hidden_size": 47}, "hidden_size='47': must be a multiple of num_attention_heads=6"),
    (LLAMA, {"hidden_size": -48}, "hidden_size='-48': must lie in"),
    (LLAMA, {"hidden_size": 48.0}, "hidden_size='48.0': must be of type int"),
    (LLAMA, {"hidden_size": True}, "hidden_size='True': must be of type int"),
    (LLAMA, {"hidden_size": 10**12}, "hidden_size=.*must lie in 1 .. 2147483647"),
    (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers='1000000000': must be at most"),
    (
      LLAMA,
      {"num_key_value_heads": 4},
      "config.json: mixer.N=6: query heads must be a multiple of K=4",
    ),
    (LLAMA, {"head_dim": 7}, "config.json: mixer.H=7: rotary embedding needs an even head width"),
    (LLAMA, {"tie_word_embeddings": None}, "tie_word_embeddings='None': must be of type bool"),
    (LLAMA, {"rms_norm_eps": 0.0}, "rms_norm_eps='0.0': must lie in 1e-12"),
    (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': must be of type float"),
    (LLAMA, {"hidden_act": "relu"}, "hidden_act='relu': must be one of"),
    (LLAMA, {"attention_dropout": 0.1}, "attention_dropout='0.1': must be 0"),
    (
      LLAMA,
      {"torch_dtype": "float32", "dtype": "bfloat16"},
      "torch_dtype='float32': contradicts dtype='bfloat16'",
    ),
    (
      LLAMA,
      {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
      "rope_type='longrope': must be one of",
    ),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    (
      LLAMA,
      {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
      "rope.factor=0.5: must be at least 1",
    ),
    (
      LLAMA,
      {"rope_scaling": LLAMA3 | {"type": "yarn"}},
      "type='yarn': contradicts rope_type='llama3'",
    ),
    (
      LLAMA,
      {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
      "rope.low_freq_factor=4.0: must be below",
    ),
    (LLAMA, {"rope_scaling": YARN | {"beta_fast": -1.0}}, "beta_fast='-1.0': must lie in 1e-12"),
    (
      LLAMA,
      {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
      "partial_rotary_factor='0.5': must be 1",
    ),
    (
      LLAMA,
      {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
      "rope_scaling.factor='2.0': unknown",
    ),
    (LLAMA, {"rope_scaling": "yarn"}, "rope_scaling='yarn': must be of type dict"),
    (
      LLAMA,
      {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}},
      "rope_theta='100000.0': contradicts",
    ),
    (LLAMA, {"rope_theta": 1.0}, "rope_theta='1.0': must be above 1"),
    (
      LLAMA,
      {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
      "contradicts rope_parameters",
    ),
    (
      LLAMA,
      {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}},
      "must equal max_position_embeddings=2048",
    ),
    (QWEN2, {"mlp_bias": True}, "mlp_bias='True': must be false"),
    (
      QWEN2,
      {"layer_types": ["full_attention"]},
      "layer_types=.*must be 2 of full_attention, sliding_attention",
    ),
    (QWEN2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=.*must be 2 of"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "layer_types=.*switches off"),
    (
      GEMMA2,
      {"hidden_act": "gelu"},
      "hidden_act='gelu': contradicts hidden_activation='gelu_pytorch_tanh'",
    ),
    (
      GEMMA2,
      {"use_bidirectional_attention": True},
      "use_bidirectional_attention='True': must be false",
    ),
    (GEMMA2, {"sliding_window": None}, "layer_types=.*switches off"),
    (
      GEMMA2,
      {"sliding_window_size": 7},
      "sliding_window_size='7': contradicts sliding_window=4096",
    ),
    (GEMMA2, {"attn_logit_softcapping": -5.0}, "attn_logit_softcapping='-5.0': must lie in 1e-12"),
  ],
)
def test_what_would_change_the_numbers_is_refused(values, changes, rule):
  # sizes that suit the family's default number of key heads
  sizes = {"qwen2": {"num_key_value_heads": 6}, "qwen3": {}, "gemma2": {"num_key_value_heads": 6}}
  with pytest.raises(ValueError, match=rule) as error:
    parse(values | sizes.get(values["model_type"], {}), **changes)
  assert str(error.value).startswith("config.json")


@pytest.mark.parametrize("key", [key for key in LLAMA if key != "architectures"])
def test_required_keys(key):
  with pytest.raises(ValueError, match=f"config.json: {key} is missing"):
    parse({name: value for name, value in LLAMA.items() if name != key})


WRITERS = {
  "older transformers": {
    "architectures": ["LlamaForCausalLM"],
    "_name_or_path": "x",
    "tokenizer_class": "LlamaTokenizer",
    "pruned_heads": {},
    "id2label": {"0": "LABEL_0"},
    "is_encoder_decoder": False,
    "do_sample": True,
    "temperature": 0.9,
    "max_length": 4096,
    "torchscript": False,
    "torch_dtype": "torch.float32",
    "rope_scaling": None,
  },
  "newer transformers": {
    "dtype": "auto",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "_commit_hash": "abc",
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "layer_types": ["full_attention"] * 2,
  },
  "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1},
  "Llama 1": {"max_sequence_length": 2048, "use_sliding_window": False, "sliding_window": 9},
  "unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.1", "pad_token_id": 3},
  "trl and axolotl": {
    "_attn_implementation_autoset": True,
    "use_cache": False,
    "neftune_noise_alpha": 5,
    "attention_dropout": 0,
    "resid_pdrop": 0.0,
  },
  "a tokenizer's repository": {"auto_map": {"AutoTokenizer": "tokenization_x.X"}},
  "generation": {"bos_token_id": 1, "eos_token_id": [2, 3], "suppress_tokens": [4], "top_p": 0.9},
  "null": {"anything": None, "quantization_config": None},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_says_nothing_about_the_numbers_is_let_through(writer):
  assert parse(LLAMA, **WRITERS[writer]) == parse(LLAMA)


@pytest.mark.parametrize(
  "changes, rule",
  [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized"),
    ({"quantization_config": {"quant_method": "awq"}}, "weights are quantized"),
    ({"quantization_config": {"load_in_4bit": True}}, "weights are quantized"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "names code of the repository"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}, "unknown"),
    ({"mup_scale": 2.0}, "unknown, and may change the numbers"),
    ({"attention_dropout": 0.1}, "must be 0: there is no dropout here"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "must be 1"),
  ],
)
def test_the_flag_of_the_message_is_the_way_on(changes, rule):
  with pytest.raises(ValueError, match=rule) as error:
    parse(LLAMA, **changes)
  key = re.search(r"\(--ignore_config (\S+) reads the rest without it\)", str(error.value))
  assert parse_config(LLAMA | changes, "config.json", (key[1],))[0] == parse(LLAMA)


@pytest.mark.parametrize("key", ["hidden_sizes", "rope_scaling.factor", "use_cache.x"])
def test_a_misspelt_key_to_ignore_is_refused(key):
  with pytest.raises(ValueError, match=f"ignore_config='{key}': config.json has no such key"):
    parse_config(LLAMA | {"use_cache": True}, "config.json", (key,))


@pytest.mark.parametrize(
  "changes, windows",
  [
    ({}, [None] * 4),
    ({"use_sliding_window": True, "max_window_layers": 28}, [None] * 4),
    ({"use_sliding_window": True, "max_window_layers": 2}, [None, None, 5, 5]),
    ({"use_sliding_window": True, "max_window_layers": 0}, [5] * 4),
    (
      {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
      [5, None, 5, None],
    ),
  ],
)
def test_windows_of_qwen(changes, windows):
  config = parse(QWEN2, num_hidden_layers=4, num_key_value_heads=6, sliding_window=5, **changes)
  assert [spec.mixer.window for spec in config.layer_specs] == windows


def test_layers_compile_as_few_blocks_whatever_their_number():
  """Two kinds of layers in turn, or 28 of one kind and 20 of the other, are two blocks."""
  odd = parse(GEMMA2, num_hidden_layers=27, num_key_value_heads=6)
  assert [(len(specs), repeats) for specs, repeats in odd.stacks] == [(2, 13), (1, 1)]
  windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 28}
  halves = parse(QWEN2, num_hidden_layers=48, num_key_value_heads=6, **windows)
  assert [(len(specs), repeats) for specs, repeats in halves.stacks] == [(1, 28), (1, 20)]


BASE = dict(D=64, F=96, N=4, K=2, H=16, V=100, layers=4, max_length=512)
GEMMA = {
  "norm_offset": 1,
  "post_norms": True,
  "embed_scale": "root_width",
  "activation": "gelu_tanh",
}
WRITTEN = [
  {},
  {"tied": True, "H": 8, "bias": True},
  {"qkv_bias": True, "out_bias": True, "activation": "gelu"},
  {"qkv_bias": True},
  {"qkv_bias": True, "windows": (None, None, 9, 9)},
  {"qk_norm": True, "windows": (128, None)},
  {"qk_norm": True, "qkv_bias": True, "out_bias": True, "D": 66},
  GEMMA | {"query_width": 24.5, "cap": 5.0, "windows": (128,), "tied": True},
  GEMMA | {"query_width": 16.0, "logit_cap": 3.0},
  {"rope": RopeConfig(theta=5e5, scaling="linear", factor=2.0)},
  {"rope": RopeConfig(scaling="dynamic", factor=2.0, original_length=512)},
  {
    "rope": RopeConfig(
      scaling="llama3", factor=8.0, original_length=64, low_freq_factor=2.0, high_freq_factor=3.0
    )
  },
  {
    "rope": RopeConfig(
      scaling="yarn", factor=8.0, original_length=64, truncate=False, attention_factor=1.5
    )
  },
  {
    "rope": RopeConfig(
      scaling="yarn", factor=8.0, original_length=64, mscale=0.7, mscale_all_dim=0.9, beta_fast=9.0
    )
  },
]


@pytest.mark.parametrize("fields", WRITTEN, ids=lambda fields: "-".join(fields) or "plain")
def test_what_is_written_reads_back(fields, tmp_path):
  config = rearrange(decoder(**BASE | fields))
  (tmp_path / "config.json").write_text(json.dumps(write_config(config, "bfloat16")))
  assert read_config(tmp_path / "config.json") == (config, "bfloat16")


@pytest.mark.parametrize(
  "fields, named",
  [
    ({"rope": RopeConfig(scaling="ntk", factor=2.0)}, "mixer.rope="),
    (
      {"rope": RopeConfig(scaling="dynamic", factor=2.0, original_length=64)},
      "model.max_length=512",
    ),
    ({"logit_cap": 5.0}, "model.logit_cap=5.0"),
    ({"query_width": 5.0}, "mixer.query_width=5.0"),
    ({"out_bias": True}, "mixer.(qkv|out)_bias="),
    ({"qk_norm": True, "bias": True}, "(feedforward.bias|mixer.qk_norm)=True"),
    ({"norm_offset": 1}, "model.norm_offset=1"),
  ],
)
def test_what_cannot_be_written_is_named(fields, named):
  with pytest.raises(
    ValueError, match=named + ".*no llama or qwen2 or qwen3 or gemma2 model can have this"
  ):
    write_config(decoder(**BASE | fields), "float32")


def test_fields_that_have_no_effect_do_not_prevent_writing():
  idle = RopeConfig(factor=3.0, original_length=77, beta_fast=5.0)
  config = decoder(**BASE | {"query_width": 16.0, "rope": idle, "max_length": None})
  back, _ = parse_config(write_config(config, "float32"), "config.json")
  assert back == decoder(**BASE | {"max_length": 2048})


def test_a_repeated_pattern_is_written_as_its_layers():
  doubled = decoder(**BASE, windows=(None, None))
  assert parse_config(write_config(doubled, "float32"), "config.json")[0] == decoder(**BASE)


def test_layers_that_differ_in_more_than_their_window_are_not_written():
  config = decoder(**BASE)
  (spec,) = config.pattern
  wide = dataclasses.replace(spec, feedforward=dataclasses.replace(spec.feedforward, F=128))
  with pytest.raises(ValueError, match="feedforward.F=128: no llama"):
    write_config(dataclasses.replace(config, remainder=(wide,)), "float32")


def test_large_configurations_are_not_read(tmp_path):
  path = tmp_path / "config.json"
  path.write_text("{" + " " * (1 << 20) + "}")
  with pytest.raises(ValueError, match="at most 1,048,576 are read"):
    read_config(path)
  with pytest.raises(ValueError, match="no such file"):
    read_config(tmp_path / "absent.json")
