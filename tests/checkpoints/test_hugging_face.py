"""Hugging Face folders: released configurations, bit-exact round trips, and one message per bad input."""

import json

import hugging_face as peer
import jax
import make_goldens
import numpy as np
import pytest
from etils import epath
from random_params import random_params
from refusals import refused

from genrm_jax.checkpoints import hugging_face, hugging_face_config, pretrained, safetensors, tensor_map
from genrm_jax.model import lora
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig, get_config
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

# The fields of the released config.json files that decide the model; those with an image encoder list only what differs
# from the defaults of the text model.
RELEASED = json.loads((make_goldens.GOLDENS / "released_configs.json").read_text())
CONFIG = get_config("tiny_gemma2", num_layers=2, embed_dim=24, ffw_dim=40)
TABLE, FILE = "model.embed_tokens.weight", "model.safetensors"


def _parse(fields, name="model"):
  return hugging_face_config.from_json("config.json", fields, name)


def _load(folder, **options):
  return pretrained.load(folder, sharding.make_mesh(devices=jax.devices()[:1]), **options)


def _bytes_of(folder):
  found = {}
  for path in epath.Path(folder).glob("*.safetensors"):
    for name, entry in safetensors.read_index(path).items():
      found[name] = entry.dtype, entry.shape, safetensors.read_bytes(path, entry.begin, entry.end)
  return found


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_match_the_size_table(name):
  config, published = tensor_map.check_size("path", _parse(RELEASED[name])), PUBLISHED_COUNTS[name]
  assert config == get_config(name, vocab_size=published.hub_vocab)
  for rows in (-1000, 2, 64, 1000):  # a vocabulary that was cut, or has tokens of a fine-tuning
    fields = hugging_face_config.to_json(config, dtype="float32", bos_id=2, eos_id=1, pad_id=0)
    fields["vocab_size"] = config.vocab_size + rows
    assert tensor_map.check_size("path", _parse(fields)) == get_config(name, vocab_size=config.vocab_size + rows)
  count = sum(int(np.prod(tensor.shape)) for tensor in hugging_face.tensors(config, "model."))
  has_images = "text_config" in RELEASED[name]
  assert count < published.hub_total if has_images else count == published.hub_total


_MINIMAL = {family: {"model_type": family} for family in hugging_face_config.ARCHITECTURES}


@pytest.mark.parametrize("fields", [*RELEASED.values(), *_MINIMAL.values()], ids=[*RELEASED, *_MINIMAL])
def test_absent_keys_have_the_defaults_of_transformers(fields):
  transformers = pytest.importorskip("transformers")
  filled = transformers.AutoConfig.for_model(**fields).to_dict()
  assert fields in _MINIMAL.values() or "rope_parameters" in filled.get("text_config", filled)
  assert _parse(filled) == _parse(fields)


@pytest.mark.parametrize("name", SIZES)
def test_configurations_round_trip(name):
  fields = hugging_face_config.to_json(SIZES[name], dtype="float32", bos_id=2, eos_id=1, pad_id=0)
  fields = json.loads(json.dumps(fields))
  assert _parse(fields, name) == SIZES[name]
  # Layer kinds also follow from sliding_window_pattern or the family, and so does the RoPE base.
  del fields["layer_types" if "layer_types" in fields else "rope_theta"]
  assert _parse(fields, name) == SIZES[name]


@pytest.mark.parametrize(
  ("name", "overrides", "field"),
  [
    ("tiny_gemma1", {"final_softcap": 30.0}, "final_softcap"),
    ("tiny_gemma2", {"rope_base_global": 1e6}, "rope_base_local"),
    ("tiny_gemma3", {"post_norms": False}, "post_norms"),
  ],
)
def test_models_that_the_format_cannot_express(name, overrides, field, tmp_path):
  config = get_config(name, **overrides)
  refused((rf"{name}: ({field}) = .* no place", hugging_face.save, random_params(config), config, tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "dtype"), [("tiny_gemma1", "float32"), ("tiny_gemma2", "bfloat16"), ("tiny_gemma3", "float32")]
)
def test_parameters_round_trip_bit_exactly(name, dtype, tmp_path):
  config = get_config(name, num_layers=3, embed_dim=24, ffw_dim=40, param_dtype=dtype)
  params = random_params(config)
  hugging_face.save(params, config, tmp_path / "model", max_shard_bytes=20_000)
  assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
  again, loaded = _load(tmp_path / "model", param_dtype=dtype)
  assert loaded.layer_kinds == config.layer_kinds
  assert loaded == ModelConfig.from_dict(config.to_dict() | {"name": "model", "pattern": loaded.pattern})
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {dtype}


@pytest.mark.parametrize("case", peer.CASES)
def test_files_of_transformers_round_trip_bit_exactly_through_a_mesh(case, tmp_path):
  checkpoint = make_goldens.GOLDENS / case / "checkpoint"
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params, config = pretrained.load(checkpoint, mesh, param_dtype=peer.CASES[case][2])
  hugging_face.save(params, config, tmp_path)
  held, images = _bytes_of(checkpoint), ("vision_tower", "multi_modal_projector")
  want = {name.removeprefix("language_model."): held[name] for name in held if not name.startswith(images)}
  assert _bytes_of(tmp_path) == want


@pytest.fixture
def folder(tmp_path):
  hugging_face.save(random_params(CONFIG), CONFIG, tmp_path / "model")
  return tmp_path / "model"


def _rewrite(folder, change):
  path = epath.Path(folder / FILE)
  tensors = {name: safetensors.read_tensor(path, entry) for name, entry in safetensors.read_index(path).items()}
  path.unlink()
  changed = change(tensors)
  shapes = [(name, t.dtype, t.shape) for name, t in changed.items()]
  with safetensors.new_files(epath.Path(folder)) as create:
    safetensors.write(create, changed.items(), shapes, 10**9)


def _configure(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_names_of_all_exports_are_read(folder, prefix):
  want, _ = _load(folder)
  want_table = np.asarray(want["embedder"]["input_embedding"])

  def rename_without_head(tensors, head):
    return {name: t for name, t in tensors.items() if "lm_head" not in name} | head

  def rename(tensors):
    renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    extra = {"lm_head.weight": tensors[TABLE], "vision_tower.layers.0.bias": np.zeros(3, np.float32)}
    return renamed | extra | {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}

  _rewrite(folder, rename)
  jax.tree.map(np.testing.assert_array_equal, _load(folder)[0], want)
  # A separate output layer, which transformers uses whatever tie_word_embeddings says.
  for head in ("lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight"):
    for change in (lambda t: t + 1, lambda t: t[:-1], lambda t: np.append(t[:-1], t[-1:] + 1, 0), lambda t: t * np.nan):
      _rewrite(folder, lambda tensors, f=change, head=head: rename_without_head(tensors, {head: f(want_table)}))
      for tied in (None, True, False):
        _configure(folder, tie_word_embeddings=tied)
        _refused(folder, rf"{head} is not the embedding \({prefix}embed_tokens.weight\).*delete {head}")
  _rewrite(folder, lambda tensors: rename_without_head(tensors, {}))
  _refused(folder, "tie_word_embeddings is false, but there is no lm_head.weight")


def test_parameters_are_cast_and_sharded_as_the_caller_says(tmp_path):
  config = get_config("tiny_gemma2", num_layers=2, num_kv_heads=4)
  hugging_face.save(random_params(config), config, tmp_path)
  mesh, rules = sharding.make_mesh(fsdp=2, tensor=4), {"embed": None, "ffw": ["tensor", "fsdp"]}
  params, loaded = pretrained.load(tmp_path, mesh, sharding=rules, param_dtype="bfloat16")
  assert tuple(params["layers"]["gate"].sharding.spec) == (None, None, ("tensor", "fsdp"))
  assert loaded.rules["ffw"] == ("tensor", "fsdp") and params["layers"]["gate"].dtype == "bfloat16"


def _refused(folder, message):
  """The message comes when the folder is opened, before a tensor is read, and names the folder."""
  with pytest.raises(UserError, match=message) as caught:
    pretrained.open_checkpoint(folder)
  assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    ({"model_type": "llama"}, "llama.*gemma2"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"hidden_activation": "gelu"}, "hidden_activation.*gelu_pytorch_tanh"),
    ({"attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "sliding layers is scaled"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"vocab_size": 100}, rf"{TABLE} .*\(128, 24\).*\(100, 24\)"),
    ({"num_hidden_layers": 3, "layer_types": None}, r"11 tensors .*missing.* model.layers.2."),
    ({"num_hidden_layers": 1, "layer_types": None}, r"11 tensors do not belong .* model.layers.1."),
    (lambda f: (f / FILE).rename(f / "pytorch_model.bin"), r"no .*safetensors .*pytorch_model.bin"),
    (lambda f: (f / "more.safetensors").write_bytes((f / FILE).read_bytes()), "no model.safetensors.index"),
    (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes().replace(b'"F32"', b'"I32"')), f"{TABLE} .*I32"),
  ],
)
def test_bad_configurations_and_files_are_refused(folder, damage, named):
  if isinstance(damage, dict):
    _configure(folder, **damage)
  else:
    damage(folder)
  _refused(folder, named)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_that_are_not_finite_are_refused_with_the_name_of_the_tensor(dtype, folder):
  def spoil(tensors, name, value):
    as_dtype = {key: t.astype(safetensors.DTYPES[dtype]) for key, t in tensors.items()}
    as_dtype[name].flat[-1] = value
    return as_dtype

  for name in (TABLE, "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
    for value in (np.nan, -np.nan, np.inf, -np.inf):
      _rewrite(folder, lambda tensors, name=name, value=value: spoil(tensors, name, value))
      refused((f"{folder}: tensor {name} has values that are NaN or infinite", _load, folder))
    _rewrite(folder, lambda tensors, name=name: spoil(tensors, name, -0.0))
    _load(folder)


def test_missing_shards_and_folders_are_named(tmp_path):
  _refused(tmp_path, "no Gemma checkpoint")
  _refused(tmp_path / "absent", "no such folder")
  hugging_face.save(random_params(CONFIG), CONFIG, tmp_path, max_shard_bytes=20_000)
  shards, index = sorted(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors.index.json"
  (tmp_path / "inner").mkdir()
  shards[1].rename(tmp_path / "inner" / "x")
  before = index.read_text()
  for outside in (f"../{tmp_path.name}/inner/x", "inner/x", str(tmp_path / "inner" / "x"), ".."):
    index.write_text(before.replace(f'"{shards[1].name}"', json.dumps(outside)))
    _refused(tmp_path, f"{index}: '{outside}' is no file of this folder")
  index.write_text(before)
  _refused(tmp_path, rf"1 of {len(shards)} shards are missing \({shards[1].name}")


def test_saving_never_mixes_models_and_never_drops_adapters(folder, tmp_path):
  before = _bytes_of(folder)
  refused((f"{folder}: already holds a model", hugging_face.save, random_params(CONFIG, seed=1), CONFIG, folder))
  assert _bytes_of(folder) == before
  adapted = random_params(CONFIG, adapters=lora.LoraConfig(rank=2, alpha=2.0, targets=("q",)))
  refused((r"lora/.*merge", hugging_face.save, adapted, CONFIG, tmp_path / "new"))
  assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
