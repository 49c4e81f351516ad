"""Logits match the `gemma` package: on checkpoints that it saved, and live in both directions where it is installed."""

import dataclasses
import functools
import pathlib

import flax.traverse_util
import gemma_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.checkpoints import pretrained, released
from genrm_jax.model import gemma
from genrm_jax.model.config import SIZES
from genrm_jax.runtime import sharding

GOLDENS = pathlib.Path(__file__).parents[1] / "peers" / "goldens"
CASES = gemma_package.CASES
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def gm():
  """The gemma package. Its import succeeds even where it is broken, so this uses one of its names."""
  gm = pytest.importorskip("gemma.gm", reason="the gemma package is not installed", exc_type=ImportError)
  try:
    gm.text.Gemma3Tokenizer  # noqa: B018
  except Exception as e:
    pytest.skip(f"the gemma package does not work here: {e}")
  return gm


def _mesh(devices):
  if devices == 1:
    return sharding.make_mesh(devices=jax.devices()[:1])
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@functools.cache
def _golden(name):
  with np.load(GOLDENS / name / "logits.npz") as golden:
    return golden["tokens"], golden["logits"]


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, tokens, positions, segments):
  x, _ = gemma.forward(params, config, tokens, positions, segments)
  return gemma.unembed(params, config, x)


def _difference(params, config, mesh, tokens, want):
  """Largest difference outside padding (token 0)."""
  real = tokens > 0
  rows = tokens, np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32), real.astype(np.int32)
  with jax.set_mesh(mesh):
    got = _logits(params, config, *sharding.host_to_global(rows, sharding.batch_sharding(mesh)))
  return np.abs(np.asarray(got) - want)[real].max()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_golden_logits(name, devices):
  mesh, (tokens, want) = _mesh(devices), _golden(name)
  assert 0.3 < want[tokens > 0].std() < 30
  assert tokens.shape[1] > 2 * (CASES[name].config.window or 0)
  params, config = pretrained.load(GOLDENS / name / "checkpoint", mesh, config=CASES[name].config)
  assert _difference(params, config, mesh, tokens, want) < TOLERANCE


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("gemma_1_mqa", "rope_base_global", 1_000.0),
    ("gemma_2", "attn_softcap", None),
    ("gemma_2", "final_softcap", None),
    ("gemma_2", "query_scale", 8**-0.5),
    ("gemma_2", "window", 7),
    ("gemma_3", "rope_base_local", 1_000_000.0),
    ("gemma_3", "rope_base_global", 10_000.0),
    ("gemma_3", "rope_scale_global", 1.0),
    ("gemma_3", "window", 5),
  ],
)
def test_goldens_detect_every_field_outside_the_files(name, field, value):
  tokens, want = _golden(name)
  wrong = dataclasses.replace(CASES[name].config, **{field: value})
  params, _ = pretrained.load(GOLDENS / name / "checkpoint", _mesh(1), config=CASES[name].config)
  assert _difference(params, wrong, _mesh(1), tokens, want) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_package_and_this_library_read_each_other(gm, name, tmp_path):
  from gemma.gm.ckpts import _checkpoint

  # The form that the golden of the case does not have; other sizes of Gemma 2 follow the default of the package.
  case = CASES[name]._replace(flat=not CASES[name].flat, transposed=CASES[name].config.qk_norm)
  tokens, _ = _golden(name)
  model, theirs = gemma_package.random_model(case)
  want = gemma_package.logits(model, theirs, tokens)
  tree = _checkpoint._nested_to_flat(theirs) if case.flat else theirs
  gm.ckpts.save_params(tree, tmp_path / "theirs", wait_until_finished=True)
  params, config = pretrained.load(tmp_path / "theirs", _mesh(1), config=case.config)
  assert _difference(params, config, _mesh(1), tokens, want) < TOLERANCE

  for nested in (False, True):
    released.save(params, config, tmp_path / f"ours_{nested}", nested=nested)
    read = gm.ckpts.load_params(tmp_path / f"ours_{nested}")
    assert set(flax.traverse_util.flatten_dict(read, sep="/")) == {t.name for t in released.tensors(config)}
    theirs = {**theirs, **read, "embedder": {**theirs["embedder"], **read["embedder"]}}
    np.testing.assert_array_equal(gemma_package.logits(model, theirs, tokens), want)


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith(("gemma2_", "gemma3_"))])
def test_released_sizes_have_the_shapes_of_the_package(gm, name):
  options = {"text_only": True} if name in ("gemma3_4b", "gemma3_12b", "gemma3_27b") else {}
  model = getattr(gm.nn, "Gemma" + name.removeprefix("gemma").upper())(**options)
  theirs = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(theirs, sep="/").items()}
  assert shapes == {tensor.name: tensor.shape for tensor in released.tensors(SIZES[name])}
