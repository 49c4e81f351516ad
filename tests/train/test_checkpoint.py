"""What is kept and what is deleted; what does not fit is named before an array is read; failed writes harm nothing."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from genrm_jax import sharding
from genrm_jax.errors import UserError
from genrm_jax.train.checkpoint import Checkpoints, load_params
from genrm_jax.types import TrainState

MANIFEST = {"model": {"num_layers": 1, "embed_dim": 32}, "tokenizer_digest": "aaaa", "run": "base"}


def _state(step):
  """A state whose numbers tell its step."""
  params = {"w": jnp.arange(16.0).reshape(8, 2) + 100 * step, "norm": jnp.full(3, step, jnp.bfloat16)}
  return TrainState(jnp.int32(step), params, {"mu": jax.tree.map(lambda x: x / 2, params), "count": jnp.int32(step)})


def _where(tree, mesh, partition=None):
  """Shapes of the state, laid on a mesh: `w` by the given partition, all else replicated."""

  def place(x):
    spec = partition if x.shape == (8, 2) and partition is not None else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def _mesh(**sizes):
  return sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod([*sizes.values(), 1]))])


def _save(directory, losses):
  with Checkpoints(directory) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(_state(step), MANIFEST, loss)


def _steps(directory):
  return sorted(p.name for p in directory.iterdir())


def _assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_newest_and_the_best_are_kept_also_over_a_restart(tmp_path):
  kept = []
  for losses in ({1: 3.0}, {2: 1.0, 3: 2.0}, {4: 5.0}, {5: 0.5}):
    _save(tmp_path, losses)
    kept.append(_steps(tmp_path))
  assert kept == [["1"], ["2", "3"], ["2", "4"], ["5"]]
  with Checkpoints(tmp_path) as checkpoints:
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 5)


def test_best_and_newest_are_told_apart(tmp_path):
  _save(tmp_path, {1: 0.5, 2: 0.7})
  with Checkpoints(tmp_path) as checkpoints:
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 1)
    assert checkpoints.manifest(1) == MANIFEST
    _assert_equal(checkpoints.restore(2, _where(_state(0), _mesh()), MANIFEST), _state(2))
  shapes = _where(_state(0), _mesh())
  params, step = load_params(tmp_path, {"model": MANIFEST["model"]}, shapes.params)
  assert step == 1
  _assert_equal(params, _state(1).params)


def test_an_empty_run_has_no_steps(tmp_path):
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.latest_step() is None and checkpoints.best_step() is None


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_another_mesh_gets_the_same_numbers(sizes, tmp_path):
  _save(tmp_path, {3: 1.0})
  mesh = _mesh(**sizes)
  where = _where(_state(0), mesh, PartitionSpec("fsdp", "tensor"))
  with Checkpoints(tmp_path) as checkpoints:
    got = checkpoints.restore(3, where, MANIFEST)
  params, _ = load_params(tmp_path, MANIFEST, where.params)
  _assert_equal(got, _state(3))
  _assert_equal(params, _state(3).params)
  for state in (got.params, got.opt_state["mu"], params):
    assert state["w"].sharding == where.params["w"].sharding


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"model": {"num_layers": 2, "embed_dim": 32}}, r"model\.num_layers: the checkpoint has 1, the config 2"),
    ({"model": {"num_layers": 1, "embed_dim": 64}}, r"model\.embed_dim: the checkpoint has 32, the config 64"),
    ({"tokenizer_digest": "bbbb"}, r"tokenizer_digest: the checkpoint has 'aaaa', the config 'bbbb'"),
    ({"data": "cccc"}, r"data: the checkpoint has None, the config 'cccc'"),
  ],
)
def test_a_checkpoint_of_something_else_is_refused_before_arrays_are_read(change, named, tmp_path):
  _save(tmp_path, {1: 1.0})
  shutil.rmtree(tmp_path / "1" / "state")
  expected = {**MANIFEST, **change}
  where = _where(_state(0), _mesh())
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=named) as error:
    checkpoints.restore(1, where, expected)
  assert f"{tmp_path}/1" in str(error.value)
  with pytest.raises(UserError, match=named):
    load_params(tmp_path, expected, where.params)


def test_what_is_no_checkpoint_is_named(tmp_path):
  with pytest.raises(UserError, match=rf"no checkpoint at {tmp_path}/none: run the stage"):
    load_params(tmp_path / "none", {}, {})
  assert not (tmp_path / "none").exists()
  with pytest.raises(UserError, match=rf"no finished checkpoint in {tmp_path}: run the stage"):
    load_params(tmp_path, {}, {})
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"{tmp_path}/file"):
    load_params(tmp_path / "file", {}, {})


def test_a_checkpoint_without_its_manifest_is_no_checkpoint(tmp_path):
  _save(tmp_path, {1: 1.0})
  shutil.rmtree(tmp_path / "1" / "manifest")
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=rf"{tmp_path}/1 is not a checkpoint"):
    checkpoints.manifest(1)


def test_a_half_written_step_is_passed_over(tmp_path):
  _save(tmp_path, {1: 1.0})
  half = tmp_path / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "1", half)
  shutil.rmtree(half / "state")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    _assert_equal(checkpoints.restore(1, _where(_state(0), _mesh()), MANIFEST), _state(1))
    checkpoints.save(_state(2), MANIFEST, 0.5)
  assert _steps(tmp_path) == ["2"]
  assert load_params(tmp_path, MANIFEST, _where(_state(0), _mesh()).params)[1] == 2


# As the operating system reports it, and as TensorStore does, which writes the arrays.
FULL = (
  OSError(errno.ENOSPC, "No space left on device"),
  ValueError(
    'RESOURCE_EXHAUSTED: Error writing "params.w/0" in OCDBT database at local file "/x/": Failed writing: "/x/d/6e": '
    "Failed to write 304521 bytes to file 7: No space left on device [os_error_code='28']"
  ),
)


@pytest.mark.parametrize("failure", FULL, ids=lambda e: type(e).__name__)
def test_a_full_disk_is_said_and_earlier_steps_stay(failure, tmp_path, monkeypatch):
  _save(tmp_path, {1: 1.0})
  with Checkpoints(tmp_path) as checkpoints:

    def fail(*args, **kwargs):
      raise failure

    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, "save", fail)
      with pytest.raises(UserError, match=r"checkpoint 2 in .* earlier steps are whole: .*No space left on device; "):
        checkpoints.save(_state(2), MANIFEST, 0.5)
    assert checkpoints.latest_step() == 1
  where = _where(_state(0), _mesh())
  _assert_equal(load_params(tmp_path, MANIFEST, where.params)[0], _state(1).params)
  _save(tmp_path, {2: 0.5})
  assert load_params(tmp_path, MANIFEST, where.params)[1] == 2


def test_a_mistake_in_the_code_is_not_blamed_on_the_disk(tmp_path):
  _save(tmp_path, {1: 1.0})
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="already exists"):
    checkpoints.save(_state(1), MANIFEST, 0.5)


@pytest.mark.parametrize("inside", ["", "base"])
def test_a_folder_that_cannot_be_one_is_named(inside, tmp_path):
  (tmp_path / "file").write_text("mine")
  directory = tmp_path / "file" / inside
  with pytest.raises(UserError, match=f"{directory}.*Not a directory"), Checkpoints(directory) as checkpoints:
    checkpoints.save(_state(1), MANIFEST, 1.0)
  assert (tmp_path / "file").read_text() == "mine"


def test_the_manifest_is_readable_without_this_library(tmp_path):
  _save(tmp_path, {1: 1.0})
  assert json.loads((tmp_path / "1" / "manifest" / "metadata").read_text()) == MANIFEST
