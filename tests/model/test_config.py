"""The size table against published parameter counts, and what a config refuses."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig, get_config
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.sharding import DEFAULT_RULES

# The image encoder of Gemma 3 4B and above (SigLIP So400m/14 at 896 pixels), and the width of its output.
IMAGE_ENCODER_PARAMS, IMAGE_WIDTH = 416_866_032, 1152


def test_every_published_size_has_its_counts():
  assert set(PUBLISHED_COUNTS) == {name for name in SIZES if not name.startswith("tiny_")}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_full_sizes_trace_and_have_the_published_counts(name):
  config, published = get_config(name, dtype="bfloat16", param_dtype="bfloat16"), PUBLISHED_COUNTS[name]
  params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
  embedding = math.prod(params["embedder"]["input_embedding"].shape)
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert gemma.num_params(config) == (embedding, total - embedding)

  has_images = published.hub_vocab > config.vocab_size
  projection = IMAGE_WIDTH * config.embed_dim + IMAGE_WIDTH if has_images else 0
  if published.rounded_to == 1:
    assert embedding == published.embedding
    assert total - embedding == published.non_embedding
  else:
    assert abs(embedding + projection - published.embedding) < published.rounded_to
    assert round((total - embedding) / published.rounded_to) * published.rounded_to == published.non_embedding
  text_total = total + (published.hub_vocab - config.vocab_size) * config.embed_dim
  assert text_total + (IMAGE_ENCODER_PARAMS + projection if has_images else 0) == published.hub_total

  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  row = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  x, _ = jax.eval_shape(lambda p, t: gemma.forward(p, config, t, t, t), params, row)
  logits = jax.eval_shape(lambda p, x: gemma.unembed(p, config, x), params, x)
  assert (x.shape, x.dtype) == ((2, 16, config.embed_dim), jnp.bfloat16)
  assert (logits.shape, logits.dtype) == ((2, 16, config.vocab_size), jnp.float32)


def test_layer_kinds_repeat_the_pattern_and_cut_it_off():
  assert get_config("gemma2_2b").layer_kinds[:4] == ("local", "global", "local", "global")
  kinds = get_config("gemma3_1b").layer_kinds
  assert len(kinds) == 26 and [i for i, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]


@pytest.mark.parametrize("name", ["gemma2_27b", "tiny_gemma3"])
def test_json_round_trip(name):
  config = SIZES[name]
  again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
  assert again == config and hash(again) == hash(config)


def test_sharding_rules_are_part_of_the_config_and_not_of_the_model():
  fields = get_config("tiny_gemma2").to_dict()
  rules = json.loads(json.dumps({"ffw": ["fsdp", "tensor"], "embed": None, "vocab": "data"}))
  config = ModelConfig.from_dict(fields | {"sharding": rules})
  assert config.rules == {**DEFAULT_RULES, "ffw": ("fsdp", "tensor"), "embed": None, "vocab": "data"}
  assert config.to_dict() == fields
  assert config == get_config("tiny_gemma2", sharding=dict(reversed(rules.items())))
  assert config != get_config("tiny_gemma2"), "a program compiled for other rules is another program"
  # A single kv head cannot be sharded, whatever the config was derived from.
  single = dataclasses.replace(config, num_kv_heads=1).rules
  assert {axis for axis in single if single[axis] != config.rules[axis]} == {
    f"{prefix}kv_heads" for prefix in ("", "activation_", "cache_")
  }


def test_unknown_names_and_missing_keys_are_named():
  fields = get_config("tiny_gemma1").to_dict()
  with pytest.raises(UserError, match=r"Unknown.*num_layer.*num_layers"):
    ModelConfig.from_dict(fields | {"num_layer": 3})
  del fields["head_dim"]
  with pytest.raises(UserError, match=r"Missing.*head_dim"):
    ModelConfig.from_dict(fields)
  with pytest.raises(UserError, match=r"'gemma_3b'.*gemma_2b.*tiny_gemma3"):
    get_config("gemma_3b")


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"num_heads": 3}, "num_kv_heads = 2.*num_heads = 3"),
    ({"num_layers": 0}, "num_layers = 0.*above 0"),
    ({"embed_dim": "64"}, "embed_dim = '64'.*whole number"),
    ({"head_dim": 15}, "head_dim = 15.*even"),
    ({"dtype": "float16"}, "dtype = 'float16'.*bfloat16"),
    ({"param_dtype": "int8"}, "param_dtype = 'int8'"),
    ({"window": None}, "window = None.*local"),
    ({"window": 0}, "window = 0"),
    ({"pattern": ()}, "pattern"),
    ({"pattern": ("sliding",)}, "pattern"),
    ({"attn_softcap": -1.0}, r"attn_softcap = -1\.0"),
    ({"query_scale": 0.0}, r"query_scale = 0\.0"),
    ({"rope_scale_global": float("inf")}, "rope_scale_global = inf"),
    ({"qk_norm": 1}, "qk_norm = 1"),
    ({"sharding": {"embde": "fsdp"}}, "unknown logical axis 'embde'.*embed.*activation_batch.*cache_batch"),
    ({"sharding": {"embed": "model"}}, "'embed' names 'model'.*data, fsdp, tensor"),
    ({"sharding": {"embed": ["fsdp", "model"]}}, "'embed' names 'model'"),
    ({"sharding": {"embed": 2}}, "'embed' names 2"),
    ({"sharding": "fsdp"}, "sharding = 'fsdp'.* map"),
  ],
)
def test_bad_fields_are_refused(overrides, message):
  with pytest.raises(UserError, match=message):
    get_config("tiny_gemma2", **overrides)
