"""Hugging Face folders: released configurations, round trips to the bit, and one message for each bad input."""

import json

import hugging_face as peer
import jax
import make_goldens
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from genrm_jax.checkpoints import hugging_face, hugging_face_config, pretrained, safetensors, tensor_map
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig, get_config
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

_GEMMA1 = {
  "architectures": ["GemmaForCausalLM"],
  "model_type": "gemma",
  "attention_bias": False,
  "head_dim": 256,
  "hidden_act": "gelu",
  "hidden_activation": "gelu_pytorch_tanh",
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "vocab_size": 256000,
}
_GEMMA2 = {
  "architectures": ["Gemma2ForCausalLM"],
  "model_type": "gemma2",
  "attention_bias": False,
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "vocab_size": 256000,
}
_GEMMA3_TEXT = {
  "architectures": ["Gemma3ForCausalLM"],
  "model_type": "gemma3_text",
  "attention_bias": False,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "num_attention_heads": 4,
  "num_key_value_heads": 1,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "vocab_size": 262144,
}


def _dims(hidden, ffw, num_layers, heads=None, kv_heads=None):
  return {
    "hidden_size": hidden,
    "intermediate_size": ffw,
    "num_hidden_layers": num_layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
  }


def _gemma3(hidden, ffw, num_layers, **more):
  """As the sizes with an image encoder: of the text model, only what differs from the defaults."""
  text = {"model_type": "gemma3_text", "hidden_size": hidden, "intermediate_size": ffw, "num_hidden_layers": num_layers}
  text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024} | more
  return {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}


# What decides the model in the config.json of the released files.
RELEASED = {
  "gemma_2b": _GEMMA1 | _dims(2048, 16384, 18, 8, 1),
  "gemma_7b": _GEMMA1 | _dims(3072, 24576, 28, 16, 16),
  "gemma2_2b": _GEMMA2 | _dims(2304, 9216, 26, 8, 4),
  "gemma2_9b": _GEMMA2 | _dims(3584, 14336, 42, 16, 8),
  "gemma2_27b": _GEMMA2 | _dims(4608, 36864, 46, 32, 16) | {"head_dim": 128, "query_pre_attn_scalar": 144},
  "gemma3_270m": _GEMMA3_TEXT
  | _dims(640, 2048, 18, 4, 1)
  | {
    "_sliding_window_pattern": 6,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "use_bidirectional_attention": False,
  },
  "gemma3_1b": _GEMMA3_TEXT | _dims(1152, 6912, 26, 4, 1),
  "gemma3_4b": _gemma3(2560, 10240, 34),
  "gemma3_12b": _gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
  "gemma3_27b": _gemma3(
    5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
  ),
}


def _parse(fields):
  return hugging_face_config.from_json("config.json", fields, "it")


def _params(config, dtype="float32", seed=0):
  rng = np.random.default_rng(seed)
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  return jax.tree.map(lambda spec: rng.normal(scale=0.1, size=spec.shape).astype(dtype), gemma.param_specs(config))


def _one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def _bytes_of(folder):
  """{name: (dtype, shape, bytes)} of all tensors of a folder."""
  found = {}
  for path in epath.Path(folder).glob("*.safetensors"):
    for name, entry in safetensors.read_index(path).items():
      found[name] = entry.dtype, entry.shape, safetensors.read_bytes(path, entry.begin, entry.end)
  return found


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_the_size_table(name):
  config = tensor_map.check_size("here", _parse(RELEASED[name]))
  published = PUBLISHED_COUNTS[name]
  assert config == get_config(name, vocab_size=published.hub_vocab)
  count = sum(int(np.prod(tensor.shape)) for tensor in hugging_face.tensors(config, "model."))
  if "text_config" in RELEASED[name]:
    assert count < published.hub_total
  else:
    assert count == published.hub_total


@pytest.mark.parametrize("name", RELEASED)
def test_transformers_reads_the_same_from_a_configuration(name):
  """With all that its classes fill in written out, and in the keys of its newest version."""
  transformers = pytest.importorskip("transformers")
  fields = RELEASED[name]
  given = {key: value for key, value in fields.items() if key != "model_type"}
  filled = transformers.AutoConfig.for_model(fields["model_type"], **given).to_dict()
  assert "rope_parameters" in filled.get("text_config", filled)
  assert _parse(filled) == _parse(fields)


@pytest.mark.parametrize("family", hugging_face_config.ARCHITECTURES)
def test_absent_keys_mean_what_they_mean_to_transformers(family):
  transformers = pytest.importorskip("transformers")
  assert _parse(transformers.AutoConfig.for_model(family).to_dict()) == _parse({"model_type": family})


@pytest.mark.parametrize("name", SIZES)
def test_transformers_reads_the_model_that_is_written(name):
  transformers = pytest.importorskip("transformers")
  fields = hugging_face_config.to_json(SIZES[name], dtype="bfloat16", bos_id=2, eos_id=(1, 106), pad_id=0)
  read = transformers.AutoConfig.for_model(
    fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"}
  )
  again = _parse(read.to_dict())
  assert hugging_face_config.from_json("", fields, "it") == again
  assert again.layer_kinds == SIZES[name].layer_kinds and again.window == SIZES[name].window
  assert (again.query_scale, again.rope_scale_global) == (SIZES[name].query_scale, SIZES[name].rope_scale_global)
  assert str(read.dtype) == "torch.bfloat16" and read.eos_token_id == [1, 106]


@pytest.mark.parametrize("name", SIZES)
def test_a_configuration_comes_back(name):
  fields = hugging_face_config.to_json(SIZES[name], dtype="float32", bos_id=2, eos_id=1, pad_id=0)
  again = hugging_face_config.from_json("here", json.loads(json.dumps(fields)), name)
  assert again == SIZES[name]
  # The layers follow from sliding_window_pattern or the family, and a missing RoPE base is the family's.
  del fields["layer_types" if "layer_types" in fields else "rope_theta"]
  assert hugging_face_config.from_json("here", fields, name) == SIZES[name]


@pytest.mark.parametrize(
  ("name", "overrides", "field"),
  [
    ("tiny_gemma1", {"query_scale": 0.3}, "query_scale"),
    ("tiny_gemma1", {"final_softcap": 30.0}, "final_softcap"),
    ("tiny_gemma2", {"query_scale": 0.3}, "query_scale"),
    ("tiny_gemma2", {"rope_base_global": 1e6}, "rope_base_local"),
    ("tiny_gemma3", {"attn_softcap": 50.0}, "attn_softcap"),
    ("tiny_gemma3", {"post_norms": False}, "post_norms"),
    ("tiny_gemma1", {"pattern": ("local",), "window": 4}, "layer_kinds|window"),
  ],
)
def test_a_model_that_the_format_cannot_hold(name, overrides, field, tmp_path):
  config = get_config(name, **overrides)
  with pytest.raises(UserError, match=rf"{name}: ({field}) = .* has no place in Hugging Face's gemma"):
    hugging_face.save(_params(config), config, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny_gemma1", "tiny_gemma2", "tiny_gemma3"])
def test_our_parameters_come_back_to_the_bit(name, dtype, tmp_path):
  config = get_config(name, num_layers=3, embed_dim=24, ffw_dim=40)
  params = _params(config, dtype)
  hugging_face.save(params, config, tmp_path / "model", max_shard_bytes=20_000)
  assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
  again, loaded = pretrained.load(tmp_path / "model", _one_device(), param_dtype=dtype)
  kinds = config.layer_kinds
  assert loaded.layer_kinds == kinds
  same = {"name": "model", "param_dtype": dtype, "pattern": loaded.pattern}
  assert loaded == ModelConfig.from_dict(config.to_dict() | same)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {dtype}


@pytest.mark.parametrize("case", peer.CASES)
def test_a_peers_files_come_back_to_the_byte(case, tmp_path):
  checkpoint = make_goldens.GOLDENS / case / "checkpoint"
  dtype = peer.CASES[case][2]
  params, config = pretrained.load(checkpoint, _one_device(), param_dtype=dtype)
  hugging_face.save(params, config, tmp_path)
  images = ("vision_tower", "multi_modal_projector")
  want = {
    name.removeprefix("language_model."): held
    for name, held in _bytes_of(checkpoint).items()
    if not name.startswith(images)
  }
  assert _bytes_of(tmp_path) == want


def test_sharded_parameters_are_saved_as_they_are_alone(tmp_path):
  config = get_config("tiny_gemma3", num_layers=2)
  alone = _params(config)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  hugging_face.save(alone, config, tmp_path / "alone")
  sharded = jax.device_put(alone, sharding.param_shardings(gemma.param_specs(config), mesh))
  hugging_face.save(sharded, config, tmp_path / "sharded")
  assert _bytes_of(tmp_path / "sharded") == _bytes_of(tmp_path / "alone")


CONFIG = get_config("tiny_gemma2", num_layers=2, embed_dim=24, ffw_dim=40)
TABLE = "model.embed_tokens.weight"
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
  hugging_face.save(_params(CONFIG), CONFIG, tmp_path / "model")
  return tmp_path / "model"


def _rewrite(folder, change):
  """Writes the tensors of a folder again, as change({name: array}) gives them."""
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
def test_names_of_every_export(folder, prefix):
  want, _ = pretrained.load(folder, _one_device())

  def rename(tensors):
    renamed = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    extra = {"lm_head.weight": np.zeros_like(tensors[TABLE]), "vision_tower.layers.0.bias": np.zeros(3, np.float32)}
    return renamed | extra | {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}

  _rewrite(folder, rename)
  got, _ = pretrained.load(folder, _one_device())
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_output_layer_of_its_own_must_be_the_embedding(folder):
  _configure(folder, tie_word_embeddings=False)
  _refused(folder, "tie_word_embeddings is false and lm_head.weight is not the embedding")
  _rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors[TABLE]})
  assert pretrained.open_checkpoint(folder).config.vocab_size == CONFIG.vocab_size
  _rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors[TABLE] + 1})
  _refused(folder, "tie_word_embeddings is false and lm_head.weight is not the embedding")


def test_float16_files_are_read(folder):
  _rewrite(folder, lambda tensors: {name: t.astype(np.float16) for name, t in tensors.items()})
  params, _ = pretrained.load(folder, _one_device())
  want = _params(CONFIG)["layers"]["down"].astype(np.float16).astype(np.float32)
  np.testing.assert_array_equal(params["layers"]["down"], want)


def _refused(folder, message):
  """The message comes when the folder is opened, before a tensor is read, and names the folder."""
  with pytest.raises(UserError, match=message) as caught:
    pretrained.open_checkpoint(folder)
  assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "llama"}, r"model_type 'llama'; this library knows gemma \(GemmaForCausalLM\), gemma2 "),
    ({"model_type": "gemma3n"}, "model_type 'gemma3n'; this library knows"),
    ({"model_type": "paligemma"}, "model_type 'paligemma'; this library knows"),
    ({"model_type": None}, "model_type None; this library knows"),
    ({"architectures": ["Gemma2ForSequenceClassification"]}, "with architecture Gemma2ForSequenceClassification;"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; .* \"gelu_pytorch_tanh\" only"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'; known: default, linear"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "RoPE of sliding layers is scaled"),
    ({"rope_parameters": {"full_attention": {}}}, "RoPE parameters have full_attention; known: "),
    ({"rope_theta": None}, "rope_theta is None, but it must be a number above 0"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types names chunked_attention"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', but it must be a whole number above 0"),
    ({"head_dim": 0}, "head_dim is 0, but"),
    ({"num_key_value_heads": 3}, "num_kv_heads = 3, but it must be a divisor"),
    ({"vocab_size": 100}, rf"tensor {TABLE} has shape \(128, 24\), but in a model it is \(100, 24\)"),
    ({"intermediate_size": 48}, r"mlp.gate_proj.weight has shape \(40, 24\), but in a model it is \(48, 24\)"),
    ({"num_hidden_layers": 3, "layer_types": None}, "11 tensors of a model are missing, the first is model.layers.2."),
    ({"num_hidden_layers": 1, "layer_types": None}, "11 tensors are of no model .* the first is model.layers.1."),
    (
      _dims(3584, 14336, 42, 16, 8) | {"layer_types": None, "head_dim": 256},
      "make it a gemma2_9b, but vocab_size is 128 in the files and 256128 in the table; .*window is 6 in the files",
    ),
  ],
)
def test_configurations_that_are_refused(folder, fields, message):
  _configure(folder, **fields)
  _refused(folder, message)


def _without(folder, name):
  (folder / name).unlink()


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda f: _without(f, FILE), r"config.json, but no \*.safetensors; give a folder"),
    (lambda f: (f / FILE).rename(f / "pytorch_model.bin"), "no .*safetensors; pytorch_model.bin cannot be read"),
    (lambda f: _without(f, "config.json"), r"\*.safetensors, but no config.json"),
    (lambda f: (f / "config.json").write_text('{"model'), "config.json: not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    (lambda f: (f / "more.safetensors").write_bytes((f / FILE).read_bytes()), "2 .*, but no model.safetensors.index"),
    (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-1000]), "cut short, its header says .* bytes"),
    (lambda f: _rewrite(f, lambda t: {k: v for k, v in t.items() if k != TABLE}), f"1 tensors .*missing, .*{TABLE}"),
    (lambda f: _rewrite(f, lambda t: t | {TABLE: t[TABLE].T}), rf"tensor {TABLE} has shape \(24, 128\)"),
    (lambda f: _rewrite(f, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": t[TABLE]}), "1 tensors are of no"),
  ],
)
def test_files_that_are_refused(folder, spoil, message):
  spoil(folder)
  _refused(folder, message)


def test_quantised_tensors_are_refused(folder):
  path = folder / FILE
  path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
  _refused(folder, f"tensor {TABLE} is of dtype I32; known: F32, F16, BF16")


def test_missing_shards(tmp_path):
  hugging_face.save(_params(CONFIG), CONFIG, tmp_path, max_shard_bytes=20_000)
  shards = sorted(tmp_path.glob("*.safetensors"))
  shards[1].unlink()
  _refused(tmp_path, f"{len(shards) - 1} of {len(shards)} shards are there, {shards[1].name} missing")
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
  _refused(tmp_path, "no weight_map")


def test_folders_without_a_model(tmp_path):
  _refused(tmp_path, "no checkpoint of Gemma in it")
  _refused(tmp_path / "absent", "no such folder")


def test_a_saved_model_is_never_mixed_with_another(folder):
  before = _bytes_of(folder)
  with pytest.raises(UserError, match=f"{folder}: holds a model already"):
    hugging_face.save(_params(CONFIG, seed=1), CONFIG, folder)
  assert _bytes_of(folder) == before


def test_adapters_are_not_dropped_in_silence(tmp_path):
  adapters = lora.init(CONFIG, lora.LoraConfig(rank=2, alpha=2.0, targets=("q",)), jax.random.key(0))
  with pytest.raises(UserError, match=r"lora/.* must be merged"):
    hugging_face.save({**_params(CONFIG), **adapters}, CONFIG, tmp_path)
  assert not list(tmp_path.iterdir())
