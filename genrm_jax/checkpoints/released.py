"""Reads and writes Gemma checkpoints in the Orbax format of the Flax releases.

A checkpoint is a tree in one of two forms, with the same tensors:

    flat     {"transformer/layer_0/mlp/linear": {"w": F D}, "transformer/layer_0/attn/q_einsum": {"w": N D H}, ...}
    nested   {"layer_0": {"mlp": {"linear": F D}, "attn": {"q_einsum": {"w": N D H}, ...}}, ...}

The releases are flat; the model code of the `gemma` package works with the nested form. This module names a tensor by
its path in the nested form. It ignores the image encoder of Gemma 3 4B and above, and its projection.

Names and shapes follow the package's model code (google-deepmind/gemma 4.0.1, gm/nn and gm/ckpts).

Tensors are read by tensorstore, at the paths in Orbax's index: so each is read on its own, and a damaged one can be
named.
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

from genrm_jax.checkpoints.tensor_map import CheckpointReader, Tensor, check_shapes, check_size, tokenizer_in, unstack
from genrm_jax.model import gemma
from genrm_jax.model.config import SIZES, ModelConfig
from genrm_jax.runtime import memory
from genrm_jax.runtime.errors import UserError

_INDEX = "_METADATA"
_DATABASE = "manifest.ocdbt"
_UNFINISHED = ".orbax-checkpoint-tmp"
_COPIES = 3  # of the parameters on the host while Orbax saves them, as measured
_PREFIX = "transformer/"
_EMBEDDING = "embedder/input_embedding"
_IMAGES = re.compile(r"SigLiPFromPatches_0/|vision_encoder/|embedder/mm_")
_LAYER = re.compile(r"layer_(\d+)/")
_MLP_FLAT = re.compile(r"(.*/mlp/(?:gating_einsum|linear))/w")


def is_folder(folder: epath.Path) -> bool:
  """Whether it is an Orbax checkpoint, also an unfinished one or one without its index."""
  return _UNFINISHED in folder.name or any((folder / name).exists() for name in (_INDEX, _DATABASE))


def open_folder(folder: epath.Path, config: ModelConfig | None = None) -> CheckpointReader:
  """Reads and validates the index and the shapes of a checkpoint, flat or nested.

  Args:
    folder: local or gs://.
    config: the model, if its size is not in the table. The files show shapes and norms, but not soft-caps, windows,
      RoPE and the scale of queries.

  Raises:
    UserError: the checkpoint is unfinished, damaged or not a Gemma; its size is unknown and `config` is None; or it
      does not fit `config`.
  """
  specs = {name: spec for name, spec in _specs(folder).items() if not _IMAGES.match(name)}
  layers = [int(match[1]) for match in map(_LAYER.match, specs) if match]
  if _EMBEDDING not in specs or not layers:
    raise UserError(
      f"{folder}: not a Gemma 1, 2 or 3: no {_EMBEDDING} and layer_0 among its {len(specs)} tensors (the first is "
      f"{next(iter(specs), 'none')}); give the folder of a checkpoint released for Flax"
    )
  stores = {name: tensorstore.open(spec, open=True, read=True) for name, spec in specs.items()}
  found = {name: tuple(_result(folder, name, store).shape) for name, store in stores.items()}
  if config is None:
    config = _known_size(str(folder), found, 1 + max(layers))
  gating = found.get("layer_0/mlp/gating_einsum", ())
  # Where D == F, both orders of the axes have the same shape, and the family decides.
  by_shape = None if config.embed_dim == config.ffw_dim else gating[1:] == (config.ffw_dim, config.embed_dim)
  named = tensors(config, by_shape)
  check_shapes(str(folder), found, named, config)
  unknown = sorted(set(found) - {tensor.name for tensor in named})
  if unknown:
    raise UserError(
      f"{folder}: {len(unknown)} tensors do not belong to {config.name}, the first is {unknown[0]}; give the config of "
      "these files, and merge adapters (LoRA) into the weights first"
    )

  def read(name: str) -> np.ndarray:
    return _result(folder, name, stores[name].result().read())

  # As released, it is beside the folder.
  return CheckpointReader(str(folder), config, named, read, tokenizer_in(folder, folder.parent))


def save(params: gemma.Params, config: ModelConfig, folder: str | os.PathLike[str], nested: bool = False) -> None:
  """Writes parameters, in their own dtype, as a checkpoint that the `gemma` package loads.

  Orbax saves whole trees: the host holds the tree, Orbax's copy of it and the compressed output, together three times
  the size of the parameters.

  Args:
    params: as `gemma.param_specs` declares them.
    config: their model.
    folder: a new one, local or gs://.
    nested: write the nested form instead of the flat one.

  Raises:
    UserError: the folder exists or cannot be written, or memory or disk space is too small.
  """
  path = _absolute(epath.Path(folder))
  if path.exists():
    raise UserError(f"{path} exists; give the name of a new folder")
  _check_room(path, sum(p.nbytes for p in jax.tree.leaves(params)))
  in_tree = _nested_path if nested else _flat_path
  tree = flax.traverse_util.unflatten_dict({in_tree(name): array for name, array in unstack(params, tensors(config))})
  try:
    # Not StandardCheckpointer, whose threads keep the process alive for minutes after a failure.
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
      writer.save(path, args=ocp.args.StandardSave(tree))
  except (OSError, ValueError) as e:
    # TensorStore reports errors of the operating system as ValueError.
    if isinstance(e, ValueError) and "os_error_code" not in str(e):
      raise
    raise UserError(f"cannot write {path}: {_reason(e)}; check the folder and the space on the disk") from e


def tensors(config: ModelConfig, transposed: bool | None = None) -> list[Tensor]:
  """The text tensors of a checkpoint of this model.

  Args:
    config: the model.
    transposed: whether gate and up weights are F D instead of D F. None means as released: F D for Gemma 2 9B and 27B
      and for Gemma 3, D F for all others, which is also the package's default for Gemma 2.
  """
  c = config
  d, f, n, k, h = c.embed_dim, c.ffw_dim, c.num_heads, c.num_kv_heads, c.head_dim
  transposed = _released_transposed(c) if transposed is None else transposed
  found = [Tensor(_EMBEDDING, (c.vocab_size, d), ((_EMBEDDING, None),), *_UNCHANGED)]
  for layer in range(c.num_layers):

    def add(name: str, shape: tuple[int, ...], params: str, convert: Any, layer: int = layer) -> None:
      holds = tuple((f"layers/{path}", layer) for path in params.split())
      found.append(Tensor(f"layer_{layer}/{name}", shape, holds, *convert))

    add("pre_attention_norm/scale", (d,), "pre_attention_norm", _UNCHANGED)
    if n == k:
      add("attn/qkv_einsum/w", (3, n, d, h), "q k v", _HEADS_FIRST)
    else:
      add("attn/q_einsum/w", (n, d, h), "q", _ONE_HEADS_FIRST)
      add("attn/kv_einsum/w", (2, k, d, h), "k v", _HEADS_FIRST)
    if c.qk_norm:
      add("attn/_query_norm/scale", (h,), "q_norm", _UNCHANGED)
      add("attn/_key_norm/scale", (h,), "k_norm", _UNCHANGED)
    add("attn/attn_vec_einsum/w", (n, h, d), "attn_out", _UNCHANGED)
    if c.post_norms:
      add("post_attention_norm/scale", (d,), "post_attention_norm", _UNCHANGED)
    add("pre_ffw_norm/scale", (d,), "pre_ffw_norm", _UNCHANGED)
    if transposed:
      add("mlp/gating_einsum", (2, f, d), "gate up", _STACKED_TRANSPOSED)
    else:
      add("mlp/gating_einsum", (2, d, f), "gate up", _STACKED)
    add("mlp/linear", (f, d), "down", _UNCHANGED)
    if c.post_norms:
      add("post_ffw_norm/scale", (d,), "post_ffw_norm", _UNCHANGED)
  return [*found, Tensor("final_norm/scale", (d,), (("final_norm", None),), *_UNCHANGED)]


# (to_params, from_params) of a Tensor.
_UNCHANGED = (lambda w: [w], lambda parts: parts[0])
_ONE_HEADS_FIRST = (lambda w_NDH: [w_NDH.swapaxes(0, 1)], lambda parts: parts[0].swapaxes(0, 1))
_HEADS_FIRST = (lambda w_CNDH: list(w_CNDH.swapaxes(1, 2)), lambda parts: np.stack(parts).swapaxes(1, 2))
_STACKED = (list, np.stack)
_STACKED_TRANSPOSED = (lambda w_CFD: list(w_CFD.swapaxes(1, 2)), lambda parts: np.stack(parts).swapaxes(1, 2))


def _released_transposed(config: ModelConfig) -> bool:
  large = [(SIZES[name].num_layers, SIZES[name].embed_dim) for name in ("gemma2_9b", "gemma2_27b")]
  return config.qk_norm or (config.post_norms and (config.num_layers, config.embed_dim) in large)


def _known_size(where: str, found: Mapping[str, tuple[int, ...]], num_layers: int) -> ModelConfig:
  """The released size with this depth, width and kinds of norms, with the vocabulary size of the files."""
  vocab_size, embed_dim = found[_EMBEDDING][0], found[_EMBEDDING][-1]
  qk_norm = "layer_0/attn/_query_norm/scale" in found
  post_norms = "layer_0/post_attention_norm/scale" in found
  wanted = (num_layers, embed_dim, qk_norm, post_norms)
  for size in SIZES.values():
    if (size.num_layers, size.embed_dim, size.qk_norm, size.post_norms) == wanted:
      return check_size(where, ModelConfig.from_dict(size.to_dict() | {"vocab_size": vocab_size}))
  family = "Gemma 3" if qk_norm else "Gemma 2" if post_norms else "Gemma 1"
  raise UserError(
    f"{where}: a {family} with {num_layers} layers of width {embed_dim} is no released size; pass config, a "
    "ModelConfig with its windows, soft-caps and RoPE"
  )


def _specs(folder: epath.Path) -> dict[str, dict[str, Any]]:
  """The tensorstore spec of each tensor of an Orbax checkpoint, by the tensor's path in the nested form."""
  folder = _absolute(folder)
  if _UNFINISHED in folder.name:
    raise UserError(f"{folder}: this checkpoint was never finished; give a finished one, or save it again")
  if not (folder / _INDEX).exists():
    raise UserError(f"{folder}: its index ({_INDEX}) is missing; the folder is incomplete: copy it again")
  try:
    index = json.loads((folder / _INDEX).read_text())
    paths = [tuple(str(part["key"]) for part in tensor["key_metadata"]) for tensor in index["tree_metadata"].values()]
    # Older indices lack the other fields.
    in_database = index.get("use_ocdbt", (folder / _DATABASE).exists())
    driver = "zarr3" if index.get("use_zarr3") else "zarr"
    is_complete = bool(index.get("store_array_data_equal_to_fill_value"))
  except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f"{folder / _INDEX}: not an Orbax index ({_reason(e)}); copy the folder again") from e
  outside = ["/".join(path) for path in paths if ".." in "/".join(path).split("/")]
  if outside:
    raise UserError(f"{folder / _INDEX}: tensor {outside[0]!r} is outside of the folder; copy the folder again")
  if in_database and not (folder / _DATABASE).exists():
    raise UserError(f"{folder}: {_DATABASE} is missing; the folder is incomplete: copy it again")

  def spec(path: tuple[str, ...]) -> dict[str, Any]:
    stored = ".".join(path) + "/"
    files = _files(folder, "" if in_database else stored)
    kvstore = {"driver": "ocdbt", "base": files, "path": stored} if in_database else files
    # Writers may leave out chunks of zeros; there a missing chunk is no damage.
    return {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": not is_complete}

  return {_name(path): spec(path) for path in paths}


def _files(folder: epath.Path, below: str) -> dict[str, Any]:
  """A tensorstore kvstore for the folder, or for a path below it."""
  where = str(folder)
  if where.startswith("gs://"):
    bucket, _, path = where.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/{below}"}
  return {"driver": "file", "path": f"{where}/{below}"}


def _check_room(path: epath.Path, needed: int) -> None:
  """Raises UserError if memory or a local disk is too small; Orbax's own message for a full disk is pages long."""
  memory_free = memory.available_host_bytes()
  if memory_free is not None and _COPIES * needed > memory_free:
    raise UserError(
      f"{path}: writing takes {_COPIES * needed / 2**30:.1f} GiB of memory ({_COPIES} copies of the parameters), but "
      f"the host has {memory_free / 2**30:.1f} GiB free; use bfloat16 parameters, or a larger machine"
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
  """A tensor's path in the nested form, from its path in either form."""
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
  # tensorstore appends its settings in brackets.
  return re.split(r" \[\w+='", str(error), maxsplit=1)[0]
