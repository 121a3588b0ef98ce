"""Keeps runs on object stores (gs://, s3://), by tensorstore, with the credentials of their tools.

A run at an address is worked on in a copy in the cache. While it is written, what is new is
uploaded every few seconds and at the end: a checkpoint's manifest after its files, so that what is
there is whole. One process on one machine writes a run; others may read it meanwhile. jax and
tensorstore are imported where they are used, so that a look at a local run starts without them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxlm.checkpoint.atomic import TEMPORARY
from jaxlm.checkpoint.folder import all_steps, checkpoint_path, finished_steps
from jaxlm.checkpoint.hold import held
from jaxlm.checkpoint.manifest import NAME as MANIFEST
from jaxlm.paths import full_address, is_address, local_path, user_cache
from jaxlm.run.run_folder import ADDRESS, LOCK, RunFolder
from pallas_kernels.common.errors import UserError

_log = logging.getLogger("jaxlm")
PENDING = ".not_uploaded"  # is in a copy that may hold what the address lacks
CHECKPOINTS = "checkpoints/"


@contextlib.contextmanager
def working_copy(
  name: str | Path, field: str = "run", *, write: bool = False, new: bool = False
) -> Iterator[Path]:
  """Gives the folder in which to work on a run: the one of that name, or the copy of an address.

  With `write`, what happens in the copy is uploaded. Raises UserError where an address cannot be
  reached, or with `new` where it holds something; OSError at the end where not all is uploaded,
  which the next `write` does.
  """
  if not is_address(name):
    yield local_path(name, field)
    return
  if write:
    import jax

    if jax.process_count() > 1:
      rule = "a run of several processes needs a folder that all of them see"
      raise UserError(f"{field}={str(name)!r}: {rule}")
  remote = _Remote(full_address(name), field, write)
  remote.refresh(new=new)
  if not write:
    yield remote.folder.path
    return
  (remote.folder.path / PENDING).touch()
  with remote.uploading():
    yield remote.folder.path


class _Remote:
  """Copies a run between an address and a folder of the cache."""

  EVERY = 10.0  # seconds between uploads

  def __init__(self, address: str, field: str, write: bool):
    from jaxlm.data.arrays import open_address

    self.address, self.field = address, field
    self.files = open_address(address, field, write=write)
    digest = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    self.folder = RunFolder(user_cache() / "runs" / digest)
    self._uploaded: dict[str, tuple[int, int]] = {}  # file -> size and time

  def refresh(self, *, new: bool) -> None:
    """Makes the copy what the address holds, unless the copy is ahead of it."""
    name, keys = self.address.rstrip("/"), self._keys()
    if new and keys:
      rule = f"must be new or empty; `jaxlm resume {name}` goes on with it"
      raise UserError(f"{self.field}={name!r}: {rule}")
    ours = finished_steps(self.folder.checkpoints)
    pending = (self.folder.path / PENDING).exists()
    if pending and max(ours, default=-1) >= max(_steps(keys), default=-1):
      return
    if not new and not keys:
      raise UserError(f"{self.field}={name!r}: there is nothing at this address")
    while not self._download(keys):  # the run that is being written has pruned one meanwhile
      keys = self._keys()

  def _download(self, keys: set[str]) -> bool:
    """Makes the copy what the address holds; returns whether all of it was still there."""
    path = self.folder.path
    for step in all_steps(self.folder.checkpoints):
      if self._is_other(step, keys):
        shutil.rmtree(checkpoint_path(self.folder.checkpoints, step))
    path.mkdir(parents=True, exist_ok=True)
    for file in [file for file in path.rglob("*") if file.is_file()]:
      if file.relative_to(path).as_posix() not in keys:
        file.unlink()
    (path / ADDRESS).write_text(self.address.rstrip("/"))
    wanted = {step for step in _steps(keys) if step not in all_steps(self.folder.checkpoints)}
    for key in sorted(keys, key=lambda key: key.endswith(MANIFEST)):
      if not key.startswith(CHECKPOINTS) or _step(key) in wanted:
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        content = self.files.read(key).result()
        if content.state != "value":
          return False
        (path / key).write_bytes(content.value)
    return True

  @contextlib.contextmanager
  def uploading(self) -> Iterator[None]:
    """Uploads what is new while it is entered, and at the end."""
    ended = threading.Event()
    thread = threading.Thread(target=self._keep_uploading, args=(ended,), daemon=True)
    thread.start()
    try:
      yield
    except BaseException:
      self._end(ended, thread)
      raise
    if not self._end(ended, thread):
      rule = f"not all is uploaded; {self.folder.path} has it, and the next resume uploads it"
      raise OSError(errno.EIO, rule, self.address)
    (self.folder.path / PENDING).unlink(missing_ok=True)

  def _end(self, ended: threading.Event, thread: threading.Thread) -> bool:
    """Uploads what is left and returns whether that worked; forgets a run that never began."""
    ended.set()
    thread.join()
    uploaded = self._try_upload()
    if not self.folder.config.is_file() and not (self.folder.path / LOCK).exists():
      shutil.rmtree(self.folder.path, ignore_errors=True)
    return uploaded

  def _keep_uploading(self, ended: threading.Event) -> None:
    while not ended.wait(self.EVERY):
      self._try_upload()

  def _try_upload(self) -> bool:
    try:
      self._upload()
    except Exception as error:  # of the network, in the words of tensorstore
      _log.error("%s: not uploaded: %s", self.address, str(error).partition("\n")[0])
      return False
    return True

  def _upload(self) -> None:
    """Makes the address what the copy holds; finished checkpoints are there or not, never half."""
    path = self.folder.path
    if not self.folder.config.is_file():
      return
    keys = self._keys()
    for step in _steps(keys):
      if self._is_other(step, keys):
        self._remove(step)
    for step in finished_steps(self.folder.checkpoints):
      if step not in _steps(keys) or self._is_other(step, keys):
        with held(checkpoint_path(self.folder.checkpoints, step)) as is_there:
          if is_there:
            files = sorted(checkpoint_path(self.folder.checkpoints, step).rglob("*"))
            self._write(sorted(files, key=lambda file: file.name == MANIFEST))
    others = [file for file in path.rglob("*") if not file.is_relative_to(self.folder.checkpoints)]
    hidden = {LOCK, ADDRESS, PENDING}
    self._write(
      [file for file in others if file.name not in hidden and not file.name.endswith(TEMPORARY)]
    )

  def _write(self, files: list[Path]) -> None:
    for file in files:
      if file.is_file():
        key, stat = file.relative_to(self.folder.path).as_posix(), file.stat()
        version = stat.st_size, stat.st_mtime_ns
        if self._uploaded.get(key) != version:
          self.files.write(key, file.read_bytes()).result()
          self._uploaded[key] = version

  def _remove(self, step: int) -> None:
    import tensorstore as ts

    prefix = f"{CHECKPOINTS}{step:08d}/"
    self.files.write(prefix + MANIFEST, None).result()  # first, so that nobody reads a half
    self.files.delete_range(ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()
    self._uploaded = {
      key: value for key, value in self._uploaded.items() if not key.startswith(prefix)
    }

  def _is_other(self, step: int, keys: set[str]) -> bool:
    """Returns whether the copy and the address do not hold the same checkpoint of a step."""
    key = f"{CHECKPOINTS}{step:08d}/{MANIFEST}"
    ours = self.folder.path / key
    if key not in keys or not ours.is_file():
      return True
    return self.files.read(key).result().value != ours.read_bytes()

  def _keys(self) -> set[str]:
    return {key.decode() for key in self.files.list().result()}


def _step(key: str) -> int:
  """Returns the step of a checkpoint's file, -1 of another one."""
  name = key.removeprefix(CHECKPOINTS).partition("/")[0]
  return int(name) if key.startswith(CHECKPOINTS) and name.isdecimal() else -1


def _steps(keys: set[str]) -> set[int]:
  """Returns the steps of finished checkpoints."""
  finished = {key for key in keys if key.endswith(f"/{MANIFEST}") and key.count("/") == 2}
  return {_step(key) for key in finished} - {-1}
