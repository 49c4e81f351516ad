"""The size table against published parameter counts; JSON, sharding rules, and what a config refuses."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from refusals import refused

from genrm_jax.model import gemma
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig, get_config
from genrm_jax.runtime.sharding import DEFAULT_RULES

# The image encoder of Gemma 3 4B and above (SigLIP So400m/14 at 896 pixels), and the width of its output.
IMAGE_ENCODER_PARAMS, IMAGE_WIDTH = 416_866_032, 1152


@pytest.mark.parametrize("name", [name for name in SIZES if not name.startswith("tiny_")])
def test_full_sizes_trace_and_have_the_published_counts(name):
  config, published = get_config(name, dtype="bfloat16", param_dtype="bfloat16"), PUBLISHED_COUNTS[name]
  params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
  embedding = math.prod(params["embedder"]["input_embedding"].shape)
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert gemma.num_params(config) == (embedding, total - embedding)

  has_images = published.hub_vocab > config.vocab_size
  projection = IMAGE_WIDTH * config.embed_dim + IMAGE_WIDTH if has_images else 0
  if published.rounded_to == 1:
    assert (embedding, total - embedding) == (published.embedding, published.non_embedding)
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


def test_json_holds_the_model_and_accepts_sharding_rules():
  fields = json.loads(json.dumps(get_config("tiny_gemma3").to_dict()))
  plain = ModelConfig.from_dict(fields)
  assert plain == get_config("tiny_gemma3") and hash(plain) == hash(get_config("tiny_gemma3"))
  rules = json.loads(json.dumps({"ffw": ["fsdp", "tensor"], "embed": None, "vocab": "data"}))
  config = ModelConfig.from_dict(fields | {"sharding": rules})
  assert config.rules == {**DEFAULT_RULES, "ffw": ("fsdp", "tensor"), "embed": None, "vocab": "data"}
  assert config.to_dict() == plain.to_dict()
  assert config == get_config("tiny_gemma3", sharding=dict(reversed(rules.items())))
  assert config != plain, "a program compiled for other rules is another program"
  # A single kv head cannot be sharded, whatever the config was derived from.
  single = dataclasses.replace(config, num_kv_heads=1).rules
  changed = {axis for axis in single if single[axis] != config.rules[axis]}
  assert changed == {"kv_heads", "activation_kv_heads", "cache_kv_heads"}


def test_bad_fields_are_refused():
  fields, build = get_config("tiny_gemma1").to_dict(), partial(get_config, "tiny_gemma2")
  refused(
    (r"num_layer\b.*num_layers", ModelConfig.from_dict, fields | {"num_layer": 3}),
    ("head_dim", ModelConfig.from_dict, {key: value for key, value in fields.items() if key != "head_dim"}),
    (r"gemma_3b.*tiny_gemma3", get_config, "gemma_3b"),
    *(("num_kv_heads", partial(build, num_heads=3)), ("num_layers", partial(build, num_layers=0))),
    *(("embed_dim", partial(build, embed_dim="64")), ("head_dim", partial(build, head_dim=15))),
    *(("window", partial(build, window=None)), ("pattern", partial(build, pattern=("sliding",)))),
    ("rope_scale_global", partial(build, rope_scale_global=float("inf"))),
    ("qk_norm", partial(build, qk_norm=1)),
    ("embde.*activation_batch", partial(build, sharding={"embde": "fsdp"})),
    ("embed.*model.*tensor", partial(build, sharding={"embed": ["fsdp", "model"]})),
    ("sharding", partial(build, sharding="fsdp")),
  )
