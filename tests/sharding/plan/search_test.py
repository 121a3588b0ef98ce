"""Plans: shapes of published models, memory, times and the search over legal meshes."""

import dataclasses
import math

import pytest

from pallas_kernels.common.errors import UserError
from pallas_kernels.common.topology import parse_topology
from sharding.plan import LayerShapes, ModelShapes, Step, best_plans, deepseek_v3_shapes, make_plan
from sharding.plan.report import format_plan
from sharding.plan.search import AXES

D, F, N, K, H, V, L = 1024, 4096, 8, 4, 128, 32768, 8
LAYER = LayerShapes(
  attention_weights=2 * D * (N + K) * H,
  N=N,
  K=K,
  H=H,
  U=H,
  mlp_weights=3 * D * F,
  F=F,
  vectors=2 * D,
)
MODEL = ModelShapes(name="test", D=D, V=V, layers=((LAYER, L),))
STEP = Step(batch=64, length=2048)
V5P = parse_topology("v5p:4x4x4")


def on(**sizes):
  return dict.fromkeys(AXES, 1) | sizes


def traffic(plan):
  return {(t.kind, t.axes, t.purpose): t.bytes * t.times for t in plan.traffic}


def test_deepseek_v3_has_its_published_parameters():
  model = deepseek_v3_shapes()
  assert model.parameters / 1e9 == pytest.approx(671, abs=0.5)
  assert model.active_parameters / 1e9 == pytest.approx(37, abs=0.5)
  assert model.count == 61


def test_memory_and_flops_of_fsdp():
  plan = make_plan(MODEL, STEP, V5P, on(fsdp=64))
  vectors = D + L * 2 * D  # every device holds them
  matrices = MODEL.parameters - vectors
  assert plan.memory["weights and moments"] * 64 == 12 * (matrices + 64 * vectors)
  assert plan.memory["activations kept"] == L * 2048 * D * 2
  weights = L * LAYER.weights + V * D
  scores = L * 4 * N * H * (2048 + 1) / 2
  assert plan.model_flops == pytest.approx((6 * weights + 3 * scores) * 2048)
  # the blocks once more, and the logits, as the loss keeps none
  again = (2 * weights + scores) / (6 * weights + 3 * scores)
  assert plan.times["recompute"] == pytest.approx(again * plan.times["compute"])
  peak = V5P.chip.bf16_flops
  assert plan.times["compute"] == pytest.approx(plan.model_flops / peak)
  assert plan.overlapped >= max(plan.binding_times.values()) >= plan.times["compute"]
  assert plan.separate >= plan.overlapped


def test_what_each_kind_of_parallelism_sends():
  matrices = LAYER.weights
  sent = traffic(make_plan(MODEL, STEP, V5P, on(fsdp=64)))
  assert sent["all-gather", ("fsdp",), "weights"] == 2 * L * matrices * 2
  assert sent["reduce-scatter", ("fsdp",), "weight gradients"] == L * matrices * 4
  sent = traffic(make_plan(MODEL, STEP, V5P, on(data=64)))
  assert sent["all-reduce", ("data",), "gradients"] == 4 * (L * matrices + 2 * V * D)
  assert not any(kind == "all-gather" for kind, *_ in sent)
  hidden = 64 / 16 * 2048 * D * 2
  sent = traffic(make_plan(MODEL, STEP, V5P, on(fsdp=16, tensor=4)))
  assert sent["all-gather", ("tensor",), "activations"] == 6 * L * hidden
  assert sent["reduce-scatter", ("tensor",), "activations"] == 5 * L * hidden
  kept = dataclasses.replace(STEP, remat="none")
  sent = traffic(make_plan(MODEL, kept, V5P, on(fsdp=16, tensor=4)))
  assert sent["all-gather", ("tensor",), "activations"] == 4 * L * hidden  # 2 each way


def test_what_a_split_sequence_sends():
  from sharding import roofline

  kept = dataclasses.replace(STEP, remat="none")
  wide = dataclasses.replace(kept, compute_bytes=4)
  sent = traffic(make_plan(MODEL, wide, V5P, on(fsdp=8, context_ring=8)))
  ring = sum(size for (_, axes, _), size in sent.items() if axes == ("context_ring",))
  assert ring == pytest.approx(L * sum(roofline.ring_bytes(64 / 8, 2048, K, H, 8, 4)))
  sent = traffic(make_plan(MODEL, kept, V5P, on(fsdp=8, context_ulysses=8)))
  own = roofline.ulysses_bytes(64 / 8, 2048, N, K, H, 8) * 8 / 7  # of arrays, own parts included
  assert sent["all-to-all", ("context_ulysses",), "heads"] == pytest.approx(2 * L * own)


def test_pipelines_have_bubbles_and_hops():
  step = dataclasses.replace(STEP, accumulate=8)
  plan = make_plan(MODEL, step, V5P, on(fsdp=8, stage=8))
  assert plan.times["bubble"] > 0
  whole = plan.times["compute"] + plan.times["recompute"]
  zb = dataclasses.replace(step, schedule="zb_h1")
  assert (
    make_plan(MODEL, zb, V5P, on(fsdp=8, stage=8)).times["bubble"] < plan.times["bubble"] < whole
  )
  hops = next(t for t in plan.traffic if t.axes == ("stage",))
  assert (hops.kind, hops.times) == ("collective-permute", 2 * (3 * 8 + 2 * 7))
  # weights are gathered once a step, the embedding and the head on every stage
  once = LAYER.weights + 2 * V * D
  sent = traffic(plan)
  assert sent["all-gather", ("fsdp",), "weights"] == 2 * once
  assert sent["all-reduce", ("stage",), "gradients of embedding and head"] == 4 * 2 * V * D / 8


def test_mixtures_exchange_tokens():
  model = deepseek_v3_shapes()
  step = Step(batch=2048, length=4096, remat="none")
  plan = make_plan(model, step, parse_topology("v5p:8x8x16"), on(fsdp=32, expert=32))
  exchanged = next(t for t in plan.traffic if t.purpose == "tokens to experts and back")
  assert exchanged.times == 58 * 4 and exchanged.axes == ("expert",)
  assert exchanged.bytes == 2 * 4096 * 8 * 7168 * 2


@pytest.mark.parametrize(
  "sizes, rule",
  [
    ({"tensor": 8, "fsdp": 8}, "K=4: must be a multiple of tensor=8"),
    ({"stage": 16, "fsdp": 4}, "stage=16: the model has 8 layers"),
    ({"stage": 8, "fsdp": 8}, "accumulate=1: 1f1b on 8 stages needs 8"),
    ({"expert": 8, "fsdp": 8}, "expert=8: the model has no experts"),
    ({"context_ulysses": 16, "fsdp": 4}, "N / tensor=8: must be a multiple of context_ulysses=16"),
    ({"data": 32}, "has 64 devices, mesh data 32 needs 32"),
  ],
)
def test_illegal_meshes_are_refused_in_one_line(sizes, rule):
  with pytest.raises(UserError, match=rule) as raised:
    make_plan(MODEL, STEP, V5P, on(**sizes))
  assert "\n" not in str(raised.value)


def test_the_search_tries_every_legal_mesh_and_sorts_by_time():
  plans = best_plans(MODEL, STEP, V5P, axes=("data", "fsdp", "tensor"))
  tried = [tuple(plan.sizes[a] for a in ("data", "fsdp", "tensor")) for plan in plans]
  powers = [2**p for p in range(7)]
  legal = [(d, f, t) for d in powers for f in powers for t in (1, 2, 4) if d * f * t == 64]
  assert sorted(tried) == sorted(legal)
  fitting = [plan for plan in plans if plan.fits]
  assert plans[: len(fitting)] == fitting
  times = [plan.overlapped for plan in fitting]
  assert times == sorted(times)
  assert all(math.prod(plan.sizes.values()) == 64 for plan in plans)


def test_the_search_takes_the_fewest_micro_batches_that_fit():
  v5e = parse_topology("v5e:2x2")
  step = Step(batch=256, length=2048, remat="none")
  best = best_plans(MODEL, step, v5e, axes=("fsdp",), accumulate=[1, 2, 4, 8, 16])
  numbers = [plan.step.accumulate for plan in best]
  assert best[0].fits and not any(plan.fits for plan in best[1:])
  assert sorted(numbers) == [1, 2, 4, 8, 16][: len(numbers)] and numbers[0] == max(numbers) > 1


def test_meshes_that_pad_weights_come_last_and_say_so():
  narrow = dataclasses.replace(MODEL, D=384)
  plans = best_plans(narrow, STEP, V5P, axes=("data", "fsdp", "tensor"))
  padded = [plan.pads_weights for plan in plans]
  assert padded == sorted(padded) and padded[0] is False and padded[-1] is True
  assert [384 / plan.sizes["fsdp"] % 8 != 0 for plan in plans] == padded
  assert "rows of a weight are no multiple of 8" in format_plan(plans[-1])
  assert "multiple of 8" not in format_plan(plans[0])
  gpus = best_plans(narrow, STEP, parse_topology("h100-sxm:64"), axes=("fsdp",))
  assert not gpus[0].pads_weights


def test_no_legal_mesh_is_one_line():
  with pytest.raises(UserError, match="no mesh of its 64 devices over tensor is legal; most often"):
    best_plans(MODEL, STEP, V5P, axes=("tensor",))


def test_the_table_has_a_stacked_bar_whose_letters_are_shares():
  plan = make_plan(MODEL, STEP, V5P, on(fsdp=16, tensor=4))
  text = format_plan(plan, [plan])
  bar = next(line.strip() for line in text.splitlines() if line.strip().startswith("CCCC"))
  assert len(bar) == 72 and "".join(sorted(bar, key="CRHABDEFG".index)) == bar
  share = plan.times["compute"] / sum(plan.times.values())
  assert bar.count("C") == pytest.approx(72 * share, abs=1)
  assert f"{plan.binds} binds" in text and "best legal meshes" in text
