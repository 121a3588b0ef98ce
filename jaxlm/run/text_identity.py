"""Identifies the text of a run, so that a resumed run does not silently go on with other text."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.checkpoint.atomic import write_text
from jaxlm.data.loader import TextData
from jaxlm.run.metrics import print_status
from jaxlm.run.run_folder import RunFolder
from pallas_kernels.common.errors import UserError

SIDES = {"train": "training", "heldout": "held-out"}


def check_same_everywhere(text: TextData) -> None:
  """Raises UserError in every process where not all processes have read the same text."""
  if jax.process_count() == 1:
    return
  words = np.frombuffer(bytes.fromhex("".join(text.digests.values())), np.int32)
  words_of_processes = multihost_utils.process_allgather(words)
  differs = (words_of_processes != words_of_processes[0]).any(axis=1)
  if differs.any():
    processes = np.flatnonzero(differs).tolist()
    rule = f"processes {processes} have read other text than process 0"
    raise UserError(f"data.source={text.config.source!r}: {rule}")


def record_text(folder: RunFolder, text: TextData) -> None:
  """Writes the digests of a run's text into its folder."""
  write_text(folder.text, json.dumps(text.digests, indent=2) + "\n")


def check_text(folder: RunFolder, text: TextData, *, other_text: bool) -> None:
  """Raises UserError, or with `other_text` prints it, where `text` is not the text of the run."""
  if not folder.text.is_file() and not other_text:
    print_status(f"{folder.text} is missing: the text may not be the one of the run so far")
  changes = changed_text(folder, text.digests)
  if not changes:
    return
  message = f"data.source={text.config.source!r}: not the text of the run so far"
  message += f" ({'; '.join(changes)})"
  if not other_text:
    raise UserError(f"{message}; --other_text goes on with it all the same")
  print_status(message)


def changed_text(folder: RunFolder, digests: Mapping[str, str]) -> list[str]:
  """Returns a line for each side whose digest is not the recorded one; [] for a new run."""
  if not folder.text.is_file():
    return []
  before = json.loads(folder.text.read_text())
  return [
    f"{words} text: digest {before[side]} -> {digests[side]}"
    for side, words in SIDES.items()
    if before[side] != digests[side]
  ]
