"""Runs and token stores on an object store, which is one in this process."""

import itertools
import json
import shutil

import pytest

from benchmarks.reliability.processes import SMALL, write_corpus
from jaxlm.checkpoint.folder import checkpoint_path, finished_steps, newest_sound
from jaxlm.checkpoint.manifest import write_manifest
from jaxlm.cli import main
from jaxlm.data.arrays import address_spec, open_address
from jaxlm.run.remote import working_copy
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError
from tests.jaxlm.fake_gcs import FakeGCS

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
  """An object store; tensorstore reads its address from the environment when it is first used."""
  with pytest.MonkeyPatch.context() as patch, FakeGCS() as server:
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    yield server
    server.shutdown()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch) -> str:
  """The name of an empty bucket; the working folder and the cache are empty, too."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / "work").mkdir()
  monkeypatch.chdir(tmp_path / "work")
  server.refuses = server.read_only = False
  server.before_read = lambda bucket, name: None
  return f"bucket-{next(_numbers)}"


def save(folder: RunFolder, step: int) -> None:
  path = checkpoint_path(folder.checkpoints, step)
  (path / "params").mkdir(parents=True)
  (path / "params/array").write_text(f"weights of step {step}")
  write_manifest(path)


def begin(folder: RunFolder, *steps: int) -> None:
  folder.config.write_text("{}")
  folder.metrics.write_text("")
  for step in steps:
    save(folder, step)


def steps_at(server: FakeGCS, bucket: str) -> list[int]:
  return [
    int(name.split("/")[-2]) for name in server.names(bucket) if name.endswith("manifest.json")
  ]


def test_a_run_at_an_address_is_the_same_on_every_machine(bucket, server, tmp_path):
  address = f"gs://{bucket}/runs/lr=[3e-3]"
  with working_copy(address, write=True, new=True) as path:
    begin(RunFolder(path), 1, 2)
    (path / "lock").write_text("of this machine")
    (path / "tensorboard").mkdir()
    (path / "tensorboard/events").write_text("x")
    assert RunFolder(path).name == address
  names = {name.removeprefix("runs/lr=[3e-3]/") for name in server.names(bucket)}
  files = {
    f"checkpoints/0000000{step}/{name}"
    for step in (1, 2)
    for name in ("manifest.json", "params/array")
  }
  assert names == {"config.json", "metrics.jsonl", "tensorboard/events", *files}
  shutil.rmtree(tmp_path / "cache")  # another machine
  with working_copy(address) as path:
    folder = RunFolder(path)
    assert newest_sound(folder.checkpoints) == 2 and folder.config.read_text() == "{}"
    assert (checkpoint_path(folder.checkpoints, 1) / "params/array").read_text().endswith("step 1")
  assert list((tmp_path / "work").iterdir()) == []  # no folder named gs:


def test_what_a_writer_prunes_goes_from_the_address_too(bucket, server, tmp_path):
  address = f"gs://{bucket}/run"
  with working_copy(address, write=True, new=True) as path:
    begin(RunFolder(path), 1, 2)
  assert steps_at(server, bucket) == [1, 2]
  shutil.rmtree(tmp_path / "cache")
  with working_copy(address, write=True) as path:
    shutil.rmtree(checkpoint_path(RunFolder(path).checkpoints, 1))
    save(RunFolder(path), 3)
    (checkpoint_path(RunFolder(path).checkpoints, 4) / "params").mkdir(parents=True)  # unfinished
  assert steps_at(server, bucket) == [2, 3]
  assert not any("/00000001/" in name or "/00000004/" in name for name in server.names(bucket))


def test_a_checkpoint_that_is_pruned_while_it_is_downloaded_is_not_the_one_that_is_read(
  bucket, server, tmp_path
):
  address = f"gs://{bucket}/run"
  with working_copy(address, write=True, new=True) as path:
    begin(RunFolder(path), 1)
  shutil.rmtree(tmp_path / "cache")
  objects = server.objects[bucket]

  def write_the_next(bucket, name):
    if name.endswith("00000001/params/array"):
      server.before_read = lambda bucket, name: None
      for old in [name for name in objects if "/00000001/" in name]:
        objects[old.replace("/00000001/", "/00000002/")] = objects.pop(old)

  server.before_read = write_the_next
  with working_copy(address) as path:
    assert finished_steps(RunFolder(path).checkpoints) == [2]
    assert newest_sound(RunFolder(path).checkpoints) == 2


def test_what_could_not_be_uploaded_is_by_the_next_resume(bucket, server):
  address = f"gs://{bucket}/run"
  with pytest.raises(OSError, match="not all is uploaded"):
    with working_copy(address, write=True, new=True) as path:
      begin(RunFolder(path), 1)
      server.refuses = True
  server.refuses = False
  assert server.names(bucket) == []
  with working_copy(address, write=True) as path:
    assert finished_steps(RunFolder(path).checkpoints) == [1]
  assert steps_at(server, bucket) == [1]


def test_a_refused_start_leaves_nothing_here_or_there(bucket, server, tmp_path):
  with pytest.raises(UserError, match="a rule"):
    with working_copy(f"gs://{bucket}/run", write=True, new=True):
      raise UserError("a rule")
  assert server.names(bucket) == [] and not list((tmp_path / "cache").rglob("*.*"))


def test_addresses_are_refused_in_words(bucket, server, capsys):
  with working_copy(f"gs://{bucket}/run", write=True, new=True) as path:
    begin(RunFolder(path), 1)
  with pytest.raises(
    UserError, match=f"^run='gs://{bucket}/run': must be new or empty; `jaxlm resume gs:"
  ):
    with working_copy(f"gs:/{bucket}/run/", new=True):
      pass
  with pytest.raises(UserError, match="there is nothing at this address"):
    with working_copy(f"gs://{bucket}/other"):
      pass
  server.refuses = True
  for command in (
    "sample ADDRESS",
    "resume ADDRESS",
    "tokenize stdlib ADDRESS",
    "train micro --run ADDRESS",
  ):
    assert main(command.replace("ADDRESS", f"gs://{bucket}/run").split()) == 2
    assert "cannot be reached with the credentials here: " in capsys.readouterr().err
  server.refuses, server.read_only = False, True
  assert main(["train", "micro", "--run", f"gs://{bucket}/new"]) == 2
  assert "cannot be reached with the credentials here: " in capsys.readouterr().err
  for name in ("gs://", "az://box/run", "gs://B/x"):
    with pytest.raises(UserError, match="^store="):
      open_address(name, "store")
  assert address_spec("s3://b/k%5B?/") == {"driver": "s3", "bucket": "b", "path": "k%5B?/"}


def test_a_run_of_several_processes_is_not_kept_at_an_address(bucket, monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(UserError, match="needs a folder that all of them see"):
    with working_copy(f"gs://{bucket}/run", write=True, new=True):
      pass


def test_a_store_at_an_address_is_written_verified_and_refused_like_one_in_a_folder(
  bucket, server, tmp_path, capsys
):
  write_corpus(tmp_path / "work/text")
  address = f"gs://{bucket}/a/store"
  for _ in range(2):
    assert main(["tokenize", "text", address]) == 0
  assert json.loads(server.objects[bucket]["a/store/token_store.json"][0])["format"]
  assert main(["tokenize", "text", address, "--max_bytes", "100"]) == 2
  assert "the store was made with None" in capsys.readouterr().err
  assert main(["tokenize", "text", f"gs://{bucket}/a"]) == 2
  assert "holds other files" in capsys.readouterr().err
  (tmp_path / "work/bad.jsonl").write_text("not json")
  assert main(["tokenize", "bad.jsonl", f"gs://{bucket}/b"]) == 2
  assert not any(name.startswith("b/") for name in server.names(bucket))


@pytest.mark.slow
def test_a_run_is_trained_resumed_sampled_and_measured_at_an_address(
  bucket, server, tmp_path, capsys
):
  write_corpus(tmp_path / "work/text")
  address, store = f"gs://{bucket}/run", f"gs://{bucket}/store"
  assert main(["tokenize", "text", store]) == 0
  flags = [*SMALL, "--eval_every", "0", "--save_every", "2", "--data.source", store]
  assert main(["train", "micro", "--run", address, "--steps", "5", *flags]) == 0
  shutil.rmtree(tmp_path / "cache")
  assert main(["resume", address, "--steps", "7"]) == 0
  assert f"into {address}" in capsys.readouterr().out
  assert steps_at(server, bucket) == [6, 7]
  records = server.objects[bucket]["run/metrics.jsonl"][0].splitlines()
  assert [json.loads(record)["step"] for record in records] == list(range(1, 8))
  shutil.rmtree(tmp_path / "cache")
  for command in ("sample", "eval", "checkpoint verify"):
    assert main([*command.split(), address]) == 0
  assert main(["convert", address, "hf"]) == 0
  assert "gs:" not in {path.name for path in (tmp_path / "work").iterdir()}
