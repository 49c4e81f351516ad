"""The released layout: bit-equal there and back, its forms and sizes, and what is said of what cannot be read."""

import dataclasses
import json
import math
import shutil
import types

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from genrm_jax.checkpoints import pretrained, released
from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, get_config
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError

TINY = get_config("tiny_gemma3", num_layers=2)


def _params(config):
  """No two numbers are alike, so that whatever is swapped shows."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), config.param_dtype), gemma.param_specs(config))


def _load(folder, config):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return pretrained.load(folder, mesh, config=config, param_dtype=config.param_dtype)[0]


def _assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def _nested(params, config):
  """The tree of the gemma package, from the layout."""
  parts = flax.traverse_util.flatten_dict(params, sep="/")
  found = {}
  for tensor in released.tensors(config):
    ours = [np.asarray(parts[path] if layer is None else parts[path][layer]) for path, layer in tensor.holds]
    found[tensor.name] = tensor.to_theirs(ours)
  return flax.traverse_util.unflatten_dict(found, sep="/")


def _write(folder, tree, **options):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as writer:
    writer.save(folder, args=ocp.args.PyTreeSave(tree))


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_every_parameter_of_a_released_size_is_in_one_place(name):
  config, layout = SIZES[name], released.tensors(SIZES[name])
  assert sum(math.prod(tensor.shape) for tensor in layout) == sum(gemma.num_params(config))
  specs = flax.traverse_util.flatten_dict(gemma.param_specs(config), sep="/")
  expected = [(path, i) for path in specs if path.startswith("layers/") for i in range(config.num_layers)]
  expected += [(path, None) for path in specs if not path.startswith("layers/")]
  held = [place for tensor in layout for place in tensor.holds]
  assert len(held) == len(set(held))
  assert set(held) == set(expected)
  for tensor in layout:
    no_memory = np.broadcast_to(np.float32(0), tensor.shape)
    for part, (path, layer) in zip(tensor.to_ours(no_memory), tensor.holds, strict=True):
      assert part.shape == specs[path].shape[0 if layer is None else 1 :]
      assert part.base is not None, "a copy"


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_a_released_size_is_known_by_its_shapes(name, tmp_path):
  """From an index as old versions of Orbax wrote it, with arrays that say their shapes and hold nothing."""
  index = {}
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "config",
  [
    get_config("tiny_gemma1", num_layers=2),
    get_config("tiny_gemma1", num_layers=2, num_kv_heads=4),
    get_config("tiny_gemma2", num_layers=2),
    TINY,
    dataclasses.replace(TINY, ffw_dim=TINY.embed_dim),
    get_config("tiny_gemma1", num_layers=2, ffw_dim=128),
  ],
  ids=["gemma1_mqa", "gemma1_mha", "gemma2", "gemma3", "gemma3_square", "gemma1_square"],
)
def test_saved_and_loaded_parameters_are_bit_equal(config, dtype, tmp_path):
  config = dataclasses.replace(config, param_dtype=dtype)
  params = _params(config)
  for nested in (False, True):
    released.save(params, config, tmp_path / str(nested), nested=nested)
    _assert_equal(_load(tmp_path / str(nested), config), params)


@pytest.mark.parametrize("name", ["gemma2_9b", "gemma2_2b"])
def test_gemma_2_is_written_as_the_package_has_that_size(name):
  config = SIZES[name]
  (gating,) = [t for t in released.tensors(config) if t.name == "layer_0/mlp/gating_einsum"]
  wide, narrow = config.ffw_dim, config.embed_dim
  assert gating.shape == ((2, wide, narrow) if name == "gemma2_9b" else (2, narrow, wide))


@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_all_file_formats_of_orbax_are_read(use_ocdbt, use_zarr3, tmp_path):
  config = dataclasses.replace(TINY, param_dtype="bfloat16")
  params = _params(config)
  _write(tmp_path / "c", _nested(params, config), use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
  _assert_equal(_load(tmp_path / "c", config), params)


def test_prefixes_and_image_encoders_make_no_difference(tmp_path):
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


def test_a_tensor_is_read_in_the_dtype_of_the_file_and_cast_on_its_way(tmp_path):
  stored = dataclasses.replace(TINY, param_dtype="bfloat16")
  params = _params(stored)
  released.save(params, stored, tmp_path / "c")
  opened = pretrained.open_checkpoint(tmp_path / "c", TINY)
  assert opened.read("layer_1/mlp/linear").dtype == jnp.bfloat16
  np.testing.assert_array_equal(opened.read("layer_1/mlp/linear"), params["layers"]["down"][1])
  _assert_equal(_load(tmp_path / "c", TINY), jax.tree.map(lambda p: p.astype("float32"), params))


def test_a_checkpoint_in_a_bucket_is_asked_of_the_bucket():
  folder = epath.Path("gs://bucket/gemma/2b-it")
  want = {"driver": "gcs", "bucket": "bucket", "path": "gemma/2b-it/transformer.x/"}
  assert released._files(released._absolute(folder), "transformer.x/") == want


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("released") / "whole"
  released.save(_params(TINY), TINY, folder)
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "copy")


def _data_files(folder):
  """Those with the numbers, the largest first."""
  return sorted((folder / "ocdbt.process_0" / "d").iterdir(), key=lambda f: -f.stat().st_size)


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without(name):
  def edit(folder):
    index = json.loads((folder / "_METADATA").read_text())
    del index["tree_metadata"][name]
    (folder / "_METADATA").write_text(json.dumps(index))

  return edit


DAMAGE = {
  "no index": (lambda f: (f / "_METADATA").unlink(), r"index \(_METADATA\) is missing.*copy it again"),
  "index cut": (lambda f: _cut(f / "_METADATA"), "_METADATA: not an index of Orbax.*copy the folder again"),
  "index of lists": (lambda f: (f / "_METADATA").write_text("[]"), "_METADATA: not an index of Orbax"),
  "no database": (lambda f: (f / "manifest.ocdbt").unlink(), "manifest.ocdbt is missing.*copy it again"),
  "database cut": (lambda f: _cut(f / "manifest.ocdbt"), "tensor embedder/input_embedding cannot be read"),
  "no list of arrays": (lambda f: shutil.rmtree(f / "d"), "tensor embedder/input_embedding cannot be read"),
  "a tensor not in the index": (
    _without("('transformer/layer_1/attn/kv_einsum', 'w')"),
    "1 tensors of a tiny_gemma3 are missing, the first is layer_1/attn/kv_einsum/w",
  ),
  "no embedding": (_without("('transformer/embedder', 'input_embedding')"), "not a Gemma 1, 2 or 3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_in_the_index(copy, kind, capfd):
  damage, message = DAMAGE[kind]
  damage(copy)
  with pytest.raises(UserError, match=message) as error:
    pretrained.open_checkpoint(copy, TINY)
  assert str(copy) in str(error.value)
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), _cut], ids=["deleted", "cut"])
def test_a_damaged_data_file_is_an_error_that_names_the_tensor(copy, damage):
  damage(_data_files(copy)[0])
  opened = pretrained.open_checkpoint(copy, TINY)
  failed = []
  for tensor in opened.tensors:
    try:
      opened.read(tensor.name)
    except UserError as e:
      failed.append(tensor.name)
      assert f"{copy}: tensor {tensor.name} cannot be read" in str(e)
      assert "copy it again" in str(e)
  assert failed


def test_a_chunk_that_is_not_there_is_zeros_only_where_the_writer_left_zeros_out(tmp_path):
  params = _params(TINY)
  _write(tmp_path / "c", _nested(params, TINY), use_ocdbt=False)
  (tmp_path / "c" / "layer_0.mlp.linear" / "0.0").unlink()
  with pytest.raises(UserError, match=r"c: tensor layer_0/mlp/linear cannot be read .*0\.0. is missing\)"):
    pretrained.open_checkpoint(tmp_path / "c", TINY).read("layer_0/mlp/linear")
  # As Orbax wrote before it kept such chunks.
  index = json.loads((tmp_path / "c" / "_METADATA").read_text())
  (tmp_path / "c" / "_METADATA").write_text(json.dumps({"tree_metadata": index["tree_metadata"]}))
  assert not pretrained.open_checkpoint(tmp_path / "c", TINY).read("layer_0/mlp/linear").any()


def test_an_unfinished_checkpoint_is_refused(copy):
  unfinished = copy.rename(copy.with_name("c.orbax-checkpoint-tmp-17"))
  with pytest.raises(UserError, match=r"c\.orbax-checkpoint-tmp-17: writing it was never finished"):
    pretrained.open_checkpoint(unfinished, TINY)


def test_a_size_of_no_table_needs_a_config(saved):
  with pytest.raises(UserError, match=r"whole: a Gemma 3 of 2 layers of width 64 is in no table of sizes; pass config"):
    pretrained.open_checkpoint(saved)
  assert pretrained.open_checkpoint(saved, TINY).config == TINY


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"ffw_dim": 96}, r"layer_0/mlp/gating_einsum has shape \(2, 128, 64\), but in a tiny_gemma3 it is \(2, 64, 96\)"),
    ({"vocab_size": 100}, r"embedder/input_embedding has shape \(128, 64\), but in a tiny_gemma3 it is \(100, 64\)"),
    ({"num_layers": 3}, "11 tensors of a tiny_gemma3 are missing, the first is layer_2/"),
    ({"num_layers": 1}, "11 tensors are of no tiny_gemma3, the first is layer_1/"),
    ({"qk_norm": False}, "4 tensors are of no tiny_gemma3, the first is layer_0/attn/_key_norm/scale"),
  ],
)
def test_a_config_that_is_not_of_the_files_is_refused(saved, fields, message):
  with pytest.raises(UserError, match=message):
    pretrained.open_checkpoint(saved, dataclasses.replace(TINY, **fields))


def test_other_trees_are_refused(tmp_path):
  _write(tmp_path / "mlp", {"params": {"Dense_0": {"kernel": np.ones((3, 4))}}})
  with pytest.raises(UserError, match=r"mlp: not a Gemma 1, 2 or 3.*the first is params/Dense_0/kernel"):
    pretrained.open_checkpoint(tmp_path / "mlp")
  tree = _nested(_params(TINY), TINY)
  tree["layer_0"]["attn"]["q_einsum"]["lora"] = {"a": np.ones((3, 4))}
  _write(tmp_path / "lora", tree)
  with pytest.raises(UserError, match=r"the first is layer_0/attn/q_einsum/lora/a; .*merge adapters \(LoRA\)"):
    pretrained.open_checkpoint(tmp_path / "lora", TINY)


def test_saving_where_it_cannot_be_is_an_error(saved, tmp_path, monkeypatch):
  params = _params(TINY)
  with pytest.raises(UserError, match=r"whole exists; give the name of a new folder"):
    released.save(params, TINY, saved)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"cannot write .*file/c: .*check the folder"):
    released.save(params, TINY, tmp_path / "file" / "c")
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"c takes 0\.0 GiB, but its disk has 0\.0 GiB free; make room"):
      released.save(params, TINY, tmp_path / "c")
  monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
  with pytest.raises(
    UserError, match=r"c: writing it takes .* \(3 copies of the parameters\), but the host has 0.0 GiB free"
  ):
    released.save(params, TINY, tmp_path / "c")
