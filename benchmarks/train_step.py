"""Seconds per training step: jaxlm against the same decoder in plain PyTorch, eager and compiled.

    python -m benchmarks.train_step --write benchmarks/results/train_step_cpu.md

All arms take float32, the same weights and batch, AdamW with clipping, and as many threads as there
are cores. Each lives in a process of its own and they take turns, so that a change of the machine's
speed meets all of them. Before timing, the gradients of the first step are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import publish, report, spread, table

SIZES = {"1M": "tiny", "10M": "small"}
HEADS = {"1M": {"N": 4, "K": 4, "H": 32}}
"""Attention of the 1M model, which has a million parameters with it."""
BATCHES = {"1M": (16, 256), "10M": (8, 256)}
ARMS = ("jaxlm", "torch eager", "torch.compile")
COLUMNS = (
  "size",
  "arm",
  "median ms (10 % - 90 %)",
  "best",
  "speed against eager",
  "against torch.compile",
)


def run_config(size: str):
  import dataclasses

  from jaxlm import presets
  from jaxlm.config import OptimizerConfig, revise

  config = getattr(presets, SIZES[size])()
  model = revise(config.model, **HEADS.get(size, {}))
  batch, length = BATCHES[size]
  optimizer = OptimizerConfig(name="adamw", schedule="constant", warmup=0)
  data = dataclasses.replace(config.data, length=length)
  return dataclasses.replace(config, model=model, batch=batch, data=data, optimizer=optimizer)


def tokens_of(config) -> np.ndarray:
  return np.random.default_rng(0).integers(
    0, config.model.V, (config.batch, config.data.length + 1), dtype=np.int32
  )


def jaxlm_worker(config, folder: Path):
  """Yields after each step; writes the weights and first gradients to `folder`."""
  from jaxlm.run.memory import keep_freed_memory

  keep_freed_memory()
  import jax

  from jaxlm.data.loader import Batch
  from jaxlm.run.text import TextTask
  from jaxlm.train import init_state, make_train_step
  from jaxlm.train.accumulate import accumulated_gradients

  ids = tokens_of(config)
  batch = Batch(ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:], np.float32))
  state = jax.jit(init_state, static_argnums=(0, 1))(config, TextTask(config))
  task = TextTask(config)
  objective = lambda params, batch, key: task.objective(params, {}, batch, key)  # noqa: E731
  grads, _ = jax.jit(lambda s: accumulated_gradients(objective, s.params, batch, s.key, 1))(state)
  for name, tree in (("weights", state.params), ("gradients", grads)):
    np.savez(folder / f"{name}.npz", **flat_arrays(tree))
  step = jax.jit(make_train_step(config, TextTask(config)), donate_argnums=0)
  while True:
    state, metrics = step(state, batch)
    yield float(metrics["loss"])


def flat_arrays(tree) -> dict:
  import jax

  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def torch_worker(config, folder: Path, compiled: bool):
  import torch

  from benchmarks.torch_decoder import Decoder, flatten_layers, load

  torch.set_num_threads(os.cpu_count())
  model = Decoder(config.model, config.data.length)
  named = load(model, dict(np.load(folder / "weights.npz")))
  ids = torch.from_numpy(tokens_of(config)).long()
  o = config.optimizer
  matrices = [p for name, (p, _) in named.items() if p.ndim == 2 and name != "embed/weight"]
  others = [p for name, (p, _) in named.items() if p.ndim == 1 or name == "embed/weight"]
  groups = [
    {"params": matrices, "weight_decay": o.weight_decay},
    {"params": others, "weight_decay": 0.0},
  ]
  optimizer = torch.optim.AdamW(
    groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True
  )
  forward = torch.compile(model) if compiled else model
  first = True
  while True:
    loss = forward(ids[:, :-1], ids[:, 1:])
    loss.backward()
    if first:
      grads = dict(np.load(folder / "gradients.npz"))
      stacks = {key: value for key, value in grads.items() if key.startswith("stacks/")}
      theirs = flatten_layers(grads, stacks, config.model.layers)
      for name, (parameter, transposed) in named.items():
        ours = (parameter.grad.T if transposed else parameter.grad).numpy()
        error = np.abs(ours - theirs[name]).max() / np.abs(theirs[name]).max()
        assert error < 1e-4, f"gradient of {name} differs by {error:.1e} of its largest entry"
      first = False
    torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    yield float(loss)


def serve(arm: str, size: str, folder: Path) -> None:
  """Runs N steps for each line "N" on stdin; answers with the seconds of each and the last loss."""
  config = run_config(size)
  steps = (
    jaxlm_worker(config, folder)
    if arm == "jaxlm"
    else torch_worker(config, folder, arm == "torch.compile")
  )
  for line in sys.stdin:
    seconds, loss = [], 0.0
    for _ in range(int(line)):
      start = time.perf_counter()
      loss = next(steps)
      seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


def measure(size: str, arms: tuple[str, ...], turns: int, steps: int) -> dict[str, list[float]]:
  """Returns the seconds of every step of each arm, in `turns` alternating turns of `steps`."""
  seconds: dict[str, list[float]] = {arm: [] for arm in arms}
  with tempfile.TemporaryDirectory() as folder:
    workers = {}
    for arm in arms:
      command = [sys.executable, "-m", "benchmarks.train_step", "--worker", arm]
      command += ["--size", size, "--folder", folder]
      workers[arm] = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
      )
      losses = ask(workers[arm], 3)["loss"]
      print(f"{size} {arm}: loss after 3 steps {losses:.5f}", file=sys.stderr)
    for _ in range(turns):
      for arm, worker in workers.items():
        seconds[arm] += ask(worker, steps)["seconds"]
    for worker in workers.values():
      worker.stdin.close()
      worker.wait()
  return seconds


def ask(worker: subprocess.Popen, steps: int) -> dict:
  worker.stdin.write(f"{steps}\n")
  worker.stdin.flush()
  return json.loads(worker.stdout.readline())


def rows_of(results: dict[str, dict[str, list[float]]]) -> list[list[str]]:
  """Returns the lines of the table; speeds are the other arm's median / this one's."""
  rows = []
  for size, seconds in results.items():
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    for arm, values in seconds.items():
      speeds = [
        f"{medians[other] / medians[arm]:.2f}" if other in medians else "-" for other in ARMS[1:]
      ]
      best = f"{1e3 * min(values):.0f}"
      rows.append([size, arm, spread(values, digits=0, scale=1e3), best, *speeds])
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--turns", type=int, default=12)
  parser.add_argument("--steps", type=int, default=3, help="steps per turn")
  parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
  parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
  parser.add_argument("--write", type=Path)
  parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
  parser.add_argument("--size", help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    serve(options.worker, options.size, options.folder)
    return
  results = {
    size: measure(size, tuple(options.arms), options.turns, options.steps) for size in options.sizes
  }
  body = (
    f"{options.turns} turns of {options.steps} steps per arm\n\n{table(COLUMNS, rows_of(results))}"
  )
  publish(report("Training step on CPU", body, "jax", "flax", "torch"), options.write)


if __name__ == "__main__":
  main()
