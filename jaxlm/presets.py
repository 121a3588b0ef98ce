"""Defines whole configurations by name: each function returns a `TrainConfig`. Imports no jax."""

import dataclasses

from jaxlm.config import (
  AttentionConfig,
  ComputeConfig,
  DataConfig,
  KdaConfig,
  LayerSpec,
  MlpConfig,
  ModelConfig,
  NsaConfig,
  OptimizerConfig,
  RopeConfig,
  TrainConfig,
  decoder,
  revise,
)


def micro() -> TrainConfig:
  """Configures about 20 thousand parameters, for tests: over 20 steps a second on 2 cores."""
  return TrainConfig(
    steps=50,
    batch=8,
    save_every=25,
    eval_every=25,
    eval_batches=2,
    model=decoder(D=32, F=64, N=2, K=1, H=16, layers=2),
    data=DataConfig(length=64),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup=10),
  )


def tiny() -> TrainConfig:
  """Configures about 0.8M parameters on the sources of Python's standard library: the demo."""
  return TrainConfig(
    steps=560,
    batch=8,
    model=decoder(D=128, F=352, N=2, K=1, H=64, layers=4),
    optimizer=OptimizerConfig(name="muon", learning_rate=6e-3, warmup=40),
  )


def kda_hybrid() -> TrainConfig:
  """Configures about 1M parameters: three layers of Kimi delta attention, one of full attention.

  The proportion and the attention without positions are Kimi Linear's (arXiv 2510.26692).
  """
  feedforward = MlpConfig(F=352)
  delta = LayerSpec(mixer=KdaConfig(N=2, K=2, H=64), feedforward=feedforward)
  full = LayerSpec(mixer=AttentionConfig(N=2, K=2, H=64, rope=None), feedforward=feedforward)
  model = ModelConfig(D=128, layers=4, pattern=(delta, delta, delta, full))
  return dataclasses.replace(tiny(), model=model)


def nsa_tiny() -> TrainConfig:
  """Configures about 1M parameters with native sparse attention everywhere (arXiv 2502.11089)."""
  mixer = NsaConfig(N=4, K=1, H=32, length=16, stride=8, block=16, count=4, window=32)
  spec = LayerSpec(mixer=mixer, feedforward=MlpConfig(F=352))
  return dataclasses.replace(tiny(), model=ModelConfig(D=128, layers=4, pattern=(spec,)))


def small() -> TrainConfig:
  """Configures about 10M parameters on the sources of Python's standard library."""
  return TrainConfig(
    steps=2000,
    batch=8,
    model=decoder(D=320, F=864, N=5, K=5, H=64, layers=8),
    data=DataConfig(length=512),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, warmup=200),
  )


def tuning(model: ModelConfig) -> TrainConfig:
  """Returns a run that goes on from published weights: bfloat16, recomputed blocks, a small rate.

  `jaxlm convert CHECKPOINT RUN` starts from it.
  """
  return TrainConfig(
    model=model,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    data=DataConfig(length=4096),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup=20),
  )


def llama_3_1_8b() -> TrainConfig:
  """Configures Llama 3.1 8B (Grattafiori et al. 2024, arXiv 2407.21783)."""
  rope = RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_length=8192)
  model = decoder(D=4096, F=14336, N=32, K=8, H=128, V=128256, layers=32, rope=rope)
  return tuning(revise(model, norm_eps=1e-5, max_length=131072))


def llama_3_1_405b() -> TrainConfig:
  """Configures Llama 3.1 405B as it was pretrained (2407.21783): 16M tokens, 8192 a row."""
  model = llama_3_1_8b().model
  config = tuning(revise(model, D=16384, F=53248, N=128, layers=126))
  return dataclasses.replace(
    config,
    batch=2048,
    data=DataConfig(length=8192),
    optimizer=OptimizerConfig(learning_rate=8e-5, warmup=8000),
    steps=1_200_000,
  )


def qwen2_5_0_5b() -> TrainConfig:
  """Configures Qwen2.5 0.5B (Qwen Team 2024, arXiv 2412.15115)."""
  model = revise(_QWEN2_5, D=896, F=4864, N=14, K=2, H=64, layers=24, tied=True, max_length=32768)
  return tuning(model)


def qwen2_5_1_5b() -> TrainConfig:
  """Configures Qwen2.5 1.5B (Qwen Team 2024, arXiv 2412.15115)."""
  return tuning(revise(_QWEN2_5, D=1536, F=8960, N=12, K=2, H=128, layers=28, tied=True))


def qwen2_5_7b() -> TrainConfig:
  """Configures Qwen2.5 7B (Qwen Team 2024, arXiv 2412.15115)."""
  return tuning(revise(_QWEN2_5, D=3584, F=18944, N=28, K=4, H=128, V=152064, layers=28))


def qwen3_0_6b() -> TrainConfig:
  """Configures Qwen3 0.6B (Qwen Team 2025, arXiv 2505.09388)."""
  return tuning(revise(_QWEN3, D=1024, F=3072, N=16, layers=28, tied=True))


def qwen3_8b() -> TrainConfig:
  """Configures Qwen3 8B (Qwen Team 2025, arXiv 2505.09388)."""
  return tuning(revise(_QWEN3, D=4096, F=12288, N=32, layers=36))


def gemma_2_2b() -> TrainConfig:
  """Configures Gemma 2 2B (Gemma Team 2024, arXiv 2408.00118)."""
  return tuning(revise(_GEMMA_2, D=2304, F=9216, N=8, K=4, layers=26))


def gemma_2_9b() -> TrainConfig:
  """Configures Gemma 2 9B (Gemma Team 2024, arXiv 2408.00118)."""
  return tuning(revise(_GEMMA_2, D=3584, F=14336, N=16, K=8, layers=42))


_QWEN = decoder(V=151936, rope=RopeConfig(theta=1e6))
_QWEN2_5 = revise(_QWEN, qkv_bias=True, max_length=131072)
_QWEN3 = revise(_QWEN, K=8, N=8, H=128, qk_norm=True, max_length=40960)
_GEMMA_2 = decoder(
  windows=(4096, None),
  H=256,
  V=256000,
  max_length=8192,
  tied=True,
  embed_scale="root_width",
  norm_offset=1,
  post_norms=True,
  activation="gelu_tanh",
  query_width=256.0,
  cap=50.0,
  logit_cap=30.0,
)
