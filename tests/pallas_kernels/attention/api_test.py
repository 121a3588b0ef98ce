"""What `attention` refuses, and which implementation it takes where."""

# B batch, T query positions, S key positions, N query heads, K key heads
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import api, attention, cudnn
from pallas_kernels.common.errors import UnsupportedError, UserError
from pallas_kernels.common.platform import log_once


def arrays(B=2, T=8, S=None, N=4, K=2, H=4, U=None, dtype=jnp.float32):
  S, U = S or T, U or H
  return [np.ones(shape, dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, U))]


Q, K, V = arrays()
IDS = np.zeros((2, 8), np.int32)
REFUSED = {
  "rank": (dict(q_BTNH=Q[0]), r"q_BTNH.shape=\(8, 4, 4\): must be \(any, any, any, any\)"),
  "rows": (dict(k_BSKH=K[:1], v_BSKU=V[:1]), r"k_BSKH.shape=\(1, 8, 2, 4\): must be \(2, .*4\)"),
  "keys and values": (dict(v_BSKU=V[:, :5]), r"v_BSKU.shape=.*must be \(2, 8, 2, any\)"),
  "width": (dict(k_BSKH=K[..., :3]), r"k_BSKH.shape=\(2, 8, 2, 3\): must be .* 4\)"),
  "heads": (dict(q_BTNH=Q[:, :, :3]), "q_BTNH.shape=.*its N=3 must be a multiple of K=2"),
  "no width": (dict(v_BSKU=V[..., :0]), "v_BSKU.shape=.*needs a head and a width"),
  "dtype": (dict(k_BSKH=K.astype(jnp.bfloat16)), "k_BSKH.dtype='bfloat16': must be .*float32"),
  "integers": (dict(q_BTNH=Q.astype(int)), "q_BTNH.dtype='int32': must be floating"),
  "window": (dict(window=0), "window=0: must be None or an integer of at least 1"),
  "window of a bool": (dict(window=True), "window=True: must be None or an integer"),
  "window both ways": (dict(window=2, causal=False), "window=2: .*needs causal=True"),
  "cap": (dict(cap=0.0), "cap=0.0: must be above 0"),
  "cap of an array": (dict(cap=jnp.ones(())), "cap=.*known when traced"),
  "scale": (dict(scale=float("nan")), "scale=nan: must be a finite number"),
  "implementation": (dict(implementation="flash"), "implementation='flash': must be one of None"),
  "interpret": (dict(interpret=True), "interpret=True: needs implementation= one of"),
  "positions": (dict(q_positions_BT=IDS[:, :3]), r"q_positions_BT.shape=\(2, 3\): must be \(2, 8"),
  "rows of positions": (dict(q_positions_BT=IDS[[0, 0, 0]]), r"q_positions_BT.shape=\(3, 8\)"),
  "type of positions": (dict(q_positions_BT=IDS * 1.0), "q_positions_BT.dtype='float32'"),
  "positions of keys alone": (dict(k_positions_BS=IDS), "q_positions_BT=None: give the positions"),
  "positions both ways": (dict(q_positions_BT=IDS, causal=False), "causal=False: positions only"),
  "segments of keys alone": (dict(k_segment_ids_BS=IDS), "q_segment_ids_BT=None: give"),
  "segments of other keys": (
    dict(k_BSKH=K[:, :5], v_BSKU=V[:, :5], q_segment_ids_BT=IDS),
    "k_segment_ids_BS=None: S=5 keys need segments of their own",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_runs(case):
  keywords, message = REFUSED[case]
  with pytest.raises(UserError, match=message):
    attention(**{"q_BTNH": Q, "k_BSKH": K, "v_BSKU": V, **keywords})


def mesh_of(platform, kind):
  """A mesh of one device of another platform, which only tracing can use."""
  device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  axes = (jax.sharding.AxisType.Explicit,)
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), axes, abstract_device=device))


def chosen(arguments, **keywords):
  """Returns what None stands for."""
  q_BTNH, k_BSKH, v_BSKU = arguments
  seen = []

  def choose(*arguments):
    seen.append(choose.original(*arguments))
    return "reference"  # traces anywhere

  choose.original = api.choose
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(api, "choose", choose)
    jax.eval_shape(functools.partial(attention, **keywords), q_BTNH, k_BSKH, v_BSKU)
  return seen[0]


BF16 = functools.partial(arrays, T=256, H=64, dtype=jnp.bfloat16)
ROW = np.zeros((2, 256), np.int32)
SPLASH = {
  "in order": (BF16(), {}, None),
  "float32, cap, window, segments": (
    arrays(T=128),
    dict(cap=2.0, window=5, q_segment_ids_BT=ROW[:, :128]),
    None,
  ),
  "wider values": (BF16(U=96), {}, None),
  "both directions": (BF16(), dict(causal=False), None),
  "one position": (BF16(T=1, S=256), {}, "T=1 queries and S=256 keys"),
  "odd": (BF16(T=130), {}, "T=130 must be a multiple of 128"),
  "positions": (BF16(), dict(q_positions_BT=ROW), "q_positions_BT"),
  "lse": (BF16(), dict(return_lse=True), None),
  "float16": (arrays(T=256, dtype=jnp.float16), {}, "float16"),
  "segments of keys": (BF16(), dict(q_segment_ids_BT=ROW, k_segment_ids_BS=ROW + 1), "k_segment"),
}
CUDNN = {
  "in order": (BF16(), {}, None),
  "window": (BF16(), dict(window=5), None),
  "odd, segments": (BF16(T=130), dict(q_segment_ids_BT=ROW[:, :130]), None),
  "both directions, other keys": (BF16(S=100), dict(causal=False), None),
  "float32": (arrays(T=256), {}, "float32"),
  "cap": (BF16(), dict(cap=2.0), "cap=2.0"),
  "lse": (BF16(), dict(return_lse=True), "return_lse"),
  "positions": (BF16(), dict(q_positions_BT=ROW), "q_positions_BT"),
  "one position": (BF16(T=1, S=256), {}, "T=1 queries and S=256 keys"),
  "wider values": (BF16(U=96), {}, "H=64 and U=96"),
  "one head of keys each": (BF16(K=4), {}, None),
  "wide": (arrays(T=256, H=256, dtype=jnp.bfloat16), {}, "H=256 must be .* at most 128"),
  "odd width": (arrays(T=256, H=12, dtype=jnp.bfloat16), {}, "H=12 must be a multiple of 8"),
  "segments, window": (BF16(), dict(q_segment_ids_BT=ROW, window=5), "window=5"),
  "segments of an odd length": (BF16(T=131), dict(q_segment_ids_BT=ROW[:, :131]), "T=131 must be"),
  "segments of keys": (BF16(), dict(q_segment_ids_BT=ROW, k_segment_ids_BS=ROW + 1), "k_segment"),
}
FUSED = [
  *(("tpu", "TPU v5e", "splash", case, *SPLASH[case]) for case in SPLASH),
  *(("gpu", "NVIDIA H100", "cudnn", case, *CUDNN[case]) for case in CUDNN),
]


@pytest.mark.parametrize(
  "platform, kind, name, case, arguments, keywords, reason",
  FUSED,
  ids=[f"{name} {case}" for _, _, name, case, *_ in FUSED],
)
def test_the_fused_kernel_is_taken_where_it_can_run_and_says_why_not(
  platform, kind, name, case, arguments, keywords, reason, monkeypatch, caplog
):
  monkeypatch.setattr(cudnn, "has_cudnn", lambda: True)
  log_once.cache_clear()
  with mesh_of(platform, kind), caplog.at_level(logging.INFO):
    for _ in range(2):
      assert chosen(arguments, **keywords) == (name if reason is None else "xla")
    (message,) = [line for line in caplog.messages if line.startswith("attention runs")]
    assert message.startswith(f"attention runs {name if reason is None else f'xla ({name}'}")
    assert message.endswith(f"on {platform}")
    if reason is not None:
      with pytest.raises(UnsupportedError, match=f"implementation='{name}': .*{reason}"):
        chosen(arguments, implementation=name, **keywords)
    else:
      assert chosen(arguments, implementation=name, **keywords) == name


def test_without_cudnn_a_gpu_runs_blocks():
  arguments = BF16()
  if not cudnn.has_cudnn():
    with mesh_of("gpu", "NVIDIA H100"):
      assert chosen(arguments) == "xla"


@pytest.mark.parametrize("name, needs", [("splash", "needs a TPU"), ("cudnn", "needs a GPU")])
def test_a_named_kernel_of_another_platform_is_refused(name, needs):
  assert chosen(BF16()) == "xla"
  with pytest.raises(UnsupportedError, match=f"implementation='{name}': {needs}.*this is cpu"):
    attention(*BF16(), implementation=name)
