"""The whole training step with TPU's fused attention, compiled for TPUs that are not here."""

import pytest

from jaxlm.config import DataConfig, MeshConfig, ModelConfig, TrainConfig

MESHES = {"data": MeshConfig(), "sharded": MeshConfig(data=1, tensor=2, fsdp=4)}
CASES = [
  (128, 4, ("full",), "data"),
  (128, 2, ("window", "full"), "sharded"),
  (64, 2, ("full",), "sharded"),
]


@pytest.mark.slow
@pytest.mark.parametrize("H, K, attention, mesh", CASES)
def test_train_step_with_splash_attention_compiles_for_tpu(
  lower_step, tpu_devices, H, K, attention, mesh
):
  model = ModelConfig(
    V=256,
    D=256,
    F=512,
    N=4,
    K=K,
    H=H,
    layers=2,
    attention=attention,
    dtype="bfloat16",
    attention_implementation="splash",
  )
  config = TrainConfig(batch=16, model=model, data=DataConfig(length=256), mesh=MESHES[mesh])
  program = lower_step(config, tpu_devices).compile()
  kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
  assert kernels >= 3 * len(attention)  # forward, and backward to queries and to keys and values
  assert program.memory_analysis().temp_size_in_bytes < 16 * 2**30
