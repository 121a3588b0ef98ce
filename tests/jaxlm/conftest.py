import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.interop import huggingface
from jaxlm.models import Transformer
from jaxlm.objectives import next_token_loss
from sharding.rules import defer_reduction, reduce_gradients, shard

DATA = Path(__file__).parents[1] / "data" / "hf_tiny"
ALL = ("llama", "llama_rope_llama3", "llama_rope_yarn", "qwen2", "qwen3", "gemma2")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2")


@functools.cache
def checkpoint(name):
  """A tiny checkpoint: folder, config, params, and what transformers computed from it."""
  config, params = huggingface.load(DATA / name)
  reference = np.load(DATA / name / "io.npz")
  norms = json.loads((DATA / name / "grads.json").read_text())["grad_l2"]
  ids_BT, logits_BTV, loss = (reference[key] for key in ("input_ids", "logits", "loss"))
  values = {"folder": DATA / name, "config": config, "params": params, "norms": norms}
  return SimpleNamespace(**values, ids_BT=ids_BT, logits_BTV=logits_BTV, loss=loss)


@functools.partial(jax.jit, static_argnums=0)
def train_pass(config, params, ids_BT):
  """(logits, mean next-token loss, gradients) as training computes them."""
  ids_BT = shard(jnp.asarray(ids_BT), "batch", None)
  targets_BT = jnp.roll(ids_BT, -1, axis=1)
  weights_BT = jnp.ones(ids_BT.shape).at[:, -1].set(0)
  model = Transformer(config)

  def loss(params):
    states_BTD = model.apply(params, ids_BT, logits=False)
    summed = next_token_loss(
      states_BTD, model.head(params), targets_BT, shard(weights_BT, "batch", None)
    )["loss"]
    return summed.num / weights_BT[:, 1:].size

  value, grads = jax.value_and_grad(loss)(defer_reduction(params))
  return model.apply(params, ids_BT), value, reduce_gradients(grads, params)


@pytest.fixture(name="checkpoint", scope="session")
def checkpoint_fixture():
  return checkpoint


@pytest.fixture(name="train_pass", scope="session")
def train_pass_fixture():
  return train_pass


@pytest.fixture(params=ALL)
def any_checkpoint(request):
  return checkpoint(request.param)


@pytest.fixture(params=FAMILIES)
def family(request):
  return checkpoint(request.param)
