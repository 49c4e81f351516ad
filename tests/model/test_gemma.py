"""What a token can see, proved by gradients; logits, remat, sharding, parameters, adapters; sizes and their counts."""

import dataclasses
import functools
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from refusals import refused

from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import PUBLISHED_COUNTS, SIZES, ModelConfig, get_config
from genrm_jax.model.lora import LoraConfig
from genrm_jax.runtime import sharding
from genrm_jax.runtime.sharding import DEFAULT_RULES

T = 20
TINY = ("tiny_gemma1", "tiny_gemma2", "tiny_gemma3")
forward = jax.jit(gemma.forward, static_argnums=1)
_params = functools.cache(random_params)


def _row(batch=1):
  """Rows without a repeated token: positions, and so input embeddings, can be told apart by their token."""
  tokens = np.stack([np.random.default_rng(b).permutation(128)[:T] for b in range(batch)]).astype(np.int32)
  return tokens, np.tile(np.arange(T, dtype=np.int32), (batch, 1)), np.ones((batch, T), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(config, params, tokens, positions, segments):
  """d logits[t] / d row v of the embedding, in a random direction of the logits, as [t, v, D]."""

  def project(table):
    x, _ = gemma.forward(params | {"embedder": {"input_embedding": table}}, config, tokens, positions, segments)
    # The output layer keeps its own copy of the table, or every gradient would pass through it as well.
    return gemma.unembed(params, config, x)[0] @ jnp.cos(jnp.arange(config.vocab_size))

  _, vjp = jax.vjp(project, params["embedder"]["input_embedding"])
  return jax.vmap(lambda cotangent: vjp(cotangent)[0])(jnp.eye(T))


def _influence(config, tokens, positions, segments):
  """|d logits[t] / d input[s]| as [t, s], for one row."""
  gradient = _jacobian(config, _params(config), tokens, positions, segments)
  return np.abs(np.asarray(gradient)).sum(-1)[:, tokens[0]]


@pytest.mark.parametrize("name", TINY)
def test_a_token_sees_exactly_its_own_segment_up_to_itself(name):
  tokens, _, _ = _row()
  segments = np.array([[1] * 8 + [2] * 10 + [0] * 2], np.int32)
  positions = np.concatenate([np.arange(8), np.arange(10) + 3, np.zeros(2)]).astype(np.int32)[None]
  got = _influence(get_config(name), tokens, positions, segments)[:18]
  np.testing.assert_array_equal(got > 0, (segments[0][:18, None] == segments[0]) & np.tri(18, T, dtype=bool))


def test_local_layers_reach_exactly_as_far_as_their_windows():
  config = get_config("tiny_gemma3", pattern=("local",), num_layers=2, window=4)
  tokens, positions, segments = _row()
  got = _influence(config, tokens, positions, segments)
  back = np.arange(T)[:, None] - np.arange(T)[None, :]
  np.testing.assert_array_equal(got > 0, (back >= 0) & (back <= 6), "each of two layers looks 3 tokens back")
  got = _influence(config, tokens, positions + 5 * (positions >= 10), segments)
  assert (got[10:, :10] == 0).all(), "a gap in positions counts in full"
  got = _influence(get_config("tiny_gemma3"), tokens, positions[:, ::-1].copy(), segments)
  np.testing.assert_array_equal(got > 0, back >= 0, "causality does not depend on positions")


def test_remat_changes_memory_and_not_gradients():
  config = get_config("tiny_gemma1")
  rows = _row(2)

  def grad(remat):
    def loss(params):
      return jnp.sum(jnp.square(gemma.forward(params, config, *rows, remat=remat)[0][..., :3]))

    compiled = jax.jit(jax.grad(loss)).lower(_params(config)).compile()
    return compiled(_params(config)), compiled.memory_analysis().temp_size_in_bytes

  (saved, all_bytes), (by_dots, dots_bytes), (by_layer, layer_bytes) = map(grad, ("none", "dots", "layer"))
  assert layer_bytes < 0.7 * all_bytes and layer_bytes < dots_bytes < all_bytes
  for recomputed in (by_dots, by_layer):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), saved, recomputed)


# Every mesh axis in another role than by default.
SWAPPED = {
  **dict.fromkeys(("vocab", "heads", "kv_heads", "ffw"), "fsdp"),
  **dict.fromkeys(("activation_heads", "activation_kv_heads", "activation_ffw", "cache_kv_heads"), "fsdp"),
  **dict.fromkeys(("embed", "activation_embed"), "tensor"),
  **dict.fromkeys(("activation_batch", "cache_batch"), "data"),
}


def _loss(params, config, tokens, positions, segments):
  x, _ = gemma.forward(params, config, tokens, positions, segments)
  logits = gemma.unembed(params, config, x)
  return -jnp.mean(jax.nn.log_softmax(logits)[..., 3]), logits


_grad = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=1)


def test_losses_and_gradients_under_other_rules_match_one_device():
  config = get_config("tiny_gemma2", sharding=SWAPPED)
  rows = _row(8)
  (loss, logits), gradient = _grad(_params(config), config, *rows)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.param_shardings(gemma.param_specs(config), mesh, config.rules)
  placed = jax.device_put(_params(config), shardings)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=1, out_shardings=(None, shardings))
    batch = sharding.batch_sharding(mesh, config.rules)
    (got_loss, got_logits), got = step(placed, config, *sharding.host_to_global(rows, batch))
    cache = jax.jit(kv_cache.init, static_argnums=(0, 1, 2))(config, 8, 16)
  np.testing.assert_allclose(got_loss, loss, atol=1e-5)
  np.testing.assert_allclose(got_logits, logits, atol=5e-5)
  scale = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(gradient))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, gradient)
  # Arrays lie on the mesh as the rules say.
  L, D, F, K, H = config.num_layers, config.embed_dim, config.ffw_dim, config.num_kv_heads, config.head_dim
  assert got["layers"]["down"].sharding.shard_shape((L, F, D)) == (L, F // 2, D // 2)
  assert tuple(got["layers"]["gate"].sharding.spec) == (None, "tensor", "fsdp")
  assert got_logits.sharding.shard_shape(got_logits.shape) == (4, T, config.vocab_size // 2)
  assert cache.k.sharding.shard_shape(cache.k.shape) == (L, 4, K // 2, 16, H)


def test_norms_are_declared_and_initial_parameters_have_unit_scale_and_their_own_keys():
  norms = {"pre_attention_norm", "pre_ffw_norm", "final_norm"}
  post = {"post_attention_norm", "post_ffw_norm"}
  for name, more in zip(TINY, (set(), post, post | {"q_norm", "k_norm"}), strict=True):
    mask = gemma.norm_mask(get_config(name), LoraConfig(2, 2.0, ("q", "down")))
    assert {path[-1].key for path, is_norm in jax.tree.leaves_with_path(mask) if is_norm} == norms | more
  config = get_config("tiny_gemma1")
  init = jax.jit(gemma.init, static_argnums=0)
  one, other = (init(config, jax.random.key(seed))["layers"] for seed in (0, 1))
  assert not np.allclose(one["q"], other["q"]) and not np.allclose(one["gate"], one["up"])
  for name, fan_in in (("q", 128), ("attn_out", 128), ("gate", 128), ("down", 256)):
    assert float(jnp.std(one[name])) == pytest.approx(1 / math.sqrt(fan_in), rel=0.03)
  assert not one["pre_ffw_norm"].any()
  # A parameter does not change when others are added or removed.
  down = init(get_config("tiny_gemma1", post_norms=True), jax.random.key(0))["layers"]["down"]
  np.testing.assert_array_equal(one["down"], down)


ALL = tuple(lora.TARGETS)
TOKENS = np.random.default_rng(1).integers(128, size=(2, 10)).astype(np.int32)
ROWS = TOKENS, np.tile(np.arange(10, dtype=np.int32), (2, 1)), np.ones_like(TOKENS)


@functools.cache
def _adapted(model, targets=()):
  """Random weights, with adapters of rank 3 that change the model about as much as its own matrices do."""
  return random_params(model, std=0.1, adapters=LoraConfig(3, 6.0, targets) if targets else None)


def _hidden(model, params):
  return np.asarray(forward(params, model, *ROWS)[0])


@pytest.mark.parametrize("name", ["tiny_gemma1", "tiny_gemma3"])
def test_merged_adapters_match_separate_ones_and_are_rounded_once(name):
  model = get_config(name, num_layers=2)
  adapted = _adapted(model, ALL)
  merged = lora.merge(adapted)
  assert jax.tree.structure(merged) == jax.tree.structure(_adapted(model))
  got = _hidden(model, adapted)
  np.testing.assert_allclose(got, _hidden(model, merged), atol=2e-5)
  assert np.abs(got - _hidden(model, _adapted(model))).max() > 0.5
  half = adapted | {"layers": jax.tree.map(lambda w: w.astype(jnp.bfloat16), adapted["layers"])}
  exact = lora.merge(half | {"layers": jax.tree.map(lambda w: w.astype(jnp.float32), half["layers"])})
  jax.tree.map(lambda w, e: np.testing.assert_array_equal(w, e.astype(w.dtype)), lora.merge(half), exact)


def test_new_adapters_are_random_float32_and_do_not_change_the_model():
  model = get_config("tiny_gemma1", num_layers=2, param_dtype="bfloat16")
  init = jax.jit(lora.init, static_argnums=(0, 1))
  added = init(model, LoraConfig(32, 8.0, ALL), jax.random.key(0))
  np.testing.assert_array_equal(_hidden(model, {**_adapted(model), **added}), _hidden(model, _adapted(model)))
  assert {str(a.dtype) for a in jax.tree.leaves(added)} == {"float32"}
  one = added["lora"]
  assert not np.allclose(one["gate"]["a"], one["up"]["a"]), "each adapter has its own key"
  for name, fan_in in (("q", 128), ("attn_out", 128), ("down", 256)):
    assert float(jnp.std(one[name]["a"])) == pytest.approx(fan_in**-0.5, rel=0.05)
  fewer = init(model, LoraConfig(32, 8.0, ("down",)), jax.random.key(0))
  np.testing.assert_array_equal(fewer["lora"]["down"]["a"], one["down"]["a"])
  assert fewer["lora_scale"] == 0.25 and list(fewer["lora"]) == ["down"]


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


def test_json_holds_the_model_and_bad_fields_are_refused():
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
  good = {"rank": 4, "alpha": 8.0, "targets": ("q",)}
  bad = {"rank": (0, 4.0), "alpha": (0.0, float("nan")), "targets": ((), ("q", "o"))}
  for name, values in bad.items():
    refused(*((name, lambda value: LoraConfig(**good | {name: value}), value) for value in values))  # noqa: B023
