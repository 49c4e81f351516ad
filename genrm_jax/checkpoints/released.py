"""The Orbax layout in which Gemma's weights were released for Flax, in and out.

A tree in one of two forms, with the same tensors:

    flat     {"transformer/layer_0/mlp/linear": {"w": F D}, "transformer/layer_0/attn/q_einsum": {"w": N D H}, ...}
    nested   {"layer_0": {"mlp": {"linear": F D}, "attn": {"q_einsum": {"w": N D H}, ...}}, ...}

The releases are flat; nested is what the model code of the `gemma` package works with. A tensor's name here is its path
in the nested form. The image encoder of Gemma 3 4B and above, and its projection, are passed over.

The names and shapes are those of the package's model code (google-deepmind/gemma 4.0.1, gm/nn and gm/ckpts).

Reading goes through tensorstore, with the names that Orbax's index gives: one tensor is read without its neighbours,
and a damaged one can be named.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from genrm_jax.checkpoints.tensor_map import Opened, Tensor, check_shapes, check_size, take
from genrm_jax.model import gemma
from genrm_jax.model.config import SIZES, ModelConfig
from genrm_jax.runtime import memory
from genrm_jax.runtime.errors import UserError

_INDEX = "_METADATA"
_DATABASE = "manifest.ocdbt"
_UNFINISHED = ".orbax-checkpoint-tmp"
_COPIES = 3  # On the host while a tree is saved, as measured.
_PREFIX = "transformer/"
_EMBEDDING = "embedder/input_embedding"
_IMAGES = re.compile(r"SigLiPFromPatches_0/|vision_encoder/|embedder/mm_")
_LAYER = re.compile(r"layer_(\d+)/")
_MLP_FLAT = re.compile(r"(.*/mlp/(?:gating_einsum|linear))/w")


def is_folder(folder: epath.Path) -> bool:
  """Whether it is an Orbax checkpoint, also one that was not finished or has lost its index."""
  return _UNFINISHED in folder.name or any((folder / name).exists() for name in (_INDEX, _DATABASE))


def open_folder(folder: epath.Path, config: ModelConfig | None = None) -> Opened:
  """Reads the index and the shapes of a checkpoint, flat or nested, and checks them.

  Args:
    folder: local, or gs://.
    config: the model, if its size is not in the table. The files tell shapes, and which norms there are, but nothing of
      soft-caps, windows, RoPE and the scale of queries.

  Raises:
    UserError: the checkpoint is unfinished, damaged, of another kind of model, of a size that is unknown and was not
      given, or not of the size that was given.
  """
  specs = {name: spec for name, spec in _specs(folder).items() if not _IMAGES.match(name)}
  layers = [int(match[1]) for match in map(_LAYER.match, specs) if match]
  if _EMBEDDING not in specs or not layers:
    raise UserError(
      f"{folder}: not a Gemma 1, 2 or 3: no {_EMBEDDING} and layer_0 among its {len(specs)} tensors (the first is "
      f"{next(iter(specs), 'none')}); give the folder of a checkpoint that was released for Flax"
    )
  stores = {name: tensorstore.open(spec, open=True, read=True) for name, spec in specs.items()}
  found = {name: tuple(_result(folder, name, store).shape) for name, store in stores.items()}
  if config is None:
    config = _known_size(str(folder), found, 1 + max(layers))
  gating = found.get("layer_0/mlp/gating_einsum", ())
  # Where D == F, both orders of the axes have the same shape, and the family must tell.
  by_shape = None if config.embed_dim == config.ffw_dim else gating[1:] == (config.ffw_dim, config.embed_dim)
  layout = tensors(config, by_shape)
  check_shapes(str(folder), found, layout, config)
  foreign = sorted(set(found) - {tensor.name for tensor in layout})
  if foreign:
    raise UserError(
      f"{folder}: {len(foreign)} tensors are of no {config.name}, the first is {foreign[0]}; give the config of these "
      "files, and merge adapters (LoRA) into the weights before"
    )

  def read(name: str) -> np.ndarray:
    return _result(folder, name, stores[name].result().read())

  return Opened(str(folder), config, layout, read)


def save(params: gemma.Params, config: ModelConfig, folder: str | os.PathLike[str], nested: bool = False) -> None:
  """Writes parameters, in their own dtype, as a checkpoint that the `gemma` package loads.

  Orbax takes a whole tree: the host holds it, Orbax's own copy of it, and what is being compressed and written,
  together three times the parameters.

  Args:
    params: as `gemma.param_specs` declares them.
    config: their model.
    folder: a new one, local or gs://.
    nested: the tree as the package's model code has it, instead of flat as released.

  Raises:
    UserError: the folder exists or cannot be written, or the copy does not fit into memory or onto the disk.
  """
  path = _absolute(epath.Path(folder))
  if path.exists():
    raise UserError(f"{path} exists; give the name of a new folder")
  _check_room(path, sum(p.nbytes for p in jax.tree.leaves(params)))
  in_tree = _nested_path if nested else _flat_path
  tree = flax.traverse_util.unflatten_dict({in_tree(name): array for name, array in take(params, tensors(config))})
  try:
    # Not StandardCheckpointer: after a failure its threads would keep the process alive for minutes.
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
      writer.save(path, args=ocp.args.StandardSave(tree))
  except (OSError, ValueError) as e:
    # TensorStore reports what the operating system refuses as a ValueError.
    if isinstance(e, ValueError) and "os_error_code" not in str(e):
      raise
    raise UserError(f"cannot write {path}: {_reason(e)}; check the folder and the space on the disk") from e


def tensors(config: ModelConfig, transposed: bool | None = None) -> list[Tensor]:
  """The layout: every text tensor of a checkpoint of this model.

  Args:
    config: the model.
    transposed: the gate and up weights are F D instead of D F. None: as in the releases of its family and size, where
      Gemma 1 and Gemma 2 2B have D F; Gemma 2 of another size than released as well, as the package does by default.
  """
  c = config
  d, f, n, k, h = c.embed_dim, c.ffw_dim, c.num_heads, c.num_kv_heads, c.head_dim
  transposed = _released_transposed(c) if transposed is None else transposed
  found = [Tensor(_EMBEDDING, (c.vocab_size, d), ((_EMBEDDING, None),), *_AS_IT_IS)]
  for layer in range(c.num_layers):

    def add(name: str, shape: tuple[int, ...], ours: str, convert: Any, layer: int = layer) -> None:
      holds = tuple((f"layers/{path}", layer) for path in ours.split())
      found.append(Tensor(f"layer_{layer}/{name}", shape, holds, *convert))

    add("pre_attention_norm/scale", (d,), "pre_attention_norm", _AS_IT_IS)
    if n == k:
      add("attn/qkv_einsum/w", (3, n, d, h), "q k v", _HEADS_FIRST)
    else:
      add("attn/q_einsum/w", (n, d, h), "q", _ONE_HEADS_FIRST)
      add("attn/kv_einsum/w", (2, k, d, h), "k v", _HEADS_FIRST)
    if c.qk_norm:
      add("attn/_query_norm/scale", (h,), "q_norm", _AS_IT_IS)
      add("attn/_key_norm/scale", (h,), "k_norm", _AS_IT_IS)
    add("attn/attn_vec_einsum/w", (n, h, d), "attn_out", _AS_IT_IS)
    if c.post_norms:
      add("post_attention_norm/scale", (d,), "post_attention_norm", _AS_IT_IS)
    add("pre_ffw_norm/scale", (d,), "pre_ffw_norm", _AS_IT_IS)
    if transposed:
      add("mlp/gating_einsum", (2, f, d), "gate up", _STACKED_TRANSPOSED)
    else:
      add("mlp/gating_einsum", (2, d, f), "gate up", _STACKED)
    add("mlp/linear", (f, d), "down", _AS_IT_IS)
    if c.post_norms:
      add("post_ffw_norm/scale", (d,), "post_ffw_norm", _AS_IT_IS)
  return [*found, Tensor("final_norm/scale", (d,), (("final_norm", None),), *_AS_IT_IS)]


# (to_ours, to_theirs) of a Tensor.
_AS_IT_IS = (lambda w: [w], lambda parts: parts[0])
_ONE_HEADS_FIRST = (lambda w_NDH: [w_NDH.swapaxes(0, 1)], lambda parts: parts[0].swapaxes(0, 1))
_HEADS_FIRST = (lambda w_CNDH: list(w_CNDH.swapaxes(1, 2)), lambda parts: np.stack(parts).swapaxes(1, 2))
_STACKED = (list, np.stack)
_STACKED_TRANSPOSED = (lambda w_CFD: list(w_CFD.swapaxes(1, 2)), lambda parts: np.stack(parts).swapaxes(1, 2))


def _released_transposed(config: ModelConfig) -> bool:
  large = [(SIZES[name].num_layers, SIZES[name].embed_dim) for name in ("gemma2_9b", "gemma2_27b")]
  return config.qk_norm or (config.post_norms and (config.num_layers, config.embed_dim) in large)


def _known_size(where: str, found: Mapping[str, tuple[int, ...]], num_layers: int) -> ModelConfig:
  """The entry of the size table with as many layers, the same width and the same norms, and the vocabulary found."""
  vocab_size, embed_dim = found[_EMBEDDING][0], found[_EMBEDDING][-1]
  qk_norm = "layer_0/attn/_query_norm/scale" in found
  post_norms = "layer_0/post_attention_norm/scale" in found
  wanted = (num_layers, embed_dim, qk_norm, post_norms)
  for size in SIZES.values():
    if (size.num_layers, size.embed_dim, size.qk_norm, size.post_norms) == wanted:
      return check_size(where, ModelConfig.from_dict(size.to_dict() | {"vocab_size": vocab_size}))
  family = "Gemma 3" if qk_norm else "Gemma 2" if post_norms else "Gemma 1"
  raise UserError(
    f"{where}: a {family} of {num_layers} layers of width {embed_dim} is in no table of sizes; pass config, a "
    "ModelConfig that tells its windows, soft-caps and RoPE"
  )


def _specs(folder: epath.Path) -> dict[str, dict[str, Any]]:
  """Where tensorstore finds each tensor of an Orbax checkpoint, by the tensor's path in the nested form."""
  folder = _absolute(folder)
  if _UNFINISHED in folder.name:
    raise UserError(f"{folder}: writing it was never finished; give a finished checkpoint, or save it again")
  if not (folder / _INDEX).exists():
    raise UserError(f"{folder}: its index ({_INDEX}) is missing; the folder is incomplete: copy it again")
  try:
    index = json.loads((folder / _INDEX).read_text())
    paths = [tuple(str(part["key"]) for part in tensor["key_metadata"]) for tensor in index["tree_metadata"].values()]
    # Older indices do not have the rest.
    in_database = index.get("use_ocdbt", (folder / _DATABASE).exists())
    driver = "zarr3" if index.get("use_zarr3") else "zarr"
    is_complete = bool(index.get("store_array_data_equal_to_fill_value"))
  except (ValueError, LookupError, TypeError, AttributeError) as e:
    raise UserError(f"{folder / _INDEX}: not an index of Orbax ({_reason(e)}); copy the folder again") from e
  if in_database and not (folder / _DATABASE).exists():
    raise UserError(f"{folder}: {_DATABASE} is missing; the folder is incomplete: copy it again")

  def spec(path: tuple[str, ...]) -> dict[str, Any]:
    stored = ".".join(path) + "/"
    files = _files(folder, "" if in_database else stored)
    kvstore = {"driver": "ocdbt", "base": files, "path": stored} if in_database else files
    # Where the writer left out chunks of zeros, a chunk that is not there is no damage.
    return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": not is_complete}

  return {_name(path): spec(path) for path in paths}


def _files(folder: epath.Path, below: str) -> dict[str, Any]:
  """The folder, or one below it, as a kvstore of tensorstore."""
  where = str(folder)
  if where.startswith("gs://"):
    bucket, _, path = where.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/{below}"}
  return {"driver": "file", "path": f"{where}/{below}"}


def _check_room(path: epath.Path, needed: int) -> None:
  """UserError if the host's memory or a local disk has too little; what Orbax says of a full one is pages long."""
  memory_free = memory.available_host_bytes()
  if memory_free is not None and _COPIES * needed > memory_free:
    raise UserError(
      f"{path}: writing it takes {_COPIES * needed / 2**30:.1f} GiB of memory ({_COPIES} copies of the parameters), "
      f"but the host has {memory_free / 2**30:.1f} GiB free; use bfloat16 parameters, or a larger machine"
    )
  if not str(path).startswith("gs://"):
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if needed > free:
      raise UserError(
        f"{path} takes {needed / 2**30:.1f} GiB, but its disk has {free / 2**30:.1f} GiB free; make room, or write to "
        "another disk"
      )


def _absolute(folder: epath.Path) -> epath.Path:
  return folder if str(folder).startswith("gs://") else epath.Path(os.path.abspath(folder))


def _name(path: tuple[str, ...]) -> str:
  """The path in the nested form of a tensor of either form."""
  name = "/".join(path).removeprefix(_PREFIX)
  mlp = _MLP_FLAT.fullmatch(name)
  return mlp[1] if mlp else name


def _nested_path(name: str) -> tuple[str, ...]:
  return tuple(name.split("/"))


def _flat_path(name: str) -> tuple[str, ...]:
  outer, leaf = (name, "w") if "/mlp/" in name else name.rsplit("/", 1)
  return _PREFIX + outer, leaf


def _result(folder: epath.Path, name: str, future: Any) -> Any:
  try:
    return future.result()
  except (ValueError, OSError) as e:
    raise UserError(
      f"{folder}: tensor {name} cannot be read ({_reason(e)}); the folder is damaged or incomplete: copy it again"
    ) from e


def _reason(error: Exception) -> str:
  # What tensorstore adds in brackets is its own settings.
  return re.split(r" \[\w+='", str(error), maxsplit=1)[0]
