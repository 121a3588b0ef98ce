"""Metrics reach TensorBoard's and Weights & Biases' own files."""

import dataclasses

import pytest

from jaxlm import presets
from jaxlm.config import MeshConfig
from jaxlm.run import train


def short_run(tmp_path, tracker: str):
  micro = presets.micro()
  data = dataclasses.replace(micro.data, length=16)
  optimizer = dataclasses.replace(micro.optimizer, warmup=1)
  config = dataclasses.replace(
    micro, steps=3, data=data, optimizer=optimizer, eval_every=0, mesh=MeshConfig(data=1)
  )
  return train(dataclasses.replace(config, run=str(tmp_path / "run"), trackers=(tracker,)))


def test_tensorboard_event_file_holds_the_last_loss(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto.event_pb2 import Event

  result = short_run(tmp_path, "tensorboard")
  (path,) = (tmp_path / "run/tensorboard").glob("events.*")
  content, values = path.read_bytes(), {}
  while content:
    size = int.from_bytes(content[:8], "little")
    event = Event.FromString(content[12 : 12 + size])
    values |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    content = content[16 + size :]
  assert values["train/loss", 3] == pytest.approx(result.metrics["loss"])
  assert values["heldout/bits_per_byte", 3] == pytest.approx(result.evaluation["bits_per_byte"])


def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  short_run(tmp_path, "wandb")
  (record,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
  content, block = record.read_bytes(), 2**15
  # each block but the first begins with a header of 7 bytes, which may cut a name in two
  joined = content[:block] + b"".join(
    content[at + 7 : at + block] for at in range(block, len(content), block)
  )
  assert b"train/loss" in joined and b"heldout/bits_per_byte" in joined
