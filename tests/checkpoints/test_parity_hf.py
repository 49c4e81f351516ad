"""Logits match transformers: its goldens everywhere, and live where torch and transformers are installed."""

import dataclasses
import functools

import hugging_face as peer
import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from random_params import random_params

from genrm_jax.checkpoints import hugging_face, pretrained
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.runtime import sharding

TOLERANCE = 1e-4
# fmt: off
# Changes of the config that each golden must detect.
FIELDS = {
  "hf_gemma1_mqa": {"rope_base_global": 1e6, "query_scale": 1.0},
  "hf_gemma2": {
    "attn_softcap": None, "final_softcap": None, "query_scale": 8**-0.5, "window": 6, "pattern": ("global", "local"),
    "rope_base_local": 1e6, "rope_base_global": 1e6,
  },
  "hf_gemma3": {
    "rope_base_local": 1e6, "rope_base_global": 1e4, "rope_scale_global": 1.0, "query_scale": 8**-0.5, "window": 4,
    "pattern": ("local", "global"),
  },
}
# fmt: on


@functools.partial(jax.jit, static_argnums=1)
def _forward(params, config, tokens, positions, segments, cache=None):
  x, cache = gemma.forward(params, config, tokens, positions, segments, cache)
  return gemma.unembed(params, config, x), cache


def _logits(params, config, tokens):
  """[B, T, V] of rows that are padded on the right with token 0."""
  positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
  return np.asarray(_forward(params, config, tokens, positions, (tokens > 0).astype(np.int32))[0])


@functools.cache
def _golden(case):
  """(tokens, logits, logits in bfloat16, our parameters, our config)."""
  folder = make_goldens.GOLDENS / case
  given = np.load(folder / "logits.npz")
  params, config = pretrained.load(folder / "checkpoint", sharding.make_mesh(devices=jax.devices()[:1]))
  return given["tokens"], given["logits"], given["logits_bfloat16"], params, config


@pytest.mark.parametrize("case", peer.CASES)
def test_golden_logits(case):
  tokens, want, _, params, config = _golden(case)
  real = tokens > 0
  assert 0.3 < want[real].std() < 30
  assert real.sum(1).max() > 4 * (config.window or 0), "no row is longer than the reach of the windows"
  np.testing.assert_allclose(_logits(params, config, tokens)[real], want[real], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["hf_gemma1_mqa", "hf_gemma3_images"])
def test_golden_logits_on_eight_devices(case):
  tokens, want, _, _, config = _golden(case)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params, loaded = pretrained.load(make_goldens.GOLDENS / case / "checkpoint", mesh)
  assert loaded == config
  gate = params["layers"]["gate"]
  assert gate.sharding.shard_shape(gate.shape) == (config.num_layers, config.embed_dim // 2, config.ffw_dim // 2)
  with jax.set_mesh(mesh):
    got = _logits(params, config, sharding.host_to_global(tokens, sharding.batch_sharding(mesh)))
  np.testing.assert_allclose(got[tokens > 0], want[tokens > 0], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["hf_gemma2", "hf_gemma3"])
def test_packed_segments_match_rows_of_transformers(case):
  tokens, want, _, params, config = _golden(case)
  real = tokens > 0
  lengths = real.sum(1)
  segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)
  positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
  got, _ = _forward(params, config, tokens[real][None], positions, segments)
  np.testing.assert_allclose(got[0], want[real], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["hf_gemma1_mqa", "hf_gemma2", "hf_gemma3"])
def test_prefill_and_decode_match_the_full_forward_of_transformers(case):
  tokens, want, _, params, config = _golden(case)
  lengths, prompts = (tokens > 0).sum(1), np.array([9, 4, 7, 2])
  width = prompts.max()
  positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (4, 1))
  segments = (positions[:, :width] < prompts[:, None]).astype(np.int32)
  cache = kv_cache.init(config, 4, tokens.shape[1])
  got, cache = _forward(params, config, tokens[:, :width], positions[:, :width], segments, cache)
  np.testing.assert_allclose(got[segments > 0], want[:, :width][segments > 0], atol=TOLERANCE)
  rows = np.arange(4)
  for step in range((lengths - prompts).max()):
    at = np.minimum(prompts + step, lengths - 1)
    live = prompts + step < lengths
    given = tokens[rows, at][:, None], at[:, None].astype(np.int32), live.astype(np.int32)[:, None]
    got, cache = _forward(params, config, *given, cache)
    np.testing.assert_allclose(got[live, 0], want[rows, at][live], atol=TOLERANCE)
  np.testing.assert_array_equal(cache.length, lengths)


@pytest.mark.parametrize(("case", "field"), [(case, field) for case in FIELDS for field in FIELDS[case]])
def test_goldens_detect_every_field(case, field):
  tokens, want, _, params, config = _golden(case)
  changed = dataclasses.replace(config, **{field: FIELDS[case][field]})
  assert changed != config
  assert np.abs(_logits(params, changed, tokens) - want)[tokens > 0].max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", peer.CASES)
def test_bfloat16_is_as_accurate_as_in_transformers(case):
  tokens, exact, theirs, params, config = _golden(case)
  real = tokens > 0
  fast = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
  ours = _logits(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), fast, tokens)

  def distance(a, b):
    return np.sqrt(np.mean(np.square(a[real] - b[real])))

  # Rounding differs, so this compares its size.
  assert 0 < distance(ours, exact) < 1.2 * distance(theirs, exact)
  assert distance(ours, theirs) < 2 * distance(theirs, exact)


@pytest.mark.parametrize("case", peer.CASES)
def test_live_logits(case, tmp_path):
  pytest.importorskip("transformers")
  made, tokens = peer.model(case, seed=1), peer.tokens()
  # Single rows, so that padding in transformers cannot matter.
  want = [peer.logits(made, row[row > 0][None])[0] for row in tokens]
  peer.save(made, tmp_path)
  params, config = pretrained.load(tmp_path, sharding.make_mesh(devices=jax.devices()[:1]))
  got = _logits(params, config, tokens)
  for b, rows in enumerate(want):
    np.testing.assert_allclose(got[b, : len(rows)], rows, atol=TOLERANCE)


OURS = {
  "gemma1": ("tiny_gemma1", {}),
  "gemma2": ("tiny_gemma2", {"attn_softcap": 1.0, "final_softcap": 2.0, "query_scale": 20**-0.5}),
  "gemma3": ("tiny_gemma3", {"query_scale": 24**-0.5, "final_softcap": 2.0}),
  "gemma3 odd pattern": ("tiny_gemma3", {"pattern": ("global", "local", "local", "global", "global"), "window": 3}),
}


@pytest.mark.parametrize("variant", OURS)
def test_transformers_loads_what_we_save(variant, tmp_path):
  transformers = pytest.importorskip("transformers")
  name, overrides = OURS[variant]
  config = get_config(name, **overrides)
  params = random_params(config, norm_std=0.3)
  hugging_face.save(params, config, tmp_path, bos_id=5, eos_id=[1, 6], pad_id=0, max_shard_bytes=200_000)
  made, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, attn_implementation="eager", output_loading_info=True
  )
  assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert made.dtype.is_floating_point and str(made.dtype) == "torch.float32"
  assert (made.config.bos_token_id, made.config.eos_token_id, made.config.pad_token_id) == (5, [1, 6], 0)
  tokens = peer.tokens()
  real = tokens > 0
  want = peer.logits(made, tokens)
  assert 0.3 < want[real].std() < 30
  np.testing.assert_allclose(_logits(params, config, tokens)[real], want[real], atol=TOLERANCE)
