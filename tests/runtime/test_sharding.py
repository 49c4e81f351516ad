"""Meshes, rules and their errors, on 8 virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Spec:
  shape: tuple[int, ...]
  axes: tuple[str, ...]


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_make_mesh(mesh):
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert dict(sharding.make_mesh(fsdp=-1, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  assert sharding.make_mesh(devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 2, "tensor": 2}, "data=2, fsdp=1, tensor=2.* 4, is not the 8 devices"),
    ({"fsdp": -1, "tensor": 3}, "fsdp=-1, tensor=3.* 3, does not divide the 8 devices"),
    ({"fsdp": -1, "tensor": 16}, "16, does not divide the 8 devices"),
    ({"data": -1, "fsdp": -1}, "at most one may be -1"),
    ({"data": 0}, "data=0"),
    ({"data": -2}, "data=-2"),
  ],
)
def test_make_mesh_refuses(sizes, message):
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(**sizes)


def test_param_shardings(mesh):
  specs = {"a": {"q": Spec((4, 8, 6, 3), ("layers", "embed", "heads", "head_dim"))}, "norm": Spec((8,), ("embed",))}
  got = sharding.param_shardings(specs, mesh)
  assert got["a"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
  assert got["norm"].spec == PartitionSpec("fsdp")
  placed = jax.device_put(jnp.zeros((4, 8, 6, 3)), got["a"]["q"])
  assert placed.addressable_shards[0].data.shape == (4, 4, 3, 3)


def test_one_kv_head_is_replicated_by_a_rule_of_its_own(mesh):
  spec = {"k": Spec((4, 8, 1, 3), ("layers", "embed", "kv_heads", "head_dim"))}
  got = sharding.param_shardings(spec, mesh, sharding.rules_for(1))["k"]
  assert got.spec == PartitionSpec(None, "fsdp", None, None)
  assert sharding.rules_for(2) is sharding.DEFAULT_RULES
  with pytest.raises(UserError, match=r"Parameter k.*dimension 2 \('kv_heads'\) has size 1.*tensor=2"):
    sharding.param_shardings(spec, mesh, sharding.DEFAULT_RULES)


@pytest.mark.parametrize(
  ("spec", "rules", "message"),
  [
    (Spec((8, 5), ("embed", "ffw")), {}, r"layers/w, shape \(8, 5\): dimension 1 \('ffw'\) has size 5.*tensor=2"),
    (Spec((6,), ("batch",)), {}, r"dimension 0 \('batch'\) has size 6.*data=2 x fsdp=2"),
    (Spec((8, 8), ("heads", "ffw")), {}, r"'tensor' would split dimension 0 \('heads'\) and dimension 1 \('ffw'\)"),
    (Spec((8,), ("embed",)), {"embed": ("fsdp", "fsdp")}, "'fsdp' would split dimension 0"),
    (Spec((8,), ("embde",)), {}, "no rule for the logical axis 'embde'.*embed"),
    (Spec((8,), ("embed",)), {"embed": "expert"}, "'embed' goes to 'expert', but the mesh has data, fsdp, tensor"),
    (Spec((8, 8), ("embed",)), {}, r"1 logical axes \('embed',\) for shape \(8, 8\)"),
  ],
)
def test_rules_that_cannot_be_kept_are_errors(mesh, spec, rules, message):
  with pytest.raises(UserError, match=message):
    sharding.param_shardings({"layers": {"w": spec}}, mesh, {**sharding.DEFAULT_RULES, **rules})


def test_constrain(mesh):
  x = np.ones((8, 6, 4), np.float32)

  @jax.jit
  def pinned(x):
    return sharding.constrain(x, "batch", None, "ffw")

  with jax.set_mesh(mesh):
    assert pinned(x).sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    free = jax.jit(lambda x: sharding.constrain(pinned(x) * 2, "batch", None, sharding.FREE))(x)
    assert free.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    with pytest.raises(UserError, match=r"Activation.*dimension 0 \('batch'\) has size 3"):
      sharding.constrain(jnp.ones((3, 6)), "batch", None)
  assert sharding.constrain(x, "no mesh", "is set", "here") is x


def test_host_to_global(mesh):
  rows = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "length": np.arange(8, dtype=np.int32)}
  got = sharding.host_to_global(rows, mesh)
  jax.tree.map(np.testing.assert_array_equal, got, rows)
  assert got["tokens"].sharding == sharding.batch_sharding(mesh)
  shards = {(shard.data.shape, shard.index[0].start) for shard in got["tokens"].addressable_shards}
  assert shards == {((2, 3), start) for start in (0, 2, 4, 6)}
  with pytest.raises(UserError, match=r"Batch tokens: shape \(6, 3\).* 4 batch shards"):
    sharding.host_to_global({"tokens": np.zeros((6, 3))}, mesh)


def test_read_to_global(mesh):
  rows, asked = np.arange(60, dtype=np.int32).reshape(20, 3), []

  def take(index):
    asked.append(index.tolist())
    return {"tokens": rows[index], "length": rows[index, 0]}

  index = np.array([9, 3, 3, 19, 0, 7, 8, 1])
  got = sharding.read_to_global(take, index, mesh)
  assert asked == [index.tolist()], "each row once, though two devices hold it"
  jax.tree.map(np.testing.assert_array_equal, got, {"tokens": rows[index], "length": rows[index, 0]})
  assert got["tokens"].sharding == sharding.batch_sharding(mesh)


def test_replicated(mesh):
  assert jax.device_put(np.ones(3), sharding.replicated(mesh)).addressable_shards[5].data.shape == (3,)
