"""The device mesh, the rules that map logical axes to mesh axes, and moving host arrays onto the mesh.

Parameters, activations and the KV cache name their dimensions by logical axes ("embed", "activation_heads", ...). A
rule says which mesh axes, if any, shard each of them. A rule that cannot be kept is an error with the numbers in it,
never silent replication.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from genrm_jax.runtime.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
FREE = PartitionSpec.UNCONSTRAINED  # in `constrain`: the compiler chooses

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

DEFAULT_RULES: Rules = types.MappingProxyType(
  {
    # Parameters.
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffw": "tensor",
    "rank": None,
    # Rows of tokens, and activations.
    "activation_batch": ("data", "fsdp"),
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_ffw": "tensor",
    # The KV cache.
    "cache_batch": ("data", "fsdp"),
    "cache_kv_heads": "tensor",
  }
)
# Multi-query attention has a single kv head, which every shard of the query heads needs: it is replicated.
MULTI_QUERY_RULES: Rules = types.MappingProxyType(
  {**DEFAULT_RULES, "kv_heads": None, "activation_kv_heads": None, "cache_kv_heads": None}
)


class HasAxes(Protocol):
  """The part of a parameter's declaration that `param_shardings` reads."""

  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def axes(self) -> tuple[str, ...]: ...


def check_rules(where: str, rules: Rules) -> None:
  """Checks that every rule is about a known logical axis and names known mesh axes.

  Raises:
    UserError: one that is not, with the known names; `where` says where the rules come from.
  """
  for axis, target in rules.items():
    if axis not in DEFAULT_RULES:
      raise UserError(f"{where}: unknown logical axis {axis!r}; use one of {', '.join(DEFAULT_RULES)}.")
    names = target if isinstance(target, tuple) else () if target is None else (target,)
    unknown = [name for name in names if name not in MESH_AXES]
    if unknown:
      raise UserError(
        f"{where}: the rule for {axis!r} names {unknown[0]!r}, which is no mesh axis; use {', '.join(MESH_AXES)}, a "
        "tuple of them, or None to replicate."
      )


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes data, fsdp and tensor, over which the compiler propagates shardings (Auto axes).

  Under the default rules, `data` counts replicas of the parameters, `fsdp` shards both parameters and batch, and
  `tensor` shards heads, ffw and vocabulary. At most one size may be -1: all devices that the others leave.

  Args:
    data: size of the axis.
    fsdp: size of the axis.
    tensor: size of the axis.
    devices: None means all devices of all processes.

  Raises:
    UserError: the product is not the number of devices, or a size is not allowed.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
  shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"Mesh {shown}: sizes are 1 or more, and at most one may be -1 ('the rest').")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if open_axes:
    sizes[open_axes[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    what = "does not divide" if open_axes else "is not"
    raise UserError(f"Mesh {shown}: the product of the given sizes, {fixed}, {what} the {len(devices)} devices.")
  return jax.make_mesh(
    tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=tuple(devices)
  )


def param_shardings(specs: Any, mesh: Mesh, rules: Rules) -> Any:
  """A NamedSharding for every leaf of `specs`, a tree of ParamSpec as `gemma.param_specs` returns it.

  Raises:
    UserError: an axis has no rule, a mesh axis would shard two dimensions of one parameter, or a dimension is not
      divisible by its number of shards.
  """

  def one(path: tuple[Any, ...], spec: HasAxes) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, _partition(f"Parameter {name}", spec.shape, spec.axes, mesh.shape, rules))

  return jax.tree_util.tree_map_with_path(one, specs)


def constrain(x: jax.Array, axes: Sequence[Any], rules: Rules) -> jax.Array:
  """Pins the sharding of an activation under the current mesh (`jax.set_mesh`); without a mesh, returns x unchanged.

  Args:
    x: any array.
    axes: per dimension a logical axis, None (not sharded), or FREE (left to the compiler).
    rules: as `ModelConfig.rules`.

  Raises:
    UserError: as for `param_shardings`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, _partition(f"Activation {axes}", x.shape, axes, mesh.shape, rules))


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
  """The sharding of rows of tokens: only the first axis is sharded."""
  return NamedSharding(mesh, PartitionSpec(rules["activation_batch"]))


def num_shards(sharding: NamedSharding) -> int:
  """The number of parts into which it splits the first axis of an array."""
  return math.prod(sharding.mesh.shape[mesh_axis] for mesh_axis in _first_axis(sharding))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def read_to_global(take: Callable[[np.ndarray], Any], index: np.ndarray, sharding: NamedSharding) -> Any:
  """Reads rows into global arrays; each process reads only the rows that its own devices hold.

  Args:
    take: returns a tree of NumPy arrays [n, ...] for the numbers of n rows.
    index: int[B], the rows of the whole batch, the same on all processes; B is a multiple of `num_shards(sharding)`.
    sharding: of the batch, as `batch_sharding` returns it.
  """
  places = np.arange(len(index))
  held: Mapping[jax.Device, Any] = sharding.addressable_devices_indices_map(index.shape)
  own = np.unique([places[at] for (at,) in held.values()])

  def put(rows: np.ndarray) -> jax.Array:
    def of_device(at: Any) -> np.ndarray:
      return rows[np.searchsorted(own, places[at[0]])]

    return jax.make_array_from_callback((len(index), *rows.shape[1:]), sharding, of_device)

  return jax.tree.map(put, take(index[own]))


def host_to_global(tree: Any, sharding: NamedSharding) -> Any:
  """Turns NumPy arrays [B, ...] into global arrays with the batch's sharding.

  Every process passes the whole batch; its devices take their rows from it.

  Raises:
    UserError: B is not divisible by the number of batch shards.
  """
  shards = num_shards(sharding)

  def put(path: tuple[Any, ...], rows: np.ndarray) -> jax.Array:
    if np.ndim(rows) == 0 or len(rows) % shards:
      name = jax.tree_util.keystr(path, simple=True, separator="/") or "array"
      raise UserError(
        f"Batch {name}: shape {np.shape(rows)}, but the number of rows must be a multiple of the {shards} batch shards"
        f" ({' x '.join(_first_axis(sharding))})."
      )
    rows = np.asarray(rows)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

  return jax.tree_util.tree_map_with_path(put, tree)


def _first_axis(sharding: NamedSharding) -> tuple[str, ...]:
  """The mesh axes that shard the first axis of an array."""
  target = sharding.spec[0] if len(sharding.spec) else None
  return (target,) if isinstance(target, str) else tuple(target or ())


def _partition(
  what: str, shape: Sequence[int], axes: Sequence[Any], mesh_shape: Mapping[str, int], rules: Rules
) -> PartitionSpec:
  """The PartitionSpec of an array under the rules; UserError where they cannot be kept."""
  if len(shape) != len(axes):
    raise UserError(f"{what}: {len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}.")
  taken: dict[str, int] = {}
  entries: list[Any] = []
  for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
    if axis is None or axis is FREE:
      entries.append(axis)
      continue
    if axis not in rules:
      raise UserError(f"{what}: no rule for the logical axis {axis!r}. Known: {', '.join(rules)}.")
    target = rules[axis]
    mesh_axes = (target,) if isinstance(target, str) else target or ()
    for mesh_axis in mesh_axes:
      if mesh_axis not in mesh_shape:
        raise UserError(f"{what}: the rule for {axis!r} names {mesh_axis!r}; the mesh has {', '.join(mesh_shape)}.")
      if mesh_axis in taken:
        raise UserError(
          f"{what}, shape {tuple(shape)}: the mesh axis {mesh_axis!r} would shard dimension {taken[mesh_axis]}"
          f" ({axes[taken[mesh_axis]]!r}) and dimension {dim} ({axis!r}). Give one of them another rule."
        )
      taken[mesh_axis] = dim
    shards = math.prod(mesh_shape[mesh_axis] for mesh_axis in mesh_axes)
    if size % shards:
      split = " x ".join(f"{mesh_axis}={mesh_shape[mesh_axis]}" for mesh_axis in mesh_axes)
      raise UserError(
        f"{what}, shape {tuple(shape)}: dimension {dim} ({axis!r}) has size {size}, which is not divisible by {split}."
        " Use another mesh, or give the axis another rule."
      )
    entries.append(target)
  return PartitionSpec(*entries)
