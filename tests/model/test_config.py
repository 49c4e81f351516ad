"""The size table against published parameter counts, and what a config refuses."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig, get_config
from genrm_jax.runtime.errors import UserError

# The image encoder of Gemma 3 4B and above (SigLIP So400m/14 at 896 pixels), and the width of what it gives.
IMAGE_ENCODER_PARAMS, IMAGE_WIDTH = 416_866_032, 1152


def test_every_published_size_has_its_counts():
  assert set(PUBLISHED_COUNTS) == {name for name in SIZES if not name.startswith("tiny_")}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_counts_are_the_published_ones(name):
  config, published = get_config(name), PUBLISHED_COUNTS[name]
  shapes = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
  embedding = math.prod(shapes["embedder"]["input_embedding"].shape)
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
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


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_full_sizes_trace(name):
  config = get_config(name, dtype="bfloat16", param_dtype="bfloat16")
  params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  row = jax.ShapeDtypeStruct((2, 16), jnp.int32)
  x, _ = jax.eval_shape(lambda p, t: gemma.forward(p, config, t, t, t), params, row)
  logits = jax.eval_shape(lambda p, x: gemma.unembed(p, config, x), params, x)
  assert (x.shape, x.dtype) == ((2, 16, config.embed_dim), jnp.bfloat16)
  assert (logits.shape, logits.dtype) == ((2, 16, config.vocab_size), jnp.float32)


def test_layer_kinds_repeat_the_pattern_and_cut_it():
  assert get_config("gemma2_2b").layer_kinds[:4] == ("local", "global", "local", "global")
  kinds = get_config("gemma3_1b").layer_kinds
  assert len(kinds) == 26
  assert [i for i, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]


@pytest.mark.parametrize("name", SIZES)
def test_json_round_trip(name):
  config = SIZES[name]
  assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert hash(ModelConfig.from_dict(config.to_dict())) == hash(config)


def test_unknown_and_missing_keys_are_named():
  fields = get_config("tiny_gemma1").to_dict()
  with pytest.raises(UserError, match=r"Unknown key.*num_layer.*Known: .*num_layers"):
    ModelConfig.from_dict(fields | {"num_layer": 3})
  del fields["head_dim"]
  with pytest.raises(UserError, match=r"Missing key.*head_dim"):
    ModelConfig.from_dict(fields)


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(UserError, match=r"'gemma_3b'.*gemma_2b.*gemma3_27b.*tiny_gemma3"):
    get_config("gemma_3b")


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"num_heads": 3}, "num_kv_heads = 2.*divisor of num_heads = 3"),
    ({"num_layers": 0}, "num_layers = 0.*above 0"),
    ({"embed_dim": "64"}, "embed_dim = '64'.*whole number"),
    ({"head_dim": 15}, "head_dim = 15.*even"),
    ({"dtype": "float16"}, "dtype = 'float16'.*float32, bfloat16"),
    ({"param_dtype": "int8"}, "param_dtype = 'int8'"),
    ({"window": None}, "window = None.*some layers are local"),
    ({"window": 0}, "window = 0"),
    ({"pattern": ()}, "pattern"),
    ({"pattern": ("sliding",)}, "pattern"),
    ({"attn_softcap": -1.0}, r"attn_softcap = -1\.0"),
    ({"query_scale": 0.0}, r"query_scale = 0\.0"),
    ({"rope_scale_global": float("inf")}, "rope_scale_global = inf"),
    ({"qk_norm": 1}, "qk_norm = 1"),
  ],
)
def test_bad_fields_are_refused(overrides, message):
  with pytest.raises(UserError, match=message):
    get_config("tiny_gemma2", **overrides)
