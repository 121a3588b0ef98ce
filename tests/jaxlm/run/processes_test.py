"""Two processes, and four, that share a run have the batches and the losses of one."""

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reliability.comparison import same_end
from benchmarks.reliability.processes import cluster, finish, start
from jaxlm.checkpoint.folder import finished_steps
from jaxlm.run.run_folder import RunFolder, read_records
from sharding.failure import SILENCE

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

FLAGS = (
  "--steps 6 --save_every 3 --eval_every 3 --eval_batches 2 --batch 8 --accumulate 2 --keep 5 "
  "--optimizer.warmup 1 --model.D 16 --model.pattern.0.feedforward.F 16 "
  "--model.pattern.0.mixer.H 8 --model.pattern.0.mixer.K 2 --data.length 32 --data.layout packed "
  "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
  folder = tmp_path_factory.mktemp("processes")
  (folder / "text").symlink_to(corpus)
  return folder


INTERLEAVED = """
import jax
in_order = jax.make_mesh
def interleaved(sizes, names, axis_types, devices):
  return in_order(sizes, names, axis_types, devices=devices[::2] + devices[1::2])
jax.make_mesh = interleaved
"""


def run(
  folder: Path, *arguments: str, processes: int, status: int = 0, setup: str = ""
) -> list[str]:
  """Runs the command in so many processes with 8 devices together, after the lines `setup`.

  Returns what each printed; the first has to end with this status.
  """
  devices = {"JAX_NUM_CPU_DEVICES": str(8 // processes)}
  files = [f"printed{index}.txt" for index in range(processes)]
  started = [
    start(folder, *arguments, setup=setup, printed=file, **devices, **shared)
    for file, shared in zip(files, cluster(processes))
  ]
  ended = [finish(folder, *one, seconds=280) for one in zip(started, files)]
  assert ended[0][0] == status, ended[0][1]
  assert all((one[0] == 0) == (status == 0) for one in ended), ended[-1][1]
  return [printed for _, printed in ended]


@pytest.fixture(scope="module")
def runs(folder) -> tuple[RunFolder, RunFolder, list[str]]:
  train = ["train", "micro", "--data.source", "text", *FLAGS]
  run(folder, *train, "--run", "one", processes=1)
  run(folder, *train, "--run", "four", processes=4)
  printed = run(folder, *train, "--run", "two", processes=2)
  return RunFolder(folder / "one"), RunFolder(folder / "two"), printed


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(runs):
  one, two, _ = runs
  for records in (RunFolder.metrics, RunFolder.evals):
    want, got = (list(read_records(records.fget(folder))) for folder in (one, two))
    assert [record["step"] for record in got] == [record["step"] for record in want] != []
    for name in ("loss", "tokens", "grad_norm", "heldout_loss"):
      if name in want[0]:
        np.testing.assert_allclose(
          *([record[name] for record in side] for side in (got, want)), rtol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_four_processes_too(runs, folder):
  one, _, _ = runs
  want, got = (list(read_records(run.metrics)) for run in (one, RunFolder(folder / "four")))
  for name in ("loss", "tokens", "grad_norm"):
    np.testing.assert_allclose(
      *([r[name] for r in side] for side in (got, want)), rtol=1e-6, err_msg=name
    )


@pytest.mark.slow
def test_two_processes_whose_devices_alternate_too(runs, folder):
  """Rows are not contiguous, as on a torus whose order of devices visits hosts again."""
  one, _, _ = runs
  arguments = ["train", "micro", "--data.source", "text", *FLAGS, "--run", "alternate"]
  run(folder, *arguments, processes=2, setup=INTERLEAVED)
  want, got = (list(read_records(run.metrics)) for run in (one, RunFolder(folder / "alternate")))
  for name in ("loss", "tokens", "grad_norm"):
    np.testing.assert_allclose(
      *([r[name] for r in side] for side in (got, want)), rtol=1e-6, err_msg=name
    )


@pytest.mark.slow
def test_one_process_speaks_and_both_write_the_checkpoints(runs):
  _, two, printed = runs
  assert "heldout_loss" in printed[0] and "heldout_loss" not in printed[1]
  assert finished_steps(two.checkpoints) == [3, 6]


DIES = """
import os
from benchmarks.reliability.kills import die_in
if os.environ["JAX_PROCESS_ID"] == "1":
  die_in("jaxlm.run.guard", "Guard.limit", 5, 0.0)  # before step 5; step 3 was saved
"""


@pytest.mark.slow
def test_kill_of_one_process_ends_the_other_and_the_run_goes_on_bit_for_bit(runs, folder):
  _, two, _ = runs
  train = ["train", "micro", "--data.source", "text", *FLAGS, "--run", "killed"]
  main, other = (
    start(
      folder,
      *train,
      setup=DIES,
      printed=f"killed{shared['JAX_PROCESS_ID']}.txt",
      JAX_NUM_CPU_DEVICES="4",
      **shared,
    )
    for shared in cluster(2)
  )
  assert finish(folder, other, "killed1.txt")[0] == -signal.SIGKILL
  died = time.monotonic()
  status, printed = finish(folder, main, "killed0.txt")
  assert status == 1 and time.monotonic() - died < SILENCE + 30, printed
  assert re.search("cannot reach another one|process 1 of 2 is gone", printed), printed
  run(folder, "resume", "killed", processes=2)
  assert same_end(RunFolder(folder / "killed"), two)


@pytest.mark.slow
def test_kill_of_the_first_process_ends_the_other_with_a_message(folder):
  train = ["train", "micro", "--data.source", "text", *FLAGS, "--run", "headless"]
  setup = DIES.replace('"1"', '"0"')
  main, other = (
    start(
      folder, *train, setup=setup, printed=f"headless{index}.txt", JAX_NUM_CPU_DEVICES="4", **shared
    )
    for index, shared in enumerate(cluster(2))
  )
  assert finish(folder, main, "headless0.txt")[0] == -signal.SIGKILL
  died = time.monotonic()
  status, printed = finish(folder, other, "headless1.txt")
  assert status == 1 and time.monotonic() - died < 30, printed
  assert printed.endswith(
    "jaxlm: process 0 of 2, which coordinates the others, is gone; this process ends with it\n"
  )


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stays_alone_says_for_whom_it_has_waited(index, folder):
  shared = cluster(2)[index] | {"JAXLM_JOIN_SECONDS": "3"}
  alone = start(folder, "train", "micro", "--run", "alone", printed="alone.txt", **shared)
  status, printed = finish(folder, alone, "alone.txt", seconds=60)
  others = "the other processes that JAX_COORDINATOR_ADDRESS has started"
  assert status == 1, printed
  assert f"waiting for {others}, for JAXLM_JOIN_SECONDS=3 s at most" in printed
  assert printed.endswith(f"jaxlm: {others} did not all join within JAXLM_JOIN_SECONDS=3 s\n")


DISK_FULL_IN_ONE = """
import os, resource, subprocess, sys
if os.environ["JAX_PROCESS_ID"] == "1":
  printer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # what is printed has no limit
  sys.stdout = sys.stderr = open(printer.stdin.fileno(), "w", buffering=1, closefd=False)
  os.dup2(printer.stdin.fileno(), 2)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_is_told_by_all_and_no_success(folder):
  """What one process cannot write, no other waits for."""
  train = ["train", "micro", "--data.source", "text", *FLAGS, "--run", "full"]
  main, other = run(folder, *train, processes=2, status=1, setup=DISK_FULL_IN_ONE)
  for step in (3, 6):
    assert f"step {step} could not be saved, there is no checkpoint yet" in main, main
    assert f"step {step} could not be saved" in other and "File too large" in other, other
  assert "process 1" in main and "step 6 of 6 is not saved" in main, main
  assert finished_steps(RunFolder(folder / "full").checkpoints) == []


@pytest.mark.slow
def test_runs_go_on_with_another_number_of_processes(runs, folder):
  """What four processes saved one resumes, and what one saved two do: both end alike."""
  run(folder, "resume", "four", "--steps", "8", processes=1)
  run(folder, "resume", "one", "--steps", "8", processes=2)
  want, got = (
    [record["loss"] for record in read_records(RunFolder(folder / name).metrics)]
    for name in ("one", "four")
  )
  assert len(want) == 8
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
def test_a_refusal_ends_all_processes(runs, folder):
  """Only the first process looks into the folder; the others must not wait for it forever."""
  arguments = ["train", "micro", "--data.source", "text", *FLAGS, "--run", "one"]
  printed = run(folder, *arguments, processes=2, status=2)
  assert "must be a new or empty folder" in printed[0] and "Traceback" not in printed[0]
  assert "the main process stopped the run" in printed[1]


FULL_DISK = """
import os
from jaxlm.run.run_folder import RunFolder
def forget_after(self, step):
  raise OSError(28, "No space left on device", str(self.metrics))
RunFolder.forget_after = forget_after
"""


@pytest.mark.slow
def test_a_failure_while_a_resume_is_prepared_ends_all_processes(runs, folder):
  """The first process alone clears the folder; the others used to wait for it for ever."""
  printed = run(folder, "resume", "two", "--steps", "9", processes=2, status=1, setup=FULL_DISK)
  assert "jaxlm: OSError: [Errno 28] No space left on device" in printed[0]
  assert "RuntimeError: the main process stopped the run" in printed[1]


OTHER_TEXT = """
import os, sys
if os.environ["JAX_PROCESS_ID"] == "1":
  sys.argv[sys.argv.index("text")] = "other"
"""


@pytest.mark.slow
def test_processes_that_read_different_text_are_refused(folder):
  (folder / "other").mkdir()
  for path in (folder / "text").iterdir():
    (folder / "other" / path.name).write_text(path.read_text().replace("return", "assert"))
  train = ["train", "micro", "--data.source", "text", *FLAGS, "--run", "different"]
  printed = run(folder, *train, processes=2, status=2, setup=OTHER_TEXT)
  for line in printed:
    assert "processes [1] have read other text than process 0" in line
  assert not (folder / "different").exists()
