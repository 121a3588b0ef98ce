"""Defines the commands that use weights: `jaxlm sample` and `jaxlm convert`."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated, Literal

import tyro

from jaxlm.config import TrainConfig, check_seed
from pallas_kernels.common.errors import UserError

CONVERT_USAGE = """\
usage: jaxlm convert RUN CHECKPOINT [--dtype bfloat16]
       jaxlm convert CHECKPOINT RUN [flags]

The first writes a run's newest weights as a Hugging Face checkpoint. The second makes a run at step
0 of a checkpoint (a folder, or hf:owner/name with extra hf), to be tuned by `jaxlm resume RUN`: in
bfloat16, with recomputed layers, a learning rate of 1e-5 and rows of 4096 tokens, unless the flags
of `jaxlm train` say otherwise, as --data.source and --optimizer.learning_rate do. Fields and
tensors of the checkpoint that are refused are left out by --ignore_config and --ignore_tensors.
"""


def sample(
  run: tyro.conf.Positional[str],
  prompt: str = "def ",
  max_new: int = 200,
  temperature: float = 0.8,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.05,
  seed: int = 0,
  count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1,
  dtype: Literal["float32", "bfloat16", "float16"] | None = None,
  ignore_config: tuple[str, ...] = (),
  ignore_tensors: tuple[str, ...] = (),
) -> int:
  """Continue a prompt with a run's newest weights, or those of a Hugging Face checkpoint.

  Args:
    run: folder of the run or checkpoint, or hf:owner/name on the Hub (extra hf)
    prompt: text to continue; the name of a special token in it, as <|im_start|>, is text too
    max_new: most tokens to add
    temperature: divides the logits; 0 always takes the likeliest token
    top_k: keep only the k likeliest tokens; 0 keeps all
    top_p: keep the fewest tokens that reach this probability
    min_p: keep tokens at least this share as likely as the likeliest one
    seed: of the draws
    count: how many continuations
    dtype: of the weights of a checkpoint; by default that of its files
    ignore_config: fields of a checkpoint's config.json to read as if they were not there
    ignore_tensors: tensors of a checkpoint that are no weights; names, or patterns with * and ?
  """
  prompt = _as_utf8(prompt)
  check_seed(seed)
  check_seed(seed + max(count, 1) - 1)
  from jaxlm.decode import Sampler

  sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  from jaxlm.interop.huggingface import Ignored
  from jaxlm.run import SavedRun

  saved = SavedRun.open(run, dtype=dtype, ignored=Ignored(ignore_config, ignore_tensors))
  escaped = False
  for index in range(count):
    text = prompt + saved.sample(prompt, sampler=sampler, max_new=max_new, seed=seed + index)
    print(text, flush=True)
    escaped = escaped or not _is_printable(text)
  if escaped:
    message = f"standard output takes {sys.stdout.encoding} alone: other letters are escapes"
    print(f"jaxlm: {message}; PYTHONIOENCODING=utf-8 prints them", file=sys.stderr)
  return 0


def _as_utf8(prompt: str) -> str:
  """Returns an argument as the UTF-8 that its bytes spell, whatever the locale says that they are.

  Raises UserError where they spell none.
  """
  try:
    return os.fsencode(prompt).decode()
  except UnicodeError as error:
    raise UserError(f"prompt={prompt!r}: must be UTF-8: {error}") from error


def _is_printable(text: str) -> bool:
  """Returns whether the encoding of stdout has all letters of a text."""
  try:
    text.encode(sys.stdout.encoding or "utf-8")
  except UnicodeEncodeError:
    return False
  return True


def convert(arguments: list[str]) -> int:
  """Runs `jaxlm convert FROM TO [flags]`."""
  if len(arguments) < 2 or arguments[0] in ("-h", "--help"):
    print(CONVERT_USAGE, end="")
    return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
  (source, target), flags = arguments[:2], arguments[2:]
  prog = f"jaxlm convert {source} {target}"
  from jaxlm.interop.huggingface import Ignored, is_checkpoint
  from jaxlm.run.convert import convert, tuning_config

  if is_checkpoint(source):
    # the checkpoint's model is the default of the flags, and these decide whether it can be read
    early, _ = tyro.cli(_IgnoredFlags, args=flags, return_unknown_args=True, add_help=False)
    ignored = Ignored(early.ignore_config, early.ignore_tensors)
    default = tuning_config(source, target, ignored)
    config = tyro.cli(TrainConfig, default=default, args=flags, prog=prog)
    print(convert(source, target, config=config))
  else:
    dtype = tyro.cli(_parse_dtype, args=flags, prog=prog)
    print(convert(source, target, dtype=dtype))
  return 0


@dataclasses.dataclass(frozen=True)
class _IgnoredFlags:
  ignore_config: tuple[str, ...] = ()
  ignore_tensors: tuple[str, ...] = ()


def _parse_dtype(dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> str:
  """Write a run's newest weights as a Hugging Face checkpoint.

  Args:
    dtype: type of the written weights
  """
  return dtype
