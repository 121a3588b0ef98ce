import dataclasses
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import (
  AttentionConfig,
  ComputeConfig,
  DataConfig,
  LayerSpec,
  MeshConfig,
  MlpConfig,
  ModelConfig,
  NsaConfig,
  OptimizerConfig,
  RopeConfig,
  TrainConfig,
)
from jaxlm.config_json import from_dict, to_dict
from pallas_kernels.common.errors import UserError

WRONG = [
  (RopeConfig, dict(theta=1.0), "rope.theta=1.0: must be above 1"),
  (RopeConfig, dict(factor=0.5), "rope.factor=0.5"),
  (RopeConfig, dict(original_length=0), "rope.original_length=0"),
  (
    RopeConfig,
    dict(low_freq_factor=4.0),
    "rope.low_freq_factor=4.0: must be below high_freq_factor=4.0",
  ),
  (ModelConfig, dict(layers=0), "model.layers=0: must be at least 1"),
  (AttentionConfig, dict(N=6, K=4), "mixer.N=6: query heads must be a multiple of K=4"),
  (AttentionConfig, dict(H=7), "mixer.H=7: rotary embedding needs an even head width"),
  (NsaConfig, dict(length=24), "mixer.length=24: must be a multiple of stride=16"),
  (NsaConfig, dict(gate_hidden=0), "mixer.gate_hidden=0: must be at least 1, or be None"),
  (MlpConfig, dict(F=0), "feedforward.F=0: must be at least 1"),
  (ModelConfig, dict(pattern=()), "model.pattern=()"),
  (
    ModelConfig,
    dict(layers=4, prefix=(LayerSpec(),), pattern=(LayerSpec(), LayerSpec())),
    "model.layers=4: must be 1 (prefix and remainder) plus a multiple of 2 (pattern)",
  ),
  (ModelConfig, dict(layers=1, prefix=(LayerSpec(),) * 3), "model.layers=1: must be 3"),
  (ModelConfig, dict(norm_eps=0.0), "model.norm_eps=0.0"),
  (DataConfig, dict(length=0), "data.length=0"),
  (DataConfig, dict(holdout=1.0), "data.holdout=1.0: must lie above 0 and not above 0.5"),
  (
    DataConfig,
    dict(tokenizer="bpe:100"),
    "data.tokenizer='bpe:100': bpe:SIZE needs a whole number of at least 257",
  ),
  (DataConfig, dict(tokenizer="bpe:many"), "data.tokenizer='bpe:many'"),
  (OptimizerConfig, dict(learning_rate=0.0), "optimizer.learning_rate=0.0: must be above 0"),
  (OptimizerConfig, dict(b2=1.0), "optimizer.b2=1.0: must lie in [0, 1)"),
  (OptimizerConfig, dict(clip=-1.0), "optimizer.clip=-1.0"),
  (OptimizerConfig, dict(decay=0.0), "optimizer.decay=0.0: must lie in (0, 1]"),
  (TrainConfig, dict(steps=0), "steps=0: must be at least 1"),
  (TrainConfig, dict(batch=6, accumulate=4), "batch=6: must be a multiple of accumulate=4"),
  (TrainConfig, dict(ema=1.0), "ema=1.0: must lie in [0, 1)"),
  (
    TrainConfig,
    dict(stop_after="2"),
    "stop_after='2': must be a number with its unit, as in 90s, 30m, 2h or 1d",
  ),
  (TrainConfig, dict(stop_after="h"), "stop_after='h': must be a number"),
  (TrainConfig, dict(stop_after="-2h"), "stop_after='-2h': must be a number"),
  (TrainConfig, dict(stop_after="2w"), "stop_after='2w': must be a number"),
  (TrainConfig, dict(stop_after="0s"), "stop_after='0s': must be above 0"),
]


@pytest.mark.parametrize(
  "kind, values, message", WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_wrong_value_is_refused_by_field_value_and_rule(kind, values, message):
  with pytest.raises(ValueError) as error:
    kind(**values)
  assert message in str(error.value)


@st.composite
def layer_specs(draw) -> LayerSpec:
  K = draw(st.integers(1, 8))
  scaling = draw(st.sampled_from(["none", "linear", "yarn"]))
  rope = RopeConfig(
    theta=draw(st.floats(2, 1e8)),
    scaling=scaling,
    attention_factor=draw(st.none() | st.floats(0.1, 2)) if scaling == "yarn" else None,
  )
  mixer = AttentionConfig(
    K=K,
    N=K * draw(st.integers(1, 4)),
    H=2 * draw(st.integers(1, 64)),
    window=draw(st.none() | st.integers(1, 10**6)),
    rope=rope,
  )
  return LayerSpec(mixer=mixer, feedforward=MlpConfig(F=draw(st.integers(1, 10**6))))


@st.composite
def train_configs(draw) -> TrainConfig:
  prefix, remainder = (tuple(draw(st.lists(layer_specs(), max_size=2))) for _ in range(2))
  pattern = tuple(draw(st.lists(layer_specs(), min_size=1, max_size=3)))
  model = ModelConfig(
    prefix=prefix,
    pattern=pattern,
    remainder=remainder,
    layers=len(prefix) + len(pattern) * draw(st.integers(1, 8)) + len(remainder),
    tied=draw(st.booleans()),
  )
  accumulate = draw(st.integers(1, 8))
  return TrainConfig(
    steps=draw(st.integers(1, 10**9)),
    batch=accumulate * draw(st.integers(1, 64)),
    accumulate=accumulate,
    run=draw(st.text()),
    trackers=tuple(draw(st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2))),
    model=model,
    compute=ComputeConfig(dtype=draw(st.sampled_from(["float32", "bfloat16"]))),
    data=DataConfig(source=draw(st.text(min_size=1)), holdout=draw(st.floats(0.001, 0.5))),
    optimizer=OptimizerConfig(
      learning_rate=draw(st.floats(1e-12, 10)), name=draw(st.sampled_from(["adamw", "muon"]))
    ),
    mesh=MeshConfig(data=draw(st.sampled_from([-1, 1, 8])), tensor=draw(st.integers(1, 16))),
  )


@settings(max_examples=30)
@given(train_configs())
def test_every_configuration_survives_json(config):
  assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_configuration_from_before_a_field_existed_takes_its_default():
  values = to_dict(TrainConfig())
  del values["ema"], values["model"]["tied"]
  assert from_dict(TrainConfig, values) == TrainConfig()


@pytest.mark.parametrize(
  "text, seconds", [("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("", math.inf)]
)
def test_a_time_limit_in_seconds(text, seconds):
  assert TrainConfig(stop_after=text).stop_seconds == seconds


def test_an_unknown_field_comes_with_its_path_and_the_nearest():
  values = to_dict(TrainConfig())
  values["model"]["layer"] = 3
  with pytest.raises(ValueError, match="model.layer=3: no such field; nearest: layers"):
    from_dict(TrainConfig, values)


def test_a_group_must_be_a_group():
  with pytest.raises(ValueError, match="model=3: must be a group of fields"):
    from_dict(TrainConfig, {"model": 3})


def test_a_wrong_value_in_a_file_is_refused_as_in_code():
  layer = {"mixer": {"rope": {"theta": 0}}}
  with pytest.raises(ValueError, match="rope.theta=0: must be above 1"):
    from_dict(TrainConfig, {"model": {"pattern": [layer]}})


def test_a_wrong_layer_in_a_file_is_named_by_its_path():
  for layer, message in (
    ({"mixer": {"M": 3}}, "model.pattern.0.mixer.M=3: no such field; nearest:"),
    ({"mixer": {"N": "two"}}, "model.pattern.0.mixer.N='two': must be a whole number"),
    ({"mixer": 3}, "model.pattern.0.mixer=3: must be a group of fields"),
    (3, "model.pattern.0=3: must be a group of fields"),
  ):
    with pytest.raises(UserError, match=re.escape(message)):
      from_dict(TrainConfig, {"model": {"pattern": [layer]}})


@dataclasses.dataclass(frozen=True)
class Circle:
  radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square:
  side: int = 1


@dataclasses.dataclass(frozen=True)
class Drawing:
  first: Circle | Square = Circle()
  shapes: tuple[Circle | Square, ...] = ()
  frame: Square | None = None


def test_one_of_several_dataclasses_carries_its_kind():
  drawing = Drawing(Square(2), (Circle(3.0), Square(4)), Square(5))
  values = json.loads(json.dumps(to_dict(drawing)))
  assert values["first"] == {"kind": "Square", "side": 2} and values["frame"] == {"side": 5}
  assert from_dict(Drawing, values) == drawing
  assert from_dict(Drawing, to_dict(Drawing())) == Drawing()
  assert from_dict(Drawing, {"first": {"radius": 2.0}}) == Drawing(first=Circle(2.0))
  with pytest.raises(UserError, match="shapes.0.kind=None: must be one of Circle, Square"):
    from_dict(Drawing, {"shapes": [{"radius": 1.0}]})
  with pytest.raises(UserError, match="first.radius=1.0: no such field; nearest: side"):
    from_dict(Drawing, {"first": {"kind": "Square", "radius": 1.0}})
