"""The device mesh, the rules that lay logical axes on it, and the way of host arrays onto the devices.

A parameter names its dimensions by logical axes ("embed", "heads", ...); a rule says which mesh axis, if any, splits
each. A rule that cannot be kept is an error with the numbers in it, never a silent replication.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from genrm_jax.runtime.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")
FREE = PartitionSpec.UNCONSTRAINED  # In `constrain`: the compiler may choose.

Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = {
  "batch": ("data", "fsdp"),
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "ffw": "tensor",
  "rank": None,
}
# Multi-query attention has one kv head, which every tensor shard needs whole: it is replicated over `tensor`.
MULTI_QUERY_RULES: Rules = {**DEFAULT_RULES, "kv_heads": None}


class HasAxes(Protocol):
  """What `param_shardings` reads of a parameter's declaration."""

  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def axes(self) -> tuple[str, ...]: ...


def rules_for(num_kv_heads: int) -> Rules:
  """MULTI_QUERY_RULES for one kv head, else DEFAULT_RULES."""
  return MULTI_QUERY_RULES if num_kv_heads == 1 else DEFAULT_RULES


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes data, fsdp, tensor, in which the compiler propagates shardings (Auto axes).

  Args:
    data: copies of the parameters; -1 for one of the three means all devices that the other two leave.
    fsdp: shards of the parameters over which the batch is split as well.
    tensor: shards of heads, ffw and vocabulary.
    devices: all devices of the process group if None.

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


def param_shardings(specs: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
  """A NamedSharding for every leaf of `specs` (a tree of things with `shape` and `axes`, as `gemma.param_specs` gives).

  Raises:
    UserError: an axis has no rule, a mesh axis would split two dimensions of one parameter, or a dimension does not
      divide by the shards it is given.
  """

  def one(path: tuple[Any, ...], spec: HasAxes) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, _partition(f"Parameter {name}", spec.shape, spec.axes, mesh.shape, rules))

  return jax.tree_util.tree_map_with_path(one, specs)


def constrain(x: jax.Array, *logical_axes: Any) -> jax.Array:
  """Pins the sharding of an activation under the current mesh (`jax.set_mesh`), by DEFAULT_RULES.

  Where no mesh is set it returns x unchanged: code for one device needs no mesh.

  Args:
    x: any array.
    *logical_axes: for every dimension a logical axis, None (not split), or FREE (left to the compiler).

  Raises:
    UserError: as for `param_shardings`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  partition = _partition(f"Activation {logical_axes}", x.shape, logical_axes, mesh.shape, DEFAULT_RULES)
  return jax.lax.with_sharding_constraint(x, partition)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the first axis over data and fsdp, and no other."""
  return NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def num_shards(sharding: NamedSharding) -> int:
  """How many parts the sharding splits axis 0 into."""
  entry = sharding.spec[0] if len(sharding.spec) else None
  axes = (entry,) if isinstance(entry, str) else entry or ()
  return math.prod(sharding.mesh.shape[axis] for axis in axes)


def read_to_global(take: Callable[[np.ndarray], Any], index: np.ndarray, mesh: Mesh | NamedSharding) -> Any:
  """Global arrays of the rows of `index`, split over the batch; each process reads those that its own devices hold.

  Args:
    take: gives a tree of numpy arrays, first axis n, for an index of n rows.
    index: of all rows of the batch, int[B], the same on all processes; B divides by the batch shards.
    mesh: the devices, or the sharding of the batch.
  """
  sharding = batch_sharding(mesh) if isinstance(mesh, Mesh) else mesh
  places = np.arange(len(index))
  held: Mapping[jax.Device, Any] = sharding.addressable_devices_indices_map(index.shape)
  own = np.unique([places[at] for (at,) in held.values()])

  def put(rows: np.ndarray) -> jax.Array:
    def of_device(at: Any) -> np.ndarray:
      return rows[np.searchsorted(own, places[at[0]])]

    return jax.make_array_from_callback((len(index), *rows.shape[1:]), sharding, of_device)

  return jax.tree.map(put, take(index[own]))


def host_to_global(tree: Any, mesh: Mesh) -> Any:
  """Turns rows (numpy, first axis B) into global arrays, split over the batch.

  In a run of many processes each gives the whole batch, and only what its own devices hold is taken from it.

  Raises:
    UserError: the rows do not divide by the number of batch shards.
  """
  sharding = batch_sharding(mesh)
  shards = math.prod(mesh.shape[axis] for axis in DEFAULT_RULES["batch"] or ())

  def put(path: tuple[Any, ...], rows: np.ndarray) -> jax.Array:
    if np.ndim(rows) == 0 or len(rows) % shards:
      name = jax.tree_util.keystr(path, simple=True, separator="/") or "array"
      raise UserError(
        f"Batch {name}: shape {np.shape(rows)}, but its rows must divide by the {shards} batch shards (data x fsdp)."
      )
    rows = np.asarray(rows)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

  return jax.tree_util.tree_map_with_path(put, tree)


def _partition(
  what: str, shape: Sequence[int], axes: Sequence[Any], mesh_shape: Mapping[str, int], rules: Rules
) -> PartitionSpec:
  """The PartitionSpec that the rules give to an array; UserError where they cannot be kept."""
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
        raise UserError(f"{what}: {axis!r} goes to {mesh_axis!r}, but the mesh has {', '.join(mesh_shape)}.")
      if mesh_axis in taken:
        raise UserError(
          f"{what}, shape {tuple(shape)}: the mesh axis {mesh_axis!r} would split dimension {taken[mesh_axis]}"
          f" ({axes[taken[mesh_axis]]!r}) and dimension {dim} ({axis!r}). Give one of them another rule."
        )
      taken[mesh_axis] = dim
    shards = math.prod(mesh_shape[mesh_axis] for mesh_axis in mesh_axes)
    if size % shards:
      split = " x ".join(f"{mesh_axis}={mesh_shape[mesh_axis]}" for mesh_axis in mesh_axes)
      raise UserError(
        f"{what}, shape {tuple(shape)}: dimension {dim} ({axis!r}) has size {size}, which does not divide by {split}."
        " Use a mesh that divides it, or give the axis another rule."
      )
    entries.append(target)
  return PartitionSpec(*entries)
