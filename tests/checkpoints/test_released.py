"""The Orbax format of the Flax releases: bit-exact round trips, its forms and sizes, and damaged checkpoints."""

import dataclasses
import json
import math
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from random_params import random_params
from refusals import refused

from genrm_jax.checkpoints import pretrained, released, tensor_map
from genrm_jax.checkpoints.tensor_map import check_size, unstack
from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, get_config
from genrm_jax.runtime import sharding

TINY = get_config("tiny_gemma3", num_layers=2)


def _params(config):
  return random_params(config, norm_std=1.0, std=1.0)


def _load(folder, config):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return pretrained.load(folder, mesh, config=config, param_dtype=config.param_dtype)[0]


def _assert_equal(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


def _nested(params, config):
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


def test_parameters_round_trip_bit_exactly(tmp_path):
  one, two = (get_config(f"tiny_gemma{family}", num_layers=2) for family in (1, 2))
  square = dataclasses.replace(one, ffw_dim=128), dataclasses.replace(TINY, ffw_dim=TINY.embed_dim)
  for i, config in enumerate((dataclasses.replace(one, num_kv_heads=4), two, *square)):
    for nested in (False, True):
      released.save(_params(config), config, tmp_path / f"{i}{nested}", nested=nested)
      _assert_equal(_load(tmp_path / f"{i}{nested}", config), _params(config))


def test_all_storage_formats_are_read_and_prefixes_and_image_encoders_ignored(tmp_path):
  config = dataclasses.replace(TINY, param_dtype="bfloat16")
  for new in (False, True):
    _write(tmp_path / f"c{new}", _nested(_params(config), config), use_ocdbt=new, use_zarr3=new)
    _assert_equal(_load(tmp_path / f"c{new}", config), _params(config))
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


def test_a_missing_chunk_means_zeros_only_if_the_writer_omits_zeros(tmp_path):
  params = _params(TINY)
  _write(tmp_path / "c", _nested(params, TINY), use_ocdbt=False)
  (tmp_path / "c" / "layer_0.mlp.linear" / "0.0").unlink()
  read = pretrained.open_checkpoint(tmp_path / "c", TINY).read
  refused((r"c: tensor layer_0/mlp/linear cannot be read .*0\.0. is missing\)", read, "layer_0/mlp/linear"))
  # As older versions of Orbax wrote it.
  index = json.loads((tmp_path / "c" / "_METADATA").read_text())
  (tmp_path / "c" / "_METADATA").write_text(json.dumps({"tree_metadata": index["tree_metadata"]}))
  assert not pretrained.open_checkpoint(tmp_path / "c", TINY).read("layer_0/mlp/linear").any()


def test_a_size_outside_the_table_needs_a_config_that_fits(saved):
  assert pretrained.open_checkpoint(saved, TINY).config == TINY
  refused((r"whole: a Gemma 3 with 2 layers of width 64 .*pass config", pretrained.open_checkpoint, saved))
  for fields, named in (
    ({"ffw_dim": 96}, r"layer_0/mlp/gating_einsum has shape \(2, 128, 64\), but \(2, 64, 96\)"),
    ({"num_layers": 3}, r"11 tensors .*missing, .* layer_2/"),
    ({"num_layers": 1}, r"11 tensors do not belong .* layer_1/"),
    ({"qk_norm": False}, r"4 tensors do not belong .* layer_0/attn/_key_norm/scale"),
  ):
    refused((named, pretrained.open_checkpoint, saved, dataclasses.replace(TINY, **fields)))


def test_other_trees_and_failed_saves_are_refused(saved, tmp_path):
  _write(tmp_path / "mlp", {"params": {"Dense_0": {"kernel": np.ones((3, 4))}}})
  tree = _nested(_params(TINY), TINY)
  tree["layer_0"]["attn"]["q_einsum"]["lora"] = {"a": np.ones((3, 4))}
  _write(tmp_path / "lora", tree)
  (tmp_path / "file").write_text("")
  unfinished = shutil.copytree(saved, tmp_path / "c.orbax-checkpoint-tmp-17")
  refused(
    ("never finished", pretrained.open_checkpoint, unfinished),
    (r"not a Gemma .*params/Dense_0/kernel", pretrained.open_checkpoint, tmp_path / "mlp"),
    (r"layer_0/attn/q_einsum/lora/a; .*merge adapters", pretrained.open_checkpoint, tmp_path / "lora", TINY),
    ("whole exists", released.save, _params(TINY), TINY, saved),
    ("cannot write .*file/c", released.save, _params(TINY), TINY, tmp_path / "file" / "c"),
  )


def test_layers_are_written_in_place():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  target = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=sharding.replicated(mesh))
  make, write, layer_sharding = tensor_map._stacked(target)
  part = jax.device_put(np.ones((64, 64), np.float32), layer_sharding)
  memory_use = write.lower(make(), part, 1).compile().memory_analysis()
  assert memory_use.alias_size_in_bytes >= 4 * 64 * 64 * 4
  assert memory_use.temp_size_in_bytes < 4 * 64 * 64 * 4


def test_files_of_a_released_size_must_match_it():
  def found(**fields):
    return dataclasses.replace(get_config("gemma3_1b", **fields), name="mine")

  assert check_size("path", found(dtype="bfloat16")) == get_config("gemma3_1b", dtype="bfloat16")
  for fields in ({"num_layers": 25}, {"embed_dim": 1024}, {"qk_norm": False}):
    assert check_size("path", found(**fields)).name == "mine", "an unknown size keeps its name"
  message = "path: .*gemma3_1b, but query_scale is 0.5.*0.0625"
  refused((message, check_size, "path", found(vocab_size=262_208, query_scale=0.5)))
  assert check_size("path", get_config("gemma2_9b", vocab_size=256_000)).vocab_size == 256_000, "as on the hub"
  for name, shape in (("gemma2_9b", (2, 14_336, 3584)), ("gemma2_2b", (2, 2304, 9216))):
    assert {t.shape for t in released.tensors(SIZES[name]) if t.name.endswith("mlp/gating_einsum")} == {shape}
