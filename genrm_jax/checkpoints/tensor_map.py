"""What the layouts of other people's checkpoints share: which tensor holds which of our parameters, and the way there.

A layout is a list of `Tensor`, one for each tensor of the files, for one ModelConfig. Both directions read that list:
`place` takes tensor by tensor to its place in our stacked parameters, `take` gives the tensors back one at a time.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress


class Tensor(NamedTuple):
  """One tensor of a foreign layout.

  Attributes:
    name: its name there.
    shape: its shape there.
    holds: our parameters in it, as (path, layer); the layer is None for a parameter that is not of a layer.
    to_ours: the tensor as the parameters of `holds`, each in our shape without the leading L; views, where possible.
    to_theirs: the inverse.
  """

  name: str
  shape: tuple[int, ...]
  holds: tuple[tuple[str, int | None], ...]
  to_ours: Callable[[np.ndarray], Sequence[np.ndarray]]
  to_theirs: Callable[[Sequence[np.ndarray]], np.ndarray]


class Opened(NamedTuple):
  """A checkpoint whose index was read and checked; its tensors are read when asked for.

  Attributes:
    where: its path, for messages.
    config: the model, with the rows of the file's embedding as its vocabulary.
    tensors: what `read` gives, in the order of the layers.
    read: one tensor by its name, on the host, in the dtype of the file. UserError if the file is cut short.
  """

  where: str
  config: ModelConfig
  tensors: Sequence[Tensor]
  read: Callable[[str], np.ndarray]


def place(opened: Opened, mesh: Mesh, config: ModelConfig) -> gemma.Params:
  """Reads all tensors into parameters of `config.param_dtype` on the mesh.

  One tensor is on the host at a time; it goes into its layer of the sharded array in place. So the host holds, beside
  the shards of its own devices, no more than one tensor of the file and its copy in the layout of the devices.

  Raises:
    UserError: the shards do not fit into memory (before anything is read), or a file is cut short.
  """
  specs = gemma.param_specs(config)
  shardings = sharding.param_shardings(specs, mesh, sharding.rules_for(config.num_kv_heads))
  dtype = jnp.dtype(config.param_dtype)
  targets = jax.tree.map(lambda spec, s: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=s), specs, shardings)
  memory.check_fits(f"the parameters of {opened.where}", targets)
  targets = flax.traverse_util.flatten_dict(targets, sep="/")
  params: dict[str, jax.Array] = {}
  with progress(f"load {config.name}", len(opened.tensors)) as advance:
    for tensor in opened.tensors:
      parts = tensor.to_ours(opened.read(tensor.name))
      for (path, layer), part in zip(tensor.holds, parts, strict=True):
        if layer is None:
          params[path] = _put(part, targets[path].sharding).astype(dtype)
        else:
          make, write, of_layer = _stacked(targets[path])
          stacked = params[path] if path in params else make()
          params[path] = write(stacked, _put(part, of_layer), layer)
        # Or the host would run ahead of the copies and hold many tensors.
        params[path].block_until_ready()
      advance(1)
  return flax.traverse_util.unflatten_dict(params, sep="/")


def take(params: gemma.Params, tensors: Sequence[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) of a foreign layout, made from our parameters one at a time.

  Raises:
    UserError: there are parameters that the layout has no place for, such as adapters.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  foreign = sorted(set(flat) - {path for tensor in tensors for path, _ in tensor.holds})
  if foreign:
    raise UserError(
      f"{len(foreign)} parameters have no place in the layout of this checkpoint, the first is {foreign[0]}; adapters "
      "(LoRA) must be merged into the weights before"
    )

  def tensor_by_tensor() -> Iterator[tuple[str, np.ndarray]]:
    for tensor in tensors:
      parts = [np.asarray(flat[path] if layer is None else flat[path][layer]) for path, layer in tensor.holds]
      yield tensor.name, np.ascontiguousarray(tensor.to_theirs(parts))

  return tensor_by_tensor()


def check_shapes(where: str, found: dict[str, tuple[int, ...]], tensors: Sequence[Tensor], config: ModelConfig) -> None:
  """UserError unless the files hold every tensor of the layout in its shape."""
  missing = [t.name for t in tensors if t.name not in found]
  if missing:
    raise UserError(
      f"{where}: {len(missing)} tensors of a {config.name} are missing, the first is {missing[0]}; "
      "the folder is incomplete, or of another model: copy it again"
    )
  for t in tensors:
    if tuple(found[t.name]) != t.shape:
      raise UserError(
        f"{where}: tensor {t.name} has shape {tuple(found[t.name])}, but in a {config.name} it is {t.shape}; "
        "the files are of another model than they say"
      )


def check_size(where: str, config: ModelConfig) -> ModelConfig:
  """Compares a config read from files with the released sizes; the size's name is given to it where they agree.

  The size is looked up by family, number of layers and width. A model of another size keeps its own name.

  Raises:
    UserError: the files and the table's entry of that size differ; both are named.
  """
  keys = ("qk_norm", "post_norms", "num_layers", "embed_dim")
  released = (SIZES[name] for name in PUBLISHED_COUNTS)
  size = next((size for size in released if all(getattr(size, k) == getattr(config, k) for k in keys)), None)
  if size is None:
    return config
  ours, theirs = size.to_dict(), config.to_dict()
  # The hub's files have other numbers of unused rows than the first releases.
  same_rows = config.vocab_size in (size.vocab_size, PUBLISHED_COUNTS[size.name].hub_vocab)
  free = {"name", "dtype", "param_dtype"} | ({"vocab_size"} if same_rows else set())
  differing = [f for f in ours if f not in free and not _same(ours[f], theirs[f])]
  if differing:
    shown = "; ".join(f"{f} is {theirs[f]} in the files and {ours[f]} in the table" for f in differing)
    raise UserError(
      f"{where}: {config.num_layers} layers of width {config.embed_dim} make it a {size.name}, but {shown}; "
      "it is not the released model"
    )
  return ModelConfig.from_dict(theirs | {"name": size.name})


def _same(a: Any, b: Any) -> bool:
  return bool(np.isclose(a, b, rtol=1e-6)) if isinstance(a, float) and isinstance(b, float) else a == b


def _put(part: np.ndarray, where: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(part.shape, where, lambda index: part[index])


@functools.lru_cache(maxsize=32)
def _stacked(target: jax.ShapeDtypeStruct) -> tuple[Callable, Callable, NamedSharding]:
  """Makes a stacked parameter, writes one layer into it in place, and how that layer lies on the devices."""
  where = target.sharding
  make = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=where)
  # Not `stacked.at[layer].set`: XLA on CPU does that with a copy of the whole array.
  write = jax.jit(
    lambda stacked, part, layer: jax.lax.dynamic_update_index_in_dim(stacked, part.astype(stacked.dtype), layer, 0),
    donate_argnums=0,
    out_shardings=where,
  )
  return make, write, NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
