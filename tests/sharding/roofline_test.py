"""The formulas of the roofline on the worked problems of How to Scale Your Model.

The book prints rounded answers, from rounded figures of its own chips; 3 % covers both.
"""

import math

import pytest

from pallas_kernels.common.errors import UserError
from sharding import roofline
from sharding.hardware import CHIPS
from sharding.pipeline import Times, simulate
from sharding.pipeline.schedules import (
  dualpipe,
  dualpipev,
  gpipe,
  interleaved,
  one_f_one_b,
  zb_h1,
  zb_h2,
  zb_v,
)
from sharding.pipeline.table import make_table, unfuse

V5E, V5P, H100 = CHIPS["v5e"], CHIPS["v5p"], CHIPS["h100-sxm"]


def near(answer):
  return pytest.approx(answer, rel=0.03)


def both_ways(chip):
  return 2 * chip.link_bytes_per_s


def test_critical_batches():
  assert roofline.critical_batch(V5E.int8_flops, V5E.hbm_bytes_per_s, 1) == near(243)
  assert roofline.critical_batch(H100.bf16_flops, H100.hbm_bytes_per_s) == near(298)


def test_loading_200b_bfloat16_weights_on_32_v4_takes_10_ms():
  """Its time is printed to two digits."""
  side = math.sqrt(200e9 / 32)
  v4 = CHIPS["v4"]
  bounds = roofline.matmul_time(1, side, side, v4.bf16_flops, v4.hbm_bytes_per_s)
  assert round(bounds.overlapped * 1e3) == 10
  arithmetic = 2 * 200e9 / 32 / v4.bf16_flops
  assert bounds.separate == pytest.approx(bounds.overlapped + arithmetic)


def test_sending_an_array_across_a_v5e_4x4():
  first, last = roofline.corner_to_corner(2 * 8 * 128 * 8192, (4, 4), V5E.link_bytes_per_s)
  assert first == pytest.approx(6e-6)
  assert last == near(188e-6)


def test_all_gather_on_a_v5e_8x4_with_and_without_a_ring():
  V = 2 * 2048 * 8192
  assert roofline.all_gather_time(V, [4], both_ways(V5E)) == near(377e-6)
  assert roofline.all_gather_time_on_line(V, 4, V5E.link_bytes_per_s) == near(560e-6)
  tiny = roofline.all_gather_time(1, [16, 16], both_ways(V5E))
  assert tiny == pytest.approx(16e-6)  # half way round each ring, one hop a microsecond
  assert roofline.all_gather_time_on_line(1, 4, V5E.link_bytes_per_s) == pytest.approx(3e-6)


def test_data_parallelism_on_v5p():
  C, W = V5P.bf16_flops, both_ways(V5P)
  assert roofline.data_parallel_tokens(C, W) == near(2550)
  assert roofline.data_parallel_tokens(C, W, axes=3) == near(850)
  mixture = roofline.data_parallel_tokens(C, W, axes=3, experts=256, active=8)
  assert mixture == 32 * roofline.data_parallel_tokens(C, W, axes=3)


def test_the_best_fsdp_size_sends_least_and_is_the_books():
  assert roofline.best_fsdp_size(48000, 32768, 64, 2, 1) == near(13.9)
  B, D, F, devices, W = 48000, 8192, 32768, 64, both_ways(V5P)

  def seconds(X):  # of a layer's two products: weights over 2 axes, activations over 1
    weights = 2 * 2 * D * F / (devices / X)
    activations = 2 * 2 * B * D / X
    return max(weights / (2 * W), activations / W)

  best = roofline.best_fsdp_size(B, F, devices, 2, 1)
  assert all(seconds(best) <= seconds(best * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_least_tokens_per_device_for_fsdp_with_tensor():
  alpha, F = V5P.bf16_flops / both_ways(V5P), 28672
  overlapped = roofline.least_tokens_per_device(F, V5P.bf16_flops, both_ways(V5P), 2, 1)
  assert overlapped == pytest.approx(alpha**2 / (2 * F))
  added = roofline.least_tokens_per_device(F, V5P.bf16_flops, both_ways(V5P), 2, 1, combine="sum")
  assert added == 4 * overlapped
  with pytest.raises(UserError, match="combine='both'"):
    roofline.least_tokens_per_device(F, 1, 1, combine="both")


def test_parameters_and_training_time_of_llama():
  thirteen = roofline.decoder_parameters(5120, 13824, 40, 40, 128, 40, 32000)
  assert thirteen == near(13.1e9)
  seventy = roofline.decoder_parameters(8192, 28672, 64, 8, 128, 80, 128256)
  assert seventy == near(70.4e9)
  days = roofline.train_seconds(seventy, 15e12, 8960, V5P.bf16_flops, 0.4) / 86400
  assert days == near(44)


def test_collectives_of_a_gpu_node():
  V = 2 * 4096 * 65536
  egress = H100.interconnect_bytes_per_s
  assert roofline.node_all_gather_time(V, 8, egress) == near(1.04e-3)
  assert roofline.node_all_to_all_time(V, 8, egress) == near(1.04e-3 / 8)
  assert roofline.across_nodes_all_gather_time(V, 4e11) == V / 4e11
  assert roofline.across_nodes_all_to_all_time(V, 4, 4e11) == pytest.approx(3 * V / 16 / 4e11)


def test_all_to_all_costs_a_quarter_of_a_gather_on_a_ring():
  V, W = 1e9, 1.8e11
  assert roofline.all_to_all_time(V, [16], W) == roofline.all_gather_time(V, [16], W) / 4
  assert roofline.all_to_all_time(V, [8, 8], W) == V * 8 / (4 * 64 * W)


def test_flops_memory_and_slices():
  assert roofline.train_flops_per_token(10, 4, 2, 3, 5) == 60 + 12 * 4 * 2 * 3 * 5
  assert roofline.train_flops_per_token(10, 4, 2, 3, 5, causal=True) == 60 + 6 * 4 * 2 * 3 * 5
  assert roofline.adam_bytes(7) == 70
  assert roofline.adam_bytes(7, 4) == 84  # this project's weights are float32
  assert roofline.slice_tokens(V5P.bf16_flops, V5P.dcn_bytes_per_s) == near(73_440)
  hop, whole = roofline.pipeline_hop_time(1024, 512, 8, 4, 9e10)
  assert hop == 2 * 1024 * 512 / (9e10 * 8) and whole == pytest.approx(10 * hop)


def test_activations_of_a_gpt():
  T, B, D, N = 2048, 1, 12288, 96
  whole = roofline.activation_bytes(T, B, D, N)
  assert whole == T * B * D * (34 + 5 * N * T / D)
  assert roofline.activation_bytes(T, B, D, N, tensor=8, sequence=True) == whole / 8
  some = roofline.activation_bytes(T, B, D, N, tensor=8)
  assert some == pytest.approx(T * B * D * (10 + 24 / 8 + 5 * N * T / (8 * D)))
  selective = roofline.activation_bytes(T, B, D, N, tensor=8, sequence=True, recompute="selective")
  assert selective == 34 * T * B * D / 8
  assert roofline.activation_bytes(T, B, D, N, recompute="full") == 2 * T * B * D


def test_sequence_parallelism():
  B, T, N, H, c = 2, 8192, 32, 128, 8
  ulysses = roofline.ulysses_bytes(B, T, N, 8, H, c)
  assert ulysses == 2 * B * (T / c) * H * (2 * N + 16) * 7 / 8
  # four arrays of N heads, of which a device sends all parts but its own
  assert roofline.ulysses_bytes(B, T, N, N, H, c) == 4 * 2 * B * (T / c) * N * H * 7 / 8
  assert roofline.ulysses_bytes(B, T, N, 1, H, c) == ulysses  # one key head is repeated 8 times
  forward, backward = roofline.ring_bytes(B, T, 8, H, c)
  assert forward == 7 * 2 * 2 * B * (T / c) * 8 * H
  assert backward == pytest.approx(forward * 30 / 14)
  for c in (2, 4, 5, 6, 8):
    sends_less = roofline.ulysses_bytes(B, T, N, 8, H, c) < roofline.ring_bytes(B, T, 8, H, c)[0]
    assert sends_less == roofline.ulysses_sends_less(c, N, 8)
  tokens = roofline.ring_overlap_tokens(4.59e14, 9e10, 32, 8)
  assert tokens == pytest.approx(1275)
  assert roofline.ring_overlap_tokens(4.59e14, 9e10, 32, 8, zigzag=True) == 2 * tokens


def test_experts_exchange_their_slots():
  sent = roofline.expert_exchange_bytes(1000, 64, 16, 2, 4, capacity=1.25)
  assert sent == 2 * 16 * math.ceil(1.25 * 1000 * 2 / 16) * 64 * 3 / 4


@pytest.mark.parametrize("P", [2, 4, 6])
@pytest.mark.parametrize(
  "name, make, chunks, times",
  [
    ("gpipe", gpipe, 1, (1, 1.3, 0.9)),
    ("1f1b", one_f_one_b, 1, (1, 1.3, 0.9)),
    ("interleaved", lambda P, M: interleaved(P, M, 2), 2, (1, 1.3, 0.9)),
    ("zb_h1", zb_h1, 1, (1, 1.3, 0.9)),
    ("zb_h2", zb_h2, 1, (1, 1.3, 0.9)),
    ("zb_v", zb_v, 2, (1, 1.1, 0.9)),
    ("dualpipe", dualpipe, 1, (1, 1, 1)),
    ("dualpipev", dualpipev, 2, (1, 1, 1)),
  ],
)
def test_bubbles_are_those_of_the_simulated_schedules(name, make, chunks, times, P):
  M = 4 * P
  forward, backward, weight = times
  simulated = simulate(
    make(P, M), Times(forward=forward, input_gradient=backward, weight_gradient=weight)
  )
  work = M * chunks * sum(times)
  formula = roofline.pipeline_bubble(name, P, forward, backward, weight)
  assert simulated.cost - work == pytest.approx(formula, abs=1e-9)
  kept = roofline.peak_micro_batches(name, P, M, chunks=chunks)
  assert max(simulated.peak_activations) / chunks == kept
  if name != "dualpipe":  # which the executor does not run
    ticks = make_table(unfuse(make(P, M))).ticks
    assert roofline.pipeline_ticks(name, P, M, chunks=chunks) == ticks
