"""Commands that use weights: `jaxlm sample` and `jaxlm convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


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
) -> int:
  """Continue a prompt with a run's newest weights, or those of a Hugging Face checkpoint.

  Args:
    run: folder of the run or checkpoint, or hf:owner/name on the Hub (extra hf)
    prompt: text to continue
    max_new: most tokens to add
    temperature: divides the logits; 0 always takes the likeliest token
    top_k: keep only the k likeliest tokens; 0 keeps all
    top_p: keep the fewest tokens that reach this probability
    min_p: keep tokens at least this share as likely as the likeliest one
    seed: of the draws
    count: how many continuations
  """
  from jaxlm.decode import Sampler

  sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  from jaxlm.run import SavedRun

  saved = SavedRun.open(run)
  for index in range(count):
    print(prompt + saved.sample(prompt, sampler=sampler, max_new=max_new, seed=seed + index))
  return 0


def convert(
  source: tyro.conf.Positional[str],
  target: tyro.conf.Positional[Path],
  dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
  """Write a run's newest weights as a Hugging Face checkpoint, or such a checkpoint as a run.

  Args:
    source: folder of a run or checkpoint, or hf:owner/name on the Hub (extra hf)
    target: folder to write, new or empty
    dtype: type of the written weights; by default float32, in which runs keep theirs
  """
  from jaxlm.run.convert import convert

  print(convert(source, target, dtype))
  return 0
