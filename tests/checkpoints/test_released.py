"""The Orbax format of the Flax releases: bit-exact round trips, its forms and sizes, and damaged checkpoints."""

import dataclasses
import json
import math
import shutil

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from random_params import random_params

from genrm_jax.checkpoints import pretrained, released
from genrm_jax.checkpoints.tensor_map import unstack
from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, get_config
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

TINY = get_config("tiny_gemma3", num_layers=2)


def _params(config):
  return random_params(config, norm_std=1.0, std=1.0)


def _load(folder, config):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return pretrained.load(folder, mesh, config=config, param_dtype=config.param_dtype)[0]


def _assert_equal(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


def _nested(params, config):
  """The tree of the gemma package's model code."""
  tensors = unstack(params, released.tensors(config))
  return flax.traverse_util.unflatten_dict(dict(tensors), sep="/")


def _write(folder, tree, **options):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as writer:
    writer.save(folder, args=ocp.args.PyTreeSave(tree))


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_released_sizes_are_recognised_by_their_shapes(name, tmp_path):
  """From the index of an old version of Orbax, with arrays that have shapes and no data."""
  index = {}
  assert sum(math.prod(tensor.shape) for tensor in released.tensors(SIZES[name])) == sum(gemma.num_params(SIZES[name]))
  for tensor in released.tensors(SIZES[name]):
    outer, leaf = (tensor.name, "w") if "/mlp/" in tensor.name else tensor.name.rsplit("/", 1)
    keys = (f"transformer/{outer}", leaf)
    index[str(keys)] = {"key_metadata": [{"key": key, "key_type": 2} for key in keys]}
    array = {"zarr_format": 2, "shape": tensor.shape, "chunks": tensor.shape, "dtype": "bfloat16", "order": "C"}
    array |= {"compressor": None, "fill_value": None, "filters": None, "dimension_separator": "."}
    folder = tmp_path / ".".join(keys)
    folder.mkdir(parents=True)
    (folder / ".zarray").write_text(json.dumps(array))
  (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": index}))
  opened = pretrained.open_checkpoint(tmp_path)
  assert opened.config == SIZES[name]
  assert [t.name for t in opened.tensors] == [t.name for t in released.tensors(SIZES[name])]


@pytest.mark.parametrize(
  "config",
  [
    get_config("tiny_gemma1", num_layers=2, num_kv_heads=4),
    get_config("tiny_gemma2", num_layers=2),
    dataclasses.replace(TINY, ffw_dim=TINY.embed_dim),
    get_config("tiny_gemma1", num_layers=2, ffw_dim=128),
  ],
  ids=["gemma1_mha", "gemma2", "gemma3_square", "gemma1_square"],
)
def test_parameters_round_trip_bit_exactly(config, tmp_path):
  params = _params(config)
  for nested in (False, True):
    released.save(params, config, tmp_path / str(nested), nested=nested)
    _assert_equal(_load(tmp_path / str(nested), config), params)


def test_the_order_of_axes_depends_on_the_size_of_gemma_2():
  for name, shape in (("gemma2_9b", (2, 14_336, 3584)), ("gemma2_2b", (2, 2304, 9216))):
    assert {t.shape for t in released.tensors(SIZES[name]) if t.name.endswith("mlp/gating_einsum")} == {shape}


@pytest.mark.parametrize(("use_ocdbt", "use_zarr3"), [(False, False), (True, True)])
def test_all_storage_formats_of_orbax_are_read(use_ocdbt, use_zarr3, tmp_path):
  config = dataclasses.replace(TINY, param_dtype="bfloat16")
  params = _params(config)
  _write(tmp_path / "c", _nested(params, config), use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
  _assert_equal(_load(tmp_path / "c", config), params)


def test_prefixes_and_image_encoders_are_ignored(tmp_path):
  params = _params(TINY)
  tree = _nested(params, TINY)
  image = np.ones((3, 4), np.float32)
  tree["embedder"] |= {"mm_input_projection": {"w": image}, "mm_soft_embedding_norm": {"scale": image[0]}}
  _write(tmp_path / "nested", tree | {"vision_encoder": {"siglip_encoder": {"kernel": image}}})
  _write(tmp_path / "prefixed", {"transformer": tree, "SigLiPFromPatches_0": {"siglip_encoder": {"kernel": image}}})
  bare = {name.rpartition("/"): leaf for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}
  _write(tmp_path / "bare", flax.traverse_util.unflatten_dict({(a, c): leaf for (a, _, c), leaf in bare.items()}))
  for form in ("nested", "prefixed", "bare"):
    _assert_equal(_load(tmp_path / form, TINY), params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("released") / "whole"
  released.save(_params(TINY), TINY, folder)
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "copy")


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without(name):
  def edit(folder):
    index = json.loads((folder / "_METADATA").read_text())
    del index["tree_metadata"][name]
    (folder / "_METADATA").write_text(json.dumps(index))

  return edit


DAMAGE = {
  "no index": (lambda f: (f / "_METADATA").unlink(), "_METADATA.*missing"),
  "index truncated": (lambda f: _cut(f / "_METADATA"), "not an Orbax index"),
  "no database": (lambda f: (f / "manifest.ocdbt").unlink(), "manifest.ocdbt is missing"),
  "database truncated": (lambda f: _cut(f / "manifest.ocdbt"), "embedder/input_embedding cannot be read"),
  "no kv_einsum": (_without("('transformer/layer_1/attn/kv_einsum', 'w')"), "missing, .*layer_1/attn/kv_einsum/w"),
  "no embedding": (_without("('transformer/embedder', 'input_embedding')"), "not a Gemma"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_on_opening(copy, kind, capfd):
  damage, message = DAMAGE[kind]
  damage(copy)
  with pytest.raises(UserError, match=message) as error:
    pretrained.open_checkpoint(copy, TINY)
  assert str(copy) in str(error.value)
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), _cut], ids=["deleted", "cut"])
def test_damaged_data_files_are_errors_that_name_the_tensor(copy, damage):
  damage(max((copy / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size))
  opened = pretrained.open_checkpoint(copy, TINY)
  with pytest.raises(UserError, match=rf"{copy}: tensor .* cannot be read.*copy it again") as error:
    for tensor in opened.tensors:
      opened.read(tensor.name)
  assert tensor.name in str(error.value)


def test_a_missing_chunk_means_zeros_only_if_the_writer_omits_zeros(tmp_path):
  params = _params(TINY)
  _write(tmp_path / "c", _nested(params, TINY), use_ocdbt=False)
  (tmp_path / "c" / "layer_0.mlp.linear" / "0.0").unlink()
  with pytest.raises(UserError, match=r"c: tensor layer_0/mlp/linear cannot be read .*0\.0. is missing\)"):
    pretrained.open_checkpoint(tmp_path / "c", TINY).read("layer_0/mlp/linear")
  # As older versions of Orbax wrote it.
  index = json.loads((tmp_path / "c" / "_METADATA").read_text())
  (tmp_path / "c" / "_METADATA").write_text(json.dumps({"tree_metadata": index["tree_metadata"]}))
  assert not pretrained.open_checkpoint(tmp_path / "c", TINY).read("layer_0/mlp/linear").any()


def test_a_size_outside_the_table_needs_a_config_that_fits(saved):
  with pytest.raises(UserError, match=r"whole: a Gemma 3 with 2 layers of width 64 .*pass config"):
    pretrained.open_checkpoint(saved)
  assert pretrained.open_checkpoint(saved, TINY).config == TINY
  for fields, named in (
    ({"ffw_dim": 96}, r"layer_0/mlp/gating_einsum has shape \(2, 128, 64\), but \(2, 64, 96\)"),
    ({"num_layers": 3}, r"11 tensors .*missing, .* layer_2/"),
    ({"num_layers": 1}, r"11 tensors do not belong .* layer_1/"),
    ({"qk_norm": False}, r"4 tensors do not belong .* layer_0/attn/_key_norm/scale"),
  ):
    with pytest.raises(UserError, match=named):
      pretrained.open_checkpoint(saved, dataclasses.replace(TINY, **fields))


def test_unfinished_checkpoints_and_other_trees_are_refused(copy, tmp_path):
  with pytest.raises(UserError, match="never finished"):
    pretrained.open_checkpoint(copy.rename(copy.with_name("c.orbax-checkpoint-tmp-17")), TINY)
  _write(tmp_path / "mlp", {"params": {"Dense_0": {"kernel": np.ones((3, 4))}}})
  with pytest.raises(UserError, match=r"not a Gemma .*params/Dense_0/kernel"):
    pretrained.open_checkpoint(tmp_path / "mlp")
  tree = _nested(_params(TINY), TINY)
  tree["layer_0"]["attn"]["q_einsum"]["lora"] = {"a": np.ones((3, 4))}
  _write(tmp_path / "lora", tree)
  with pytest.raises(UserError, match=r"layer_0/attn/q_einsum/lora/a; .*merge adapters"):
    pretrained.open_checkpoint(tmp_path / "lora", TINY)


def test_failed_saves_are_errors(saved, tmp_path):
  (tmp_path / "file").write_text("")
  for folder, message in ((saved, "whole exists"), (tmp_path / "file" / "c", "cannot write .*file/c")):
    with pytest.raises(UserError, match=message):
      released.save(_params(TINY), TINY, folder)
