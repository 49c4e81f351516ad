"""Models of the Hugging Face hub, through `huggingface_hub` (an extra), with its token and its cache."""

import os
import pathlib
import shutil
import uuid

from genrm_jax.checkpoints import hugging_face_config
from genrm_jax.checkpoints.hugging_face import read_json
from genrm_jax.runtime.errors import UserError

_CONFIG = "config.json"
_FILES = (_CONFIG, "*.safetensors", "*.safetensors.index.json", "tokenizer.model")


def download(name: str, views: pathlib.Path) -> pathlib.Path:
  """The folder of a model, with the files that this library reads and no others.

  What the cache holds is not downloaded again. The configuration comes first, so a model that cannot be read is refused
  before its weights are downloaded.

  Args:
    name: "ORG/NAME".
    views: where to make the folder, of links into the cache of `huggingface_hub`, which may hold other files of the
      model, too.

  Raises:
    UserError: the package is missing; the hub does not know the model, does not give it to this user, or cannot be
      reached; the model is none that can be read; the disk is full.
  """
  try:
    import huggingface_hub
    from huggingface_hub import constants, errors
  except ImportError as e:
    raise UserError(
      f"{name}: no such folder here. If it is a model of the Hugging Face hub, downloading needs an optional package: "
      "pip install 'genrm-jax[hub]'"
    ) from e
  try:
    config = pathlib.Path(huggingface_hub.hf_hub_download(name, _CONFIG))
    hugging_face_config.from_json(f"{name} on the hub: {_CONFIG}", read_json(config), name)
    snapshot, revision = config.parent, config.parent.name
    try:
      wanted = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*_FILES], dry_run=True)
    except errors.DryRunError:  # the hub is out of reach: what is in the cache has to do
      wanted = []
    _check(name, wanted, pathlib.Path(constants.HF_HUB_CACHE))
    huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*_FILES])
  except errors.GatedRepoError as e:
    raise UserError(
      f"{name}: the hub gives this model only to those who have accepted its licence; accept it at "
      f"{_page(constants.ENDPOINT, name)}, and log in with `hf auth login` or set HF_TOKEN"
    ) from e
  except errors.RepositoryNotFoundError as e:
    raise UserError(
      f"{name}: no such folder here, and no such model on the hub ({constants.ENDPOINT}), or it is private; check the "
      "name, or log in with `hf auth login` or HF_TOKEN"
    ) from e
  except errors.LocalEntryNotFoundError as e:
    raise UserError(
      f"{name}: the hub ({constants.ENDPOINT}) cannot be reached and the model is not in its cache "
      f"({constants.HF_HUB_CACHE}); check the network and HF_HUB_OFFLINE, or give the path of a folder"
    ) from e
  except errors.EntryNotFoundError as e:
    raise UserError(
      f"{name} on the hub has no {_CONFIG}, so it is no model in Hugging Face's layout; give one, or download a .gguf "
      "file of it and give its path"
    ) from e
  except Exception as e:  # its HTTP library has changed, and with it the exceptions
    if isinstance(e, UserError):
      raise
    why = " ".join(str(e).split())[:300] or type(e).__name__
    raise UserError(f"{name} could not be downloaded from the hub ({why}); check the network and try again") from e
  return _view(snapshot, views / name.replace("/", "--") / revision)


def _page(endpoint: str, name: str) -> str:
  return f"{endpoint}/{name}"


def _check(name: str, wanted: list, cache: pathlib.Path) -> None:
  """Raises UserError if there is nothing to load, or no room for what is not in the cache."""
  if wanted and not any(file.filename.endswith(".safetensors") for file in wanted):
    raise UserError(f"{name} on the hub has no *.safetensors; give a model that has, or the path of a .gguf file")
  size = sum(file.file_size or 0 for file in wanted if file.will_download)
  free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
  if size > free:
    raise UserError(
      f"{name} takes {size / 2**30:.1f} GiB, but the disk of {cache} has {free / 2**30:.1f} GiB free; make room, or "
      "set HF_HUB_CACHE to a folder on another disk"
    )


def _view(snapshot: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """A folder of links to the files of a snapshot that this library reads: its content says what the model is."""
  paths = {path.name: path for pattern in _FILES for path in snapshot.glob(pattern)}
  if folder.exists() and {path.name for path in folder.iterdir() if path.exists()} == set(paths):
    return folder
  new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
  try:
    new.mkdir(parents=True)
    for file, path in paths.items():
      (new / file).symlink_to(path.resolve())
    if folder.exists():
      shutil.rmtree(folder)
    os.rename(new, folder)
  except OSError as e:
    shutil.rmtree(new, ignore_errors=True)
    if not folder.exists():  # else another process was first
      raise UserError(
        f"{folder} could not be made: {e.strerror or e}; set GENRM_JAX_CACHE to a folder that can be written"
      ) from e
  return folder
