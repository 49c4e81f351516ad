"""Maps between the tensors of a checkpoint file and our parameters, shared by all checkpoint formats.

A format describes itself by a list of `Tensor` for a given ModelConfig. Both directions follow that list: `place` loads
tensor by tensor into our stacked, sharded parameters, and `unstack` yields the tensors of given parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress
from genrm_jax.text.tokenizer import SentencePieceTokenizer


class Tensor(NamedTuple):
  """One tensor of a checkpoint file.

  Attributes:
    name: in the file.
    shape: in the file.
    holds: the parameters in it, as (path, layer); layer is None for a parameter outside the layers.
    to_params: converts it to the parameters in `holds`, each without the leading axis L; returns views if possible.
    from_params: the inverse.
  """

  name: str
  shape: tuple[int, ...]
  holds: tuple[tuple[str, int | None], ...]
  to_params: Callable[[np.ndarray], Sequence[np.ndarray]]
  from_params: Callable[[Sequence[np.ndarray]], np.ndarray]


class CheckpointReader(NamedTuple):
  """A checkpoint with a validated index; its tensors are read on demand.

  Attributes:
    path: for messages.
    config: the model; its vocabulary size is that of the file's embedding.
    tensors: all tensors of the model, in the order of the layers.
    read: returns one tensor by name, on the host, in the dtype of the file. Raises UserError if the file is truncated.
    tokenizer: opens the tokenizer inside or beside the files; None if there is none.
  """

  path: str
  config: ModelConfig
  tensors: Sequence[Tensor]
  read: Callable[[str], np.ndarray]
  tokenizer: Callable[[], SentencePieceTokenizer] | None = None


def tokenizer_in(*folders: epath.Path) -> Callable[[], SentencePieceTokenizer] | None:
  """Opens the tokenizer.model in the first of some folders that has one."""
  found = next((path for folder in folders if (path := folder / "tokenizer.model").exists()), None)
  return None if found is None else functools.partial(SentencePieceTokenizer, found)


def place(reader: CheckpointReader, mesh: Mesh, config: ModelConfig) -> gemma.Params:
  """Reads all tensors into parameters of `config.param_dtype`, sharded over the mesh by `config.rules`.

  Each tensor is written into its layer of the sharded array in place. So beside the shards of its devices, the host
  holds at most one tensor of the file and its copy in the device layout.

  Raises:
    UserError: the shards do not fit into memory (before any tensor is read), a file is truncated, or a tensor has a
      value that is not finite.
  """
  specs = gemma.param_specs(config)
  shardings = sharding.param_shardings(specs, mesh, config.rules)
  dtype = jnp.dtype(config.param_dtype)
  targets = jax.tree.map(lambda spec, s: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=s), specs, shardings)
  memory.check_fits(f"the parameters of {reader.path}", targets)
  targets = flax.traverse_util.flatten_dict(targets, sep="/")
  params: dict[str, jax.Array] = {}
  with progress(f"load {config.name}", len(reader.tensors)) as advance:
    for tensor in reader.tensors:
      stored = reader.read(tensor.name)
      if not _is_finite(stored):
        raise UserError(
          f"{reader.path}: tensor {tensor.name} has values that are NaN or infinite; the file is damaged or its "
          "training diverged: copy it again, or use another checkpoint"
        )
      parts = tensor.to_params(stored)
      for (path, layer), part in zip(tensor.holds, parts, strict=True):
        if layer is None:
          params[path] = _put(part, targets[path].sharding).astype(dtype)
        else:
          make, write, layer_sharding = _stacked(targets[path])
          stacked = params[path] if path in params else make()
          params[path] = write(stacked, _put(part, layer_sharding), layer)
        # Otherwise the host would run ahead of the copies and hold many tensors.
        params[path].block_until_ready()
      advance(1)
  return flax.traverse_util.unflatten_dict(params, sep="/")


def unstack(params: gemma.Params, tensors: Sequence[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) for each tensor of a file, made from our parameters one at a time.

  Raises:
    UserError: the format has no place for some parameters, such as adapters.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  unknown = sorted(set(flat) - {path for tensor in tensors for path, _ in tensor.holds})
  if unknown:
    raise UserError(
      f"{len(unknown)} parameters have no place in this checkpoint format, the first is {unknown[0]}; merge adapters "
      "(LoRA) into the weights first"
    )

  def tensor_by_tensor() -> Iterator[tuple[str, np.ndarray]]:
    for tensor in tensors:
      parts = [np.asarray(flat[path] if layer is None else flat[path][layer]) for path, layer in tensor.holds]
      yield tensor.name, np.ascontiguousarray(tensor.from_params(parts))

  return tensor_by_tensor()


def check_shapes(path: str, found: dict[str, tuple[int, ...]], tensors: Sequence[Tensor], config: ModelConfig) -> None:
  """Raises UserError unless the files hold every tensor in its shape."""
  missing = [t.name for t in tensors if t.name not in found]
  if missing:
    raise UserError(
      f"{path}: {len(missing)} tensors of {config.name} are missing, the first is {missing[0]}; the folder is "
      "incomplete or holds another model: copy it again"
    )
  for t in tensors:
    if tuple(found[t.name]) != t.shape:
      raise UserError(
        f"{path}: tensor {t.name} has shape {tuple(found[t.name])}, but {t.shape} in {config.name}; the files and "
        "their configuration are of different models: copy both from one place"
      )


def check_size(path: str, config: ModelConfig) -> ModelConfig:
  """Compares a config from files with the released size of its family, depth and width, and names it after that size.

  A model of no released size keeps its name. Any vocabulary size is accepted: the releases pad theirs differently, and
  fine-tuning may add pieces. `text.tokenizer.check_vocab` compares it with the tokenizer.

  Raises:
    UserError: the files and the released size differ.
  """
  keys = ("qk_norm", "post_norms", "num_layers", "embed_dim")
  released = (SIZES[name] for name in PUBLISHED_COUNTS)
  size = next((size for size in released if all(getattr(size, k) == getattr(config, k) for k in keys)), None)
  if size is None:
    return config
  table, files = size.to_dict(), config.to_dict()
  ignored = ("name", "vocab_size", "dtype", "param_dtype")
  differing = [f for f in table if f not in ignored and not is_close(table[f], files[f])]
  if differing:
    shown = "; ".join(f"{f} is {files[f]} in the files and {table[f]} in the table" for f in differing)
    raise UserError(
      f"{path}: by its {config.num_layers} layers of width {config.embed_dim} this is {size.name}, but {shown}; use "
      "the files of the released model"
    )
  return dataclasses.replace(config, name=size.name)


def is_close(a: Any, b: Any) -> bool:
  """Equality of config values; floats may differ by rounding."""
  return bool(np.isclose(a, b, rtol=1e-6)) if isinstance(a, float) and isinstance(b, float) else a == b


def _is_finite(x: np.ndarray) -> bool:
  """Whether a floating-point array is finite, by two passes over its bits that make no copy.

  In each sign, infinities and NaN have the largest bits of all. NumPy's `isfinite` takes 8 times as long on bfloat16.
  """
  if not x.size:
    return True
  infinity = np.array(np.inf, x.dtype)
  size = x.dtype.itemsize
  most_positive, most_negative = (x.view(f"{kind}{size}").max() for kind in "iu")
  return bool(most_positive < infinity.view(f"i{size}") and most_negative < (-infinity).view(f"u{size}"))


def _put(part: np.ndarray, target: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(part.shape, target, lambda index: part[index])


@functools.lru_cache(maxsize=32)
def _stacked(target: jax.ShapeDtypeStruct) -> tuple[Callable, Callable, NamedSharding]:
  """(makes a stacked parameter, writes a layer into it in place, sharding of a layer)."""
  where = target.sharding
  make = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=where)
  # Not `stacked.at[layer].set`, for which XLA on CPU copies the whole array.
  write = jax.jit(
    lambda stacked, part, layer: jax.lax.dynamic_update_index_in_dim(stacked, part.astype(stacked.dtype), layer, 0),
    donate_argnums=0,
    out_shardings=where,
  )
  return make, write, NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
