"""Samples text from a model itself, to train it in few bits without the data that it is from.

LLM-QAT (Liu et al. 2023, arXiv 2305.17888, section 3.1): the first token is drawn from the whole
vocabulary, the next few are the most likely ones, and the rest is sampled, up to the end of the
text. Greedy throughout, a model repeats itself; sampled from the start, it leaves its data.
"""

# B documents at a time, M tokens of a document

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.atomic import write_text
from jaxlm.config import ComputeConfig, ModelConfig, check
from jaxlm.config_json import to_dict
from jaxlm.decode import Sampler, generate
from jaxlm.paths import local_path
from jaxlm.run.saved_run import SavedRun


def sample_documents(
  config: ModelConfig,
  params: Any,
  *,
  key: jax.Array,
  count: int,
  length: int,
  start_ids: Sequence[int] = (),
  end_ids: Sequence[int] = (),
  first_ids: np.ndarray,
  greedy: int = 4,
  compute: ComputeConfig | None = None,
) -> np.ndarray:
  """Returns int32 [count, length] ids of documents that begin at random and go on by the model.

  First tokens are drawn from `first_ids`, and stand behind `start_ids`, which are not returned. The
  `greedy` tokens after the first are the most likely ones. Where a document ends earlier, by one of
  `end_ids`, the rest of its row is the first of these. Only `first_ids` and `end_ids` are drawn.
  """
  check(length > greedy + 1, "length", length, f"must be above 1 + greedy={greedy}")
  check(greedy >= 0, "greedy", greedy, "must be at least 0")
  drawable_V = np.isin(np.arange(config.V), [*first_ids, *end_ids])
  options: dict[str, Any] = {"eos": list(end_ids) or None, "drawable_V": drawable_V}
  options |= {"compute": compute}
  first_key, rest_key = jax.random.split(key)
  columns = [np.asarray(jax.random.choice(first_key, first_ids, (count, 1)), np.int32)]

  def extend(sampler: Sampler, tokens: int) -> None:
    written_BM = np.concatenate(columns, axis=1)
    prompts = [[*start_ids, *row] for row in written_BM.tolist()]
    next_BM = generate(
      config, params, prompts, sampler=sampler, max_new=tokens, key=rest_key, **options
    )
    ended_B = np.isin(written_BM, end_ids).any(axis=1, keepdims=True)
    end = end_ids[0] if end_ids else 0
    columns.append(np.where(ended_B, end, next_BM).astype(np.int32))

  if greedy:
    extend(Sampler(temperature=0.0), greedy)
  extend(Sampler(), length - 1 - greedy)
  return np.concatenate(columns, axis=1)


def write_own_text(
  saved: SavedRun,
  target: str | Path,
  *,
  documents: int,
  length: int,
  greedy: int = 4,
  batch: int = 32,
  seed: int = 0,
) -> str:
  """Writes documents that a model samples as JSON lines, a source of text; returns what it wrote.

  `length` counts tokens. Text of a document ends before its end token. Documents are written as
  they come, beside the file; what an interrupted call has written, the same call goes on with.
  Raises UserError where the file exists or is not called .jsonl, or other documents were begun.
  """
  path = local_path(target, "target")
  check(path.suffix == ".jsonl", "target", str(path), "must end in .jsonl")
  check(not path.exists(), "target", str(path), "must not exist")
  for name, value in (("documents", documents), ("batch", batch)):
    check(value >= 1, name, value, "must be at least 1")
  settings = {"length": length, "greedy": greedy, "batch": batch, "seed": seed}
  begun = path.with_name(f"{path.name}.unfinished")
  written = _begin(begun, settings | {"step": saved.step, "run": to_dict(saved.config)})
  with begun.open("a") as file:
    for text in _texts(saved, written, documents, **settings):
      file.write(json.dumps({"text": text}) + "\n")
      file.flush()
  lines = begun.read_text().splitlines(keepends=True)[1 : 1 + documents]
  write_text(path, "".join(lines))
  begun.unlink()
  size = sum(len(json.loads(line)["text"].encode()) for line in lines)
  return f"{path}: {documents:,} documents, {size:,} bytes, by the model of step {saved.step}"


def _begin(begun: Path, made_by: dict[str, Any]) -> int:
  """Makes the file, whose first line is `made_by`, unless it is there; returns its documents.

  Cuts off a last line that was not finished. Raises UserError where another first line is there.
  """
  first = json.dumps(made_by) + "\n"
  if not begun.exists():
    write_text(begun, first)
  whole = begun.read_text().rpartition("\n")[0] + "\n"
  rule = "was begun by another model or with other settings; go on with these, or remove it"
  check(whole.startswith(first), "target", str(begun), rule)
  write_text(begun, whole)
  return whole.count("\n") - 1


def _texts(
  saved: SavedRun, written: int, documents: int, length: int, greedy: int, batch: int, seed: int
) -> Iterator[str]:
  """Yields documents from number `written` on; one does not depend on how many there are."""
  ends = [end for end in saved.end_ids if end < saved.config.model.V]
  first_ids = np.setdiff1d(saved.tokenizer.list_ids(), [*saved.start_ids, *ends])
  for start in range(written // batch * batch, documents, batch):
    ids_BM = sample_documents(
      saved.config.model,
      saved.params,
      key=jax.random.fold_in(jax.random.key(seed), start),
      count=batch,
      length=length,
      start_ids=saved.start_ids,
      end_ids=ends,
      first_ids=first_ids,
      greedy=greedy,
      compute=saved.config.compute,
    )
    for ids_M in ids_BM[max(written - start, 0) : documents - start]:
      stops = np.isin(ids_M, ends).nonzero()[0]
      yield saved.tokenizer.decode(ids_M[: stops[0]] if len(stops) else ids_M)
