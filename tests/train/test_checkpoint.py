"""What is kept and what is deleted; what does not fit is named before an array is read; failed writes harm nothing."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from genrm_jax.pytrees import TrainState
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.train import digests, saved
from genrm_jax.train.checkpoint import Checkpoints

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


def _save_state(directory, state, loss):
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(state, MANIFEST, loss)


def load_params(directory, expected, shardings):
  """Parameters of a run's best whole step, as those who open runs read them."""

  def read(step):
    manifest = saved.read_manifest(step)
    saved.check_manifest(manifest, expected, step)
    return saved.read_params(step, manifest, shardings), manifest["step"]

  return saved.first_whole(saved.find(directory), read)[0]


def _shardings(params):
  return {name: leaf.sharding for name, leaf in params.items()}


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
    assert checkpoints._manager.latest_step() == 5
  assert [p.name for p in saved.find(tmp_path)] == ["5"]


def test_best_and_newest_are_told_apart(tmp_path):
  _save(tmp_path, {1: 0.5, 2: 0.7})
  where = _where(_state(0), _mesh())
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints._manager.latest_step() == 2
    _assert_equal(checkpoints.restore_newest(where, MANIFEST, {})[0], _state(2))
  assert [p.name for p in saved.find(tmp_path)] == ["1", "2"]
  params, step = load_params(tmp_path, {"model": MANIFEST["model"]}, _shardings(where.params))
  assert step == 1
  _assert_equal(params, _state(1).params)


def test_an_empty_run_has_no_steps(tmp_path):
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints._manager.latest_step() is None
    assert checkpoints.restore_newest(_where(_state(0), _mesh()), MANIFEST, {}) is None


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_another_mesh_gets_the_same_numbers(sizes, tmp_path):
  _save(tmp_path, {3: 1.0})
  mesh = _mesh(**sizes)
  where = _where(_state(0), mesh, PartitionSpec("fsdp", "tensor"))
  with Checkpoints(tmp_path) as checkpoints:
    got, _ = checkpoints.restore_newest(where, MANIFEST, {})
  params, _ = load_params(tmp_path, MANIFEST, _shardings(where.params))
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
    checkpoints.restore_newest(where, expected, {})
  assert f"{tmp_path}/1" in str(error.value)
  with pytest.raises(UserError, match=named):
    load_params(tmp_path, expected, _shardings(where.params))


def test_arrays_of_another_shape_or_dtype_are_named_and_are_no_damage(tmp_path):
  _save(tmp_path, {1: 1.0})
  where = _where(_state(0), _mesh())
  other = where.replace(params={**where.params, "norm": where.params["norm"].update(dtype=jnp.float32)})
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.restore_newest(other, MANIFEST, {})
  assert "params/norm is bfloat16[3], the config's is float32[3]" in str(error.value)
  assert _steps(tmp_path) == ["1"]


def test_what_is_no_checkpoint_is_named(tmp_path):
  with pytest.raises(UserError, match=rf"no checkpoint at {tmp_path}/none: check the path"):
    load_params(tmp_path / "none", {}, {})
  assert not (tmp_path / "none").exists()
  with pytest.raises(UserError, match=rf"no finished checkpoint of genrm-jax in {tmp_path}; give a run's folder"):
    load_params(tmp_path, {}, {})
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=f"{tmp_path}/file"):
    load_params(tmp_path / "file", {}, {})


def test_an_unfinished_step_is_passed_over_and_refused_by_name(tmp_path):
  _save(tmp_path, {1: 1.0})
  half = tmp_path / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "1", half)
  shutil.rmtree(half / "state")
  where = _where(_state(0), _mesh())
  with pytest.raises(UserError, match=rf"{half} is unfinished"):
    saved.find(half)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints._manager.latest_step() == 1
    _assert_equal(checkpoints.restore_newest(where, MANIFEST, {})[0], _state(1))
  shutil.rmtree(tmp_path / "1")
  with pytest.raises(
    UserError, match=rf"no finished checkpoint of genrm-jax in {tmp_path} \(unfinished: {half.name}\)"
  ):
    saved.find(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(_state(2), MANIFEST, 0.5)
  assert _steps(tmp_path) == ["2"]
  assert load_params(tmp_path, MANIFEST, _shardings(where.params))[1] == 2


def test_a_step_may_be_moved_and_renamed(tmp_path):
  _save(tmp_path / "run", {7: 1.0})
  shutil.move(tmp_path / "run" / "7", tmp_path / "my_verifier")
  params, step = load_params(tmp_path / "my_verifier", MANIFEST, _shardings(_where(_state(0), _mesh()).params))
  assert step == 7
  _assert_equal(params, _state(7).params)


def test_numpy_needs_no_mesh(tmp_path):
  _save(tmp_path, {1: 1.0})
  (step,) = saved.find(tmp_path)
  params = saved.read_params(step, saved.read_manifest(step), None)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params)) and set(params) == {"w", "norm"}
  _assert_equal(params, _state(1).params)


def test_files_travel_inside(tmp_path):
  (tmp_path / "some.model").write_bytes(b"pieces")
  with Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(_state(1), MANIFEST, 1.0, [tmp_path / "some.model"])
  assert (tmp_path / "run" / "1" / "files" / "some.model").read_bytes() == b"pieces"


# --- damage


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path, place=0.6):
  data = bytearray(path.read_bytes())
  data[int(place * len(data))] ^= 4
  path.write_bytes(data)


def _arrays_of(step):
  """The files that hold arrays; small ones are in two of them."""
  return [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]


DAMAGE = {
  "an array is flipped in one bit": lambda step: _flip_array(step),
  "array files are cut": lambda step: [_cut(p) for p in _arrays_of(step)],
  "array files are gone": lambda step: [p.unlink() for p in _arrays_of(step)],
  "all arrays are gone": lambda step: shutil.rmtree(step / "state"),
  "the tree is cut": lambda step: _cut(step / "state" / "_METADATA"),
  "the manifest is flipped": lambda step: _flip(step / "manifest" / "metadata"),
  "the manifest is cut": lambda step: _cut(step / "manifest" / "metadata"),
  "the manifest is gone": lambda step: shutil.rmtree(step / "manifest"),
}


def _marked(step):
  """A state whose w cannot be compressed and holds a mark."""
  w = np.frombuffer(np.random.default_rng(0).bytes(56) + b"FLIPME!!", np.float32).reshape(8, 2)
  state = _state(step)
  return state.replace(params={**state.params, "w": jnp.asarray(w)})


def _flip_array(step):
  """One bit of w, in place: Orbax reads it back without a word."""
  flipped = [p for p in _arrays_of(step) if b"FLIPME!!" in p.read_bytes()]
  assert flipped
  for path in flipped:
    path.write_bytes(path.read_bytes().replace(b"FLIPME!!", b"FLIPMe!!"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_newest_whole_step_used_instead(damage, tmp_path, capsys):
  _save(tmp_path, {1: 0.9})
  _save_state(tmp_path, _marked(2), 1.0)
  assert _steps(tmp_path) == ["1", "2"]
  DAMAGE[damage](tmp_path / "2")
  where = _where(_state(0), _mesh())
  with Checkpoints(tmp_path) as checkpoints:
    _assert_equal(checkpoints.restore_newest(where, MANIFEST, {})[0], _state(1))
    said = capsys.readouterr().err
    assert f"checkpoint {tmp_path}/2 is damaged" in said and f"{tmp_path}/1 is whole and is used instead" in said
    assert _steps(tmp_path) == ["1", "2.damaged"]
    assert checkpoints._manager.latest_step() == 1
    checkpoints.save(_state(2), MANIFEST, 0.5)  # the run comes there again
  assert _steps(tmp_path) == ["2", "2.damaged"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_the_best_step_is_found_and_of_the_only_one_refused(damage, tmp_path, capsys):
  _save(tmp_path, {1: 5.0, 2: 0.5, 3: 0.7})
  assert _steps(tmp_path) == ["2", "3"]
  shutil.rmtree(tmp_path / "2")
  _save_state(tmp_path / "other", _marked(2), 0.5)
  shutil.move(tmp_path / "other" / "2", tmp_path / "2")
  shardings = _shardings(_where(_state(0), _mesh()).params)
  assert load_params(tmp_path, MANIFEST, shardings)[1] == 2
  DAMAGE[damage](tmp_path / "2")
  params, step = load_params(tmp_path, MANIFEST, shardings)
  assert step == 3
  _assert_equal(params, _state(3).params)
  if "manifest" not in damage:  # without a manifest it is not the best any more: nobody knows its loss
    assert f"{tmp_path}/2 is damaged" in capsys.readouterr().err
  shutil.rmtree(tmp_path / "3")
  with pytest.raises(UserError, match=rf"checkpoint {tmp_path}/2 is damaged.*no other whole step"):
    load_params(tmp_path, MANIFEST, shardings)


def test_a_foreign_checkpoint_is_refused_by_name(tmp_path):
  with ocp.CheckpointManager(tmp_path / "theirs") as manager:
    manager.save(5, args=ocp.args.StandardSave(_state(5).params))
  with pytest.raises(UserError, match=rf"{tmp_path}/theirs/5 is not a checkpoint of genrm-jax"):
    load_params(tmp_path / "theirs", {}, {})
  _save(tmp_path / "old", {1: 1.0})
  path = tmp_path / "old" / "1" / "manifest" / "metadata"
  path.write_text(json.dumps(MANIFEST))
  with pytest.raises(UserError, match=rf"{tmp_path}/old/1 is not a checkpoint of this version"):
    load_params(tmp_path / "old", {}, {})


def test_digests_are_of_the_numbers_and_their_places_on_any_mesh():
  x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
  of = lambda array: digests.of_tree({"x": array})["x"]  # noqa: E731
  spread = jax.device_put(x, NamedSharding(_mesh(fsdp=4, tensor=2), PartitionSpec("tensor", "fsdp")))
  same = [of(x), of(spread), of(np.asarray(x))]
  assert len(set(same)) == 1 and len(same[0]) == 16
  others = [of(x.T), of(x.at[7, 7].add(1)), of(x.reshape(4, 16).at[0, :2].set([1, 0])), of(-x), of(x.astype(jnp.int32))]
  assert len({*same, *others}) == 1 + len(others)
  assert of(jnp.float32(0.0)) != of(jnp.float32(-0.0))

  def flipped(bit):
    bits = np.array(x).view(np.uint32)
    bits[3, 3] ^= np.uint32(1 << bit)
    return bits.view(np.float32)

  flips = {of(flipped(bit)) for bit in range(32)}
  assert len(flips) == 32
  assert of(x.astype(jnp.bfloat16)) != of(x.astype(jnp.float16))


# --- adapters beside frozen parameters


def _adapted(step, base=0.0):
  return TrainState(jnp.int32(step), {"lora": jnp.full(2, step, jnp.float32)}, {}, {"w": jnp.arange(4.0) + base})


@pytest.mark.parametrize("with_frozen", [True, False])
def test_frozen_parameters_are_saved_by_choice_and_never_taken_for_others(with_frozen, tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(_adapted(1), MANIFEST, 1.0, with_frozen=with_frozen)
    where = _where(_adapted(0), _mesh())
    _assert_equal(checkpoints.restore_newest(where, MANIFEST, _adapted(0).frozen)[0], _adapted(1))
    with pytest.raises(UserError, match=rf"{tmp_path}/1 was trained beside other frozen parameters: frozen/w differs"):
      checkpoints.restore_newest(where, MANIFEST, _adapted(0, base=1.0).frozen)
  step = saved.find(tmp_path)[0]
  params = saved.read_params(step, saved.read_manifest(step), None)
  assert set(params) == ({"lora", "w"} if with_frozen else {"lora"})


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
    assert checkpoints._manager.latest_step() == 1
  where = _where(_state(0), _mesh())
  _assert_equal(load_params(tmp_path, MANIFEST, _shardings(where.params))[0], _state(1).params)
  _save(tmp_path, {2: 0.5})
  assert load_params(tmp_path, MANIFEST, _shardings(where.params))[1] == 2


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
  manifest = json.loads((tmp_path / "1" / "manifest" / "metadata").read_text())
  assert {key: manifest[key] for key in MANIFEST} == MANIFEST
  assert (manifest["step"], manifest["eval_loss"]) == (1, 1.0)
  norm = manifest["arrays"]["params/norm"]
  assert (norm["shape"], norm["dtype"], len(norm["digest"])) == ([3], "bfloat16", 16)
