"""A run that is asked to stop saves, says that it can be resumed, and how."""

import os
import signal
import socket
import time

import pytest

from jaxlm.cli import RESUMABLE
from jaxlm.train.checkpoint_folder import finished_steps, newest_sound
from jaxlm.train.run_folder import RunFolder
from tests.reliability.processes import SMALL, finish, last_step, run, start, wait_until, write_corpus

ENDLESS = ["train", "micro", *SMALL, "--steps", "100000", "--save_every", "0", "--eval_every", "0", "--run", "run"]
SLOW_WRITER = """
import time
import jaxlm.train.checkpoint as checkpoint
checkpoint.write_manifest = lambda folder: time.sleep(100)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stop") / "folder"
  write_corpus(folder)
  return folder


@pytest.fixture
def folder(world, tmp_path):
  """With the text and the compiled programs of the others."""
  for name in ("text", "cache"):
    (world / name).mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(world / name)
  return tmp_path


@pytest.mark.slow
def test_sigterm_saves_and_says_that_the_run_can_be_resumed_however_often_it_comes(folder):
  ours = RunFolder(folder / "run")
  process = start(folder, *ENDLESS)
  wait_until(lambda: last_step(ours) >= 3, process)
  for _ in range(3):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
  status, printed = finish(folder, process)
  step = last_step(ours)
  assert status == RESUMABLE, printed
  assert f"stopped and saved at step {step} of 100000 (SIGTERM)" in printed and "jaxlm resume run" in printed
  assert newest_sound(ours.checkpoints) == step and not (folder / "run/lock").exists()


@pytest.mark.slow
def test_a_limit_of_time_does_the_same_and_holds_for_each_process_that_resumes(folder):
  ours = RunFolder(folder / "run")
  status, printed = run(folder, *ENDLESS, "--stop_after", "5s")
  step = last_step(ours)
  assert status == RESUMABLE and step > 0, printed
  assert f"stopped and saved at step {step} of 100000 (stop_after)" in printed
  began = time.monotonic()
  status, printed = run(folder, "resume", "run")
  assert status == RESUMABLE and last_step(ours) > step and f"resuming at step {step}" in printed, printed
  assert time.monotonic() - began > 5
  assert newest_sound(ours.checkpoints) == last_step(ours)


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once_though_a_checkpoint_is_being_written(folder):
  ours = RunFolder(folder / "run")
  process = start(folder, *ENDLESS, setup=SLOW_WRITER)
  wait_until(lambda: last_step(ours) >= 3, process)
  process.send_signal(signal.SIGINT)
  wait_until(lambda: list(ours.checkpoints.glob("*")), process)
  time.sleep(0.5)
  began = time.monotonic()
  process.send_signal(signal.SIGINT)
  status, printed = finish(folder, process, seconds=50)
  assert time.monotonic() - began < 5
  assert status == 1 and "jaxlm: left at once, without saving" in printed and "Traceback" not in printed
  assert finished_steps(ours.checkpoints) == []
  status, printed = run(folder, "resume", "run", "--steps", "4")
  assert status == 0 and "run ended before its first checkpoint: it begins again at step 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "stop_after"])
def test_two_processes_stop_at_the_same_step_whichever_of_them_is_asked(folder, how):
  """The one asked is the second, so that the request has to travel to the one that writes."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  ours = RunFolder(folder / "run")
  (folder / "second").mkdir()
  arguments = [*ENDLESS, "--mesh.data", "2", "--batch", "8"]
  arguments[arguments.index("run")] = str(ours.path)
  processes = []
  for index, (where, limit) in enumerate([(folder, ""), (folder / "second", "8s" if how == "stop_after" else "")]):
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
    together |= {"JAX_COMPILATION_CACHE_DIR": ""}
    source = ["--data.source", str(folder / "text"), "--stop_after", limit]
    processes.append(start(where, *arguments, *source, **together))
  wait_until(lambda: last_step(ours) >= 3, processes[0])
  if how != "stop_after":
    os.kill(processes[1].pid, signal.Signals[how])
  (first, printed), (second, other) = (finish(where, p) for where, p in zip((folder, folder / "second"), processes))
  assert (first, second) == (RESUMABLE, RESUMABLE), printed + other
  step = last_step(ours)
  assert f"stopped and saved at step {step} of 100000" in printed
  assert newest_sound(ours.checkpoints) == step
