"""The whole training step with TPU's fused attention, compiled for TPUs that are not here."""

import pytest

from jaxlm.config import ComputeConfig, DataConfig, MeshConfig, TrainConfig, decoder

pytestmark = pytest.mark.usefixtures("compile_in_less_time")

MESHES = {"data": MeshConfig(), "sharded": MeshConfig(data=1, tensor=2, fsdp=4)}
CASES = [
  (128, 4, (None,), "data"),
  (128, 2, (128, None), "sharded"),
  (64, 2, (None,), "sharded"),
]


@pytest.mark.slow
@pytest.mark.parametrize("H, K, windows, mesh", CASES)
def test_train_step_with_splash_attention_compiles_for_tpu(
  lower_step, tpu_devices, H, K, windows, mesh
):
  model = decoder(
    V=256,
    D=256,
    F=512,
    N=4,
    K=K,
    H=H,
    layers=2,
    windows=windows,
  )
  compute = ComputeConfig(dtype="bfloat16", attention_implementation="splash")
  config = TrainConfig(
    batch=16, model=model, compute=compute, data=DataConfig(length=256), mesh=MESHES[mesh]
  )
  program = lower_step(config, tpu_devices).compile()
  kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
  assert kernels >= 3 * len(windows)  # forward, and backward to queries and to keys and values
  assert program.memory_analysis().temp_size_in_bytes < 16 * 2**30
