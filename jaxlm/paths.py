"""Says what the name of a file or folder means: `~`, an address, a name that libraries misread."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

from pallas_kernels.common.errors import UserError

LONGEST = 3840
"""bytes of the longest path of a run or store; the files below it need the rest of the system's"""
LONGEST_NAME = 255
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_MISREAD = re.compile(r"[*?\[\\]|/[A-Za-z][A-Za-z0-9+.-]*:/")
_LEFT_BY_SYSTEMS = re.compile(
  r"\..*|.*~|Thumbs\.db|ehthumbs\.db|desktop\.ini|lost\+found|__MACOSX|@eaDir|#recycle"
  r"|\$RECYCLE\.BIN|System Volume Information",
  re.IGNORECASE | re.DOTALL,
)

_link_names = itertools.count()


def is_address(name: str | Path) -> bool:
  """Returns whether a name is that of something on an object store, such as gs://bucket/run."""
  return _ADDRESS.match(str(name)) is not None


def full_address(name: str | Path) -> str:
  """Returns an address with the two slashes that a path takes from it, and one at the end."""
  return re.sub(":/+", "://", str(name), count=1).rstrip("/") + "/"


def user_cache() -> Path:
  """Returns the folder of what this project keeps for the user and can make again."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def local_path(name: str | Path, field: str) -> Path:
  """Returns the path of a file or folder of this machine, `~` and `~user` expanded.

  Raises UserError that begins with `field` and the name for one that is empty, an address, too long
  or holds a NUL, and for the home of an unknown user.
  """
  name = str(name)
  where = f"{field}={name!r}" if len(name) < 200 else f"{field}={name[:80] + '...' + name[-80:]!r}"
  if not name or "\0" in name:
    raise UserError(f"{where}: names a file or folder; a path is not empty and holds no NUL")
  if is_address(name):
    raise UserError(f"{where}: must be on this machine, not an address")
  try:
    path = Path(name).expanduser()
  except RuntimeError as error:  # no such user, or no home
    raise UserError(f"{where}: {error}") from error
  size = len(os.fsencode(path.absolute()))
  if size > LONGEST:
    raise UserError(f"{where}: the whole path has {size} bytes, at most {LONGEST}")
  if (longest := max((len(os.fsencode(part)) for part in path.parts), default=0)) > LONGEST_NAME:
    raise UserError(f"{where}: a name in it has {longest} bytes, at most {LONGEST_NAME}")
  return path


def left_by_system(name: str) -> bool:
  """Returns whether a file or folder of this name is one that systems and their tools leave behind.

  That is, a hidden one, a backup (`x~`), or one of those that file managers and disks make.
  """
  return _LEFT_BY_SYSTEMS.fullmatch(name) is not None


def literal_path(folder: Path) -> Path:
  """Returns a path of the folder that Orbax and tensorstore take for the folder.

  That is its absolute path, unless this has a character that they take for a pattern (`*?[`), a
  border (a backslash) or an address, or is not UTF-8: then it is a link to it, in a temporary
  folder that goes when the process ends. The folder need not exist yet. Raises UserError where the
  temporary folder has such a path itself.
  """
  folder = folder.absolute()
  if not _is_misread(folder):
    return folder
  return _link_folder() / _link(folder)


def _is_misread(path: Path) -> bool:
  try:
    return _MISREAD.search(path.as_posix().encode().decode()) is not None
  except UnicodeEncodeError:
    return True


@functools.cache
def _link_folder() -> Path:
  folder = Path(tempfile.mkdtemp(prefix="jaxlm-")).absolute()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  if _is_misread(folder):
    raise UserError(f"TMPDIR={str(folder.parent)!r}: must hold none of * ? [ and no backslash")
  return folder


@functools.cache
def _link(folder: Path) -> str:
  """Makes a link to a folder in the temporary folder, and returns its name."""
  name = str(next(_link_names))
  (_link_folder() / name).symlink_to(folder, target_is_directory=True)
  return name
