import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sharding import MeshConfig, make_mesh
from sharding.rules import (
  RULES,
  LogicalRules,
  all_gather,
  defer_reduction,
  is_sharded,
  reduce_gradients,
  shard,
  spec,
)

SIZES = {
  "data": 2,
  "stage": 1,
  "fsdp": 2,
  "context_ring": 1,
  "context_ulysses": 1,
  "expert": 1,
  "tensor": 2,
}


def test_names_become_the_mesh_axes_of_the_table():
  assert RULES.spec(("batch", "length", None), (8, 6, 3), SIZES) == P(("data", "fsdp"), None, None)
  assert RULES.spec(("embed", "mlp"), (4, 6), SIZES) == P("fsdp", "tensor")
  assert RULES.spec(("batch", "norm_length", None), (8, 6, 3), SIZES) == P(
    ("data", "fsdp"), "tensor", None
  )


def test_axes_of_size_one_are_dropped_whatever_the_size_of_the_array():
  ones = dict.fromkeys(SIZES, 1)
  assert RULES.spec(("batch", "norm_length", "embed"), (3, 5, 7), ones) == P(None, None, None)
  assert RULES.spec(("batch",), (6,), ones | {"fsdp": 3}) == P("fsdp")


def test_a_size_that_does_not_divide_names_axis_size_and_devices():
  with pytest.raises(ValueError, match=r"'batch' of size 6 .*\('data', 'fsdp'\) of 4 devices"):
    RULES.spec(("batch", None), (6, 3), SIZES)


def test_a_decoding_step_of_one_position_is_not_split_but_a_batch_of_one_is_refused():
  assert RULES.spec(("batch", "norm_length", None), (4, 1, 3), SIZES) == P(
    ("data", "fsdp"), None, None
  )
  with pytest.raises(ValueError, match="'batch' of size 1"):
    RULES.spec(("batch", "norm_length"), (1, 4), SIZES)


def test_a_mesh_axis_used_twice_names_both_logical_axes():
  with pytest.raises(ValueError, match="mesh axis 'tensor' would split both 'heads' and 'mlp'"):
    RULES.spec(("heads", "mlp"), (4, 4), SIZES)
  # the same names are fine where tensor has one device
  assert RULES.spec(("heads", "mlp"), (4, 4), SIZES | {"tensor": 1}) == P(None, None)


def test_an_unknown_name_comes_with_the_nearest():
  with pytest.raises(ValueError, match="'batches' is not in the rules; nearest: batch"):
    RULES.spec(("batches",), (4,), SIZES)


def test_an_array_needs_one_name_per_axis():
  with pytest.raises(ValueError, match="needs 2 names"):
    RULES.spec(("batch",), (4, 4), SIZES)


def test_a_table_is_data():
  rules = LogicalRules({"rows": ("data", "tensor")})
  assert rules.spec(("rows", None), (8, 1), SIZES) == P(("data", "tensor"), None)


def test_without_a_mesh_arrays_stay_as_they_are():
  x_DF = jnp.ones((3, 5))
  assert not is_sharded()
  assert shard(x_DF, "embed", "mlp") is x_DF and all_gather(x_DF, None, "mlp") is x_DF
  assert defer_reduction({"w": x_DF})["w"] is x_DF


def test_place_shards_on_the_mesh():
  with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    assert is_sharded()
    w_DF = shard(jnp.arange(24.0).reshape(4, 6), "embed", "mlp")
    assert w_DF.sharding.spec == P("fsdp", "tensor") == spec((4, 6), "embed", "mlp")
    chex.assert_shape(w_DF.addressable_shards[0].data, (2, 3))


@pytest.mark.parametrize(
  "mesh", [MeshConfig(), MeshConfig(data=2, fsdp=4)], ids=lambda mesh: mesh.describe()
)
def test_deferred_gradients_are_unsummed_until_they_are_reduced(mesh):
  with jax.set_mesh(make_mesh(mesh)):
    x_BD = shard(jnp.arange(64.0).reshape(8, 8), "batch", None)
    w_DF = shard(jnp.ones((8, 4)), "embed", None)

    def share(w_DF):
      def objective(w_DF):
        return jnp.einsum("bd,df->bf", x_BD, all_gather(w_DF, None, None)).sum()

      return jax.grad(objective)(defer_reduction(w_DF))

    unsummed = set(jax.typeof(jax.eval_shape(share, w_DF)).sharding.spec.unreduced)
    assert unsummed == {
      "data"
    }  # fsdp's part is summed where the gathered weight's gradient is scattered
    grad_DF = jax.jit(lambda w_DF: reduce_gradients(share(w_DF), w_DF))(w_DF)
    assert grad_DF.sharding.spec == w_DF.sharding.spec
    assert jnp.array_equal(
      jax.device_get(grad_DF), jnp.tile(jnp.arange(64.0).reshape(8, 8).sum(0)[:, None], (1, 4))
    )
