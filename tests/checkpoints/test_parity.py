"""Logits match transformers and the `gemma` package: their goldens everywhere, and live where they are installed."""

import dataclasses
import functools

import flax.traverse_util
import gemma_package
import hugging_face as peer
import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from make_goldens import our_logits
from random_params import random_params

from genrm_jax.checkpoints import hugging_face, pretrained, released
from genrm_jax.model import gemma
from genrm_jax.model.config import SIZES, get_config
from genrm_jax.runtime import sharding

TOLERANCE = 1e-4
# Files of transformers say what model they hold, those of the gemma package do not.
CONFIGS = {**dict.fromkeys(peer.CASES), **{name: case.config for name, case in gemma_package.CASES.items()}}
# Changes of the config that a golden must detect.
FIELDS = {
  "hf_gemma1_mqa": {"rope_base_global": 1e6},
  "hf_gemma2": dict(attn_softcap=None, final_softcap=None, query_scale=8**-0.5, window=6, rope_base_local=1e6),
  "hf_gemma3": dict(rope_base_global=1e4, rope_scale_global=1.0, window=4, pattern=("local", "global")),
}


def _mesh(num_devices=1):
  if num_devices == 1:
    return sharding.make_mesh(devices=jax.devices()[:1])
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@functools.cache
def _golden(case):
  return make_goldens.open_golden(case, CONFIGS[case])


_ON_EIGHT = ("hf_gemma1_mqa", "hf_gemma3_images", "gemma_1_mqa", "gemma_3")


@pytest.mark.parametrize(("case", "num_devices"), [*((c, 1) for c in CONFIGS), *((c, 8) for c in _ON_EIGHT)])
def test_golden_logits(case, num_devices):
  golden, params, config = _golden(case)
  tokens, want, mesh = golden["tokens"], golden["logits"], _mesh(num_devices)
  real = tokens > 0
  assert 0.3 < want[real].std() < 30
  assert real.sum(1).max() > 2 * (config.window or 0), "no row is longer than the reach of the windows"
  if num_devices > 1:
    _, params, _ = make_goldens.open_golden(case, CONFIGS[case], mesh)
    want_shardings = sharding.param_shardings(gemma.param_specs(config), mesh, config.rules)
    jax.tree.map(lambda p, s: np.testing.assert_(p.sharding.is_equivalent_to(s, p.ndim)), params, want_shardings)
  np.testing.assert_allclose(our_logits(params, config, tokens, mesh)[real], want[real], atol=TOLERANCE)


@pytest.mark.parametrize(("case", "field"), [(case, field) for case in FIELDS for field in FIELDS[case]])
def test_goldens_detect_every_field(case, field):
  golden, params, config = _golden(case)
  changed = dataclasses.replace(config, **{field: FIELDS[case][field]})
  assert changed != config
  difference = np.abs(our_logits(params, changed, golden["tokens"]) - golden["logits"])
  assert difference[golden["tokens"] > 0].max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", ["hf_gemma1_mqa", "hf_gemma2", "hf_gemma3"])
def test_bfloat16_is_as_accurate_as_in_transformers(case):
  golden, params, config = _golden(case)
  exact, theirs, real = golden["logits"], golden["logits_bfloat16"], golden["tokens"] > 0
  fast = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
  ours = our_logits(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), fast, golden["tokens"])

  def distance(a, b):
    return np.sqrt(np.mean(np.square(a[real] - b[real])))

  # Rounding differs, so this compares its size.
  assert 0 < distance(ours, exact) < 1.2 * distance(theirs, exact)
  assert distance(ours, theirs) < 2 * distance(theirs, exact)


@pytest.mark.parametrize("case", peer.CASES)
def test_live_logits_of_transformers(case, tmp_path):
  pytest.importorskip("transformers")
  made, tokens = peer.model(case, seed=1), peer.tokens()
  # Single rows, so that padding in transformers cannot matter.
  want = [peer.logits(made, row[row > 0][None])[0] for row in tokens]
  peer.save(made, tmp_path)
  params, config = pretrained.load(tmp_path, _mesh())
  np.testing.assert_allclose(our_logits(params, config, tokens)[tokens > 0], np.concatenate(want), atol=TOLERANCE)


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
  want = peer.logits(made, tokens)[tokens > 0]
  assert 0.3 < want.std() < 30
  np.testing.assert_allclose(our_logits(params, config, tokens)[tokens > 0], want, atol=TOLERANCE)


@pytest.fixture(scope="module")
def gm():
  """The gemma package. Its import succeeds even where it is broken, so this uses one of its names."""
  gm = pytest.importorskip("gemma.gm", reason="the gemma package is not installed", exc_type=ImportError)
  try:
    gm.text.Gemma3Tokenizer  # noqa: B018
  except Exception as e:
    pytest.skip(f"the gemma package does not work here: {e}")
  return gm


@pytest.mark.parametrize("name", gemma_package.CASES)
def test_the_gemma_package_and_this_library_read_each_other(gm, name, tmp_path):
  from gemma.gm.ckpts import _checkpoint

  # The form that the golden of the case does not have; other sizes of Gemma 2 follow the default of the package.
  case = gemma_package.CASES[name]
  case = case._replace(flat=not case.flat, transposed=case.config.qk_norm)
  tokens = _golden(name)[0]["tokens"]
  model, theirs = gemma_package.random_model(case)
  want = gemma_package.logits(model, theirs, tokens)
  tree = _checkpoint._nested_to_flat(theirs) if case.flat else theirs
  gm.ckpts.save_params(tree, tmp_path / "theirs", wait_until_finished=True)
  params, config = pretrained.load(tmp_path / "theirs", _mesh(), config=case.config)
  np.testing.assert_allclose(our_logits(params, config, tokens)[tokens > 0], want[tokens > 0], atol=TOLERANCE)

  for nested in (False, True):
    released.save(params, config, tmp_path / f"ours_{nested}", nested=nested)
    read = gm.ckpts.load_params(tmp_path / f"ours_{nested}")
    assert set(flax.traverse_util.flatten_dict(read, sep="/")) == {t.name for t in released.tensors(config)}
    theirs = {**theirs, **read, "embedder": {**theirs["embedder"], **read["embedder"]}}
    np.testing.assert_array_equal(gemma_package.logits(model, theirs, tokens), want)


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith(("gemma2_", "gemma3_"))])
def test_released_sizes_have_the_shapes_of_the_gemma_package(gm, name):
  options = {"text_only": True} if name in ("gemma3_4b", "gemma3_12b", "gemma3_27b") else {}
  model = getattr(gm.nn, "Gemma" + name.removeprefix("gemma").upper())(**options)
  theirs = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(theirs, sep="/").items()}
  assert shapes == {tensor.name: tensor.shape for tensor in released.tensors(SIZES[name])}
