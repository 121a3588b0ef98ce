"""Metrics reach TensorBoard's and Weights & Biases' own files, across a resume too."""

import dataclasses
import json
import sys
import threading
from pathlib import Path

import pytest

from jaxlm import presets
from jaxlm.config import MeshConfig
from jaxlm.run import train
from jaxlm.run.run_folder import RunFolder
from jaxlm.run.trackers import (
  BackgroundTracker,
  TensorBoard,
  WeightsAndBiases,
  open_trackers,
)
from pallas_kernels.common.errors import MissingExtraError, UserError

pytestmark = pytest.mark.usefixtures("compile_in_less_time")


def short_run(tmp_path, tracker: str):
  micro = presets.micro()
  data = dataclasses.replace(micro.data, length=16)
  optimizer = dataclasses.replace(micro.optimizer, warmup=1)
  config = dataclasses.replace(
    micro, steps=3, data=data, optimizer=optimizer, eval_every=0, mesh=MeshConfig(data=1)
  )
  return train(dataclasses.replace(config, run=str(tmp_path / "run"), trackers=(tracker,)))


SESSION_START = 1


def read_events(folder: Path):
  """Yields the events of all files of a folder, in the order in which TensorBoard reads them."""
  from tensorboardX.proto.event_pb2 import Event

  for path in sorted(folder.glob("events.*")):
    content = path.read_bytes()
    while content:  # length, its checksum, an event, its checksum
      size = int.from_bytes(content[:8], "little")
      yield Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]


@pytest.mark.slow
def test_tensorboard_event_file_holds_the_last_loss(tmp_path):
  pytest.importorskip("tensorboardX")
  result = short_run(tmp_path, "tensorboard")
  values = {
    (value.tag, event.step): value.simple_value
    for event in read_events(tmp_path / "run/tensorboard")
    for value in event.summary.value
  }
  assert values["train/loss", 3] == pytest.approx(result.metrics["loss"])
  assert values["heldout/bits_per_byte", 3] == pytest.approx(result.evaluation["bits_per_byte"])


@pytest.mark.slow
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


class Failing:
  """A tracker that raises, or waits for ever, at one of its calls."""

  def __init__(self, at: int, action):
    self.calls, self.at, self.action = 0, at, action

  def log(self, values, step):
    self.calls += 1
    if self.calls == self.at:
      self.action()

  def close(self):
    self.log({}, 0)


def refuse():
  raise ConnectionResetError("Connection lost")


@pytest.mark.parametrize("at", [1, 3, 6], ids=["first step", "later", "at the end"])
@pytest.mark.parametrize("action", [refuse, sys.exit], ids=["raises", "exits"])
def test_a_tracker_that_fails_is_reported_once_and_no_step_waits(at, action, caplog):
  failing = Failing(at, action)
  tracker = BackgroundTracker("wandb", failing)
  for step in range(1, 6):
    tracker.log({"loss": 1.0}, step)
  tracker.close()
  assert tracker.lost and failing.calls == at
  assert caplog.text.count("trackers=wandb: lost after step 5") == 1
  assert "training goes on" in caplog.text


def test_a_tracker_that_hangs_holds_nothing_up(monkeypatch, caplog):
  monkeypatch.setattr(BackgroundTracker, "LARGEST_BACKLOG", 3)
  monkeypatch.setattr(BackgroundTracker, "PATIENCE", 0.05)
  hold = threading.Event()
  for steps, words in ((8, "is 3 steps behind"), (2, "does not finish within 0 s")):
    tracker = BackgroundTracker("wandb", Failing(1, hold.wait))
    for step in range(steps):
      tracker.log({}, step)
    tracker.close()
    assert tracker.lost and words in caplog.text
  hold.set()


def test_a_new_run_names_what_its_tracker_lacks_and_one_that_goes_on_goes_on(
  config, monkeypatch, caplog
):
  wandb = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  config = dataclasses.replace(config, trackers=("wandb",))
  failures = {
    wandb.errors.UsageError("no API key configured"): True,
    wandb.errors.AuthenticationError("wrong key"): True,
    wandb.errors.CommError("no network"): False,
    OSError(28, "No space left on device"): False,
    RuntimeError("anything"): False,
  }
  for failure, is_mistake in failures.items():

    def fail(failure=failure, **options):
      raise failure

    monkeypatch.setattr(wandb, "init", fail)
    if is_mistake:
      with pytest.raises(UserError, match=f"trackers=wandb: {failure}"):
        open_trackers(config, 0)
    else:
      assert open_trackers(config, 0) == []
    caplog.clear()
    assert open_trackers(config, 4) == []
    assert f"trackers=wandb: lost after step 4 ({type(failure).__name__}" in caplog.text or (
      is_mistake and "trackers=wandb: lost after step 4 (UserError" in caplog.text
    )


class FakeWandb:
  """A server with what wandb documents: histories by id, rewinding, steps that only ascend."""

  class errors:
    class Error(Exception):
      pass

    class CommError(Error):
      pass

    class AuthenticationError(CommError):
      pass

    class UsageError(Error):
      pass

  def __init__(self):
    self.histories: dict[str, dict[int, dict]] = {}
    self.rewound: list[str] = []

  def init(self, *, id=None, resume=None, resume_from=None, **options):
    if resume_from is not None:
      self.rewound.append(resume_from)
      id, _, last = resume_from.partition("?_step=")
      history = self.histories[id]
      self.histories[id] = {step: history[step] for step in history if step <= int(last)}
    history = self.histories.setdefault(id, {})

    class Run:
      step = max(history, default=-1) + 1

      def log(self, values, step):
        if step >= self.step:  # the real one drops earlier steps with a warning
          history.setdefault(step, {}).update(values)
          self.step = step

      def finish(self):
        pass

    return Run()


@pytest.fixture
def config(tmp_path):
  (tmp_path / "run").mkdir()
  return dataclasses.replace(presets.micro(), run=str(tmp_path / "run"))


def interrupted(make_tracker) -> dict[int, float]:
  """Six steps, a resume after step 4, four more; returns the values that should be left."""
  for start, steps, value in ((0, range(1, 7), 1.0), (4, range(5, 9), 2.0)):
    tracker = make_tracker(start)
    for step in steps:
      tracker.log({"train/loss": value}, step)
    tracker.close()
  return {step: 1.0 if step <= 4 else 2.0 for step in range(1, 9)}


def test_a_resumed_run_replaces_later_steps_at_wandb(config, monkeypatch):
  wandb = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  expected = interrupted(lambda start: WeightsAndBiases(config, start))
  ((run_id, history),) = wandb.histories.items()
  assert {step: values["train/loss"] for step, values in history.items()} == expected
  assert json.loads(RunFolder(Path(config.run)).trackers.read_text()) == {"wandb": run_id}


def test_a_run_that_stopped_where_it_saved_is_not_rewound(config, monkeypatch):
  wandb = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for start in (0, 1, 2):
    WeightsAndBiases(config, start).log({"train/loss": 1.0}, start + 1)
  assert wandb.rewound == []


def test_a_resumed_run_replaces_later_steps_in_tensorboard(config):
  pytest.importorskip("tensorboardX")
  expected = interrupted(lambda start: TensorBoard(config, start))
  shown: dict[int, float] = {}
  for event in read_events(Path(config.run) / "tensorboard"):
    if event.session_log.status == SESSION_START:  # TensorBoard drops what comes at or after it
      shown = {step: value for step, value in shown.items() if step < event.step}
    for value in event.summary.value:
      shown[event.step] = value.simple_value
  assert shown == expected


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
  name, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX", "wandb": "wandb"}[name], None)
  with pytest.raises(MissingExtraError, match=rf"trackers={name}: .*'jaxlm\[{name}\]'"):
    short_run(tmp_path, name)
  assert not (tmp_path / "run").exists()
