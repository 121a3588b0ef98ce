import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import (
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RopeConfig,
  TrainConfig,
)
from jaxlm.config_json import from_dict, to_dict

WRONG = [
  (RopeConfig, dict(theta=1.0), "model.rope.theta=1.0: must be above 1"),
  (RopeConfig, dict(factor=0.5), "model.rope.factor=0.5"),
  (RopeConfig, dict(original_length=0), "model.rope.original_length=0"),
  (
    RopeConfig,
    dict(low_freq_factor=4.0),
    "model.rope.low_freq_factor=4.0: must be below high_freq_factor=4.0",
  ),
  (ModelConfig, dict(layers=0), "model.layers=0: must be at least 1"),
  (ModelConfig, dict(N=6, K=4), "model.N=6: query heads must be a multiple of K=4"),
  (ModelConfig, dict(H=7), "model.H=7: rotary embedding needs an even head width"),
  (ModelConfig, dict(attention=()), "model.attention=()"),
  (
    ModelConfig,
    dict(layers=3, attention=("window", "full")),
    "model.layers=3: must be a multiple of the 2 entries",
  ),
  (ModelConfig, dict(norm_eps=0.0), "model.norm_eps=0.0"),
  (DataConfig, dict(length=0), "data.length=0"),
  (DataConfig, dict(holdout=1.0), "data.holdout=1.0: must lie between 0 and 1"),
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
def train_configs(draw) -> TrainConfig:
  attention = tuple(draw(st.lists(st.sampled_from(["full", "window"]), min_size=1, max_size=4)))
  K = draw(st.integers(1, 8))
  scaling = draw(st.sampled_from(["none", "linear", "yarn"]))
  model = ModelConfig(
    K=K,
    N=K * draw(st.integers(1, 4)),
    H=2 * draw(st.integers(1, 64)),
    layers=len(attention) * draw(st.integers(1, 8)),
    attention=attention,
    rope=RopeConfig(
      theta=draw(st.floats(2, 1e8)),
      scaling=scaling,
      attention_factor=draw(st.none() | st.floats(0.1, 2)) if scaling == "yarn" else None,
    ),
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
    data=DataConfig(source=draw(st.text(min_size=1)), holdout=draw(st.floats(0.001, 0.999))),
    optimizer=OptimizerConfig(
      learning_rate=draw(st.floats(1e-12, 10)), name=draw(st.sampled_from(["adamw", "muon"]))
    ),
    mesh=MeshConfig(data=draw(st.sampled_from([-1, 1, 8])), tensor=draw(st.integers(1, 16))),
  )


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
  with pytest.raises(ValueError, match="model.rope.theta=0"):
    from_dict(TrainConfig, {"model": {"rope": {"theta": 0}}})
