"""Every test sees 8 virtual CPU devices and strict broadcasting."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu, where installed, only compiles here
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update(
  "jax_disable_most_optimizations", True
)  # halves compile time, which is most of what tests take
hypothesis.settings.register_profile(
  "project", deadline=None
)  # the first example compiles, and machines are busy
hypothesis.settings.load_profile("project")
