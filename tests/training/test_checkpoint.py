"""Which steps are kept; damage, mismatches and failed writes are detected and named, and leave other steps intact."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from refusals import refused

from genrm_jax.pytrees import TrainState
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import digests, saved
from genrm_jax.training.checkpoint import Checkpoints

MANIFEST = {"model": {"num_layers": 1, "embed_dim": 32}, "tokenizer_digest": "aaaa", "run": "base"}


def _state(step):
  """A state whose numbers depend on its step; `w` cannot be compressed, and contains a marker to damage."""
  w = np.frombuffer(np.random.default_rng(step).bytes(56) + b"FLIPME!!", np.float32).reshape(8, 2)
  params = {"w": jnp.asarray(w), "norm": jnp.full(3, step, jnp.bfloat16)}
  return TrainState(jnp.int32(step), params, {"mu": jax.tree.map(lambda x: x / 2, params), "count": jnp.int32(step)})


def _mesh(**sizes):
  return sharding.make_mesh(**sizes, devices=jax.devices()[: int(np.prod([*sizes.values(), 1]))])


def _target(tree, mesh=None, partition=None):
  """Shapes of the state with shardings: `w` by the given partition, all else replicated."""

  def place(x):
    spec = partition if x.shape == (8, 2) and partition is not None else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh or _mesh(), spec))

  return jax.tree.map(place, tree)


TARGET = _target(_state(0))


def _save(directory, losses):
  with Checkpoints(directory) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(_state(step), MANIFEST, loss)


def _load_params(directory, expected=MANIFEST, target=TARGET):

  def read(step):
    manifest = saved.read_manifest(step)
    saved.check_manifest(manifest, expected, step)
    shardings = {name: leaf.sharding for name, leaf in target.params.items()}
    return saved.read_params(step, manifest, shardings), manifest["step"]

  return saved.first_whole(saved.find(directory), read)[0]


def _steps(directory):
  return sorted(p.name for p in directory.iterdir())


def _assert_equal(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


def test_newest_and_best_are_kept_across_restarts(tmp_path):
  kept = []
  for losses in ({1: 3.0}, {2: 1.0, 3: 2.0}, {4: 5.0}, {5: 0.5}):
    _save(tmp_path, losses)
    kept.append(_steps(tmp_path))
    for step in tmp_path.iterdir():  # a file of earlier versions, cut
      (step / "metrics").mkdir(exist_ok=True)
      (step / "metrics" / "metrics").write_text("{")
  assert kept == [["1"], ["2", "3"], ["2", "4"], ["5"]]


def test_training_resumes_from_the_newest_step_and_readers_get_the_best(tmp_path):
  (tmp_path / "some.model").write_bytes(b"pieces")
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.restore_newest(TARGET, MANIFEST, {}) is None
    checkpoints.save(_state(1), MANIFEST, 0.5, [tmp_path / "some.model"])
  # Readable without this library.
  assert (tmp_path / "run" / "1" / "files" / "some.model").read_bytes() == b"pieces"
  manifest = json.loads((tmp_path / "run" / "1" / "manifest" / "metadata").read_text())
  assert {**MANIFEST, "step": 1, "eval_loss": 0.5}.items() <= manifest.items()
  norm = manifest["arrays"]["params/norm"]
  assert (norm["shape"], norm["dtype"], len(norm["digest"])) == ([3], "bfloat16", 16)
  _save(tmp_path / "run", {2: 0.7})
  # On another mesh, and from another folder.
  target = _target(_state(0), _mesh(data=2, fsdp=2, tensor=2), PartitionSpec("fsdp", "tensor"))
  with Checkpoints(tmp_path / "run") as checkpoints:
    got = checkpoints.restore_newest(target, MANIFEST, {})[0]
  shutil.move(tmp_path / "run", tmp_path / "moved")
  params, step = _load_params(tmp_path / "moved", {"model": MANIFEST["model"]}, target)
  assert step == 1
  _assert_equal((got, params), (_state(2), _state(1).params))
  for tree in (got.params, got.opt_state["mu"], params):
    assert tree["w"].sharding == target.params["w"].sharding
  shutil.move(tmp_path / "moved" / "2", tmp_path / "my_verifier")
  (folder,) = saved.find(tmp_path / "my_verifier")
  params = saved.read_params(folder, saved.read_manifest(folder), None)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
  _assert_equal(params, _state(2).params)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_state_may_be_donated_while_it_is_being_written(num_devices, tmp_path):
  w, spec = np.random.default_rng(0).normal(size=(1 << 20, 2)).astype(np.float32), PartitionSpec("fsdp")
  w_on_devices = jax.device_put(w, NamedSharding(_mesh(fsdp=num_devices), spec))
  state = TrainState(jnp.int32(1), {"w": w_on_devices}, {})
  target = _target(state)
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 + 7, tree), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, MANIFEST, 1.0)
    jax.block_until_ready(overwrite(state.params))
  with Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore_newest(target, MANIFEST, {})
  np.testing.assert_array_equal(restored.params["w"], w)


# As the operating system reports it, and as TensorStore, which writes the arrays, does.
_FULL = OSError(errno.ENOSPC, "No space left on device")
_STORE_FULL = ValueError(
  'RESOURCE_EXHAUSTED: Error writing "params.w/0" in OCDBT database at local file "/x/": Failed writing: "/x/d/6e": '
  "Failed to write 304521 bytes to file 7: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize(("failure", "in_background"), [(_FULL, False), (_STORE_FULL, True)])
def test_a_full_disk_is_one_message_and_earlier_steps_stay(failure, in_background, tmp_path, monkeypatch, capfd):
  def fail(*args, **kwargs):
    raise failure

  _save(tmp_path, {1: 1.0})
  message = r"checkpoint 2 in .*No space left on device; "
  with monkeypatch.context() as patch, pytest.raises(UserError, match=message), Checkpoints(tmp_path) as checkpoints:
    # The last act of a save: Orbax renames the folder to its final name.
    for place, name in ((os, "rename"), (os, "replace")) if in_background else ((checkpoints._manager, "save"),):
      patch.setattr(place, name, fail)
    checkpoints.save(_state(2), MANIFEST, 0.5)
    checkpoints.wait()
  assert "Traceback" not in capfd.readouterr().err
  _assert_equal(_load_params(tmp_path)[0], _state(1).params)
  _save(tmp_path, {2: 0.5})
  assert _load_params(tmp_path)[1] == 2


def test_disk_errors_are_named_and_bugs_are_not_disk_errors(tmp_path):
  (tmp_path / "file").write_text("a file")
  refused((r"file/base.*Not a directory", Checkpoints, tmp_path / "file" / "base"))
  _save(tmp_path, {1: 1.0})
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="already exists"):
    checkpoints.save(_state(1), MANIFEST, 0.5)


def test_a_checkpoint_of_another_run_is_refused_before_arrays_are_read(tmp_path):
  _save(tmp_path, {1: 1.0})
  norm = TARGET.params["norm"]
  other = TARGET.replace(params={**TARGET.params, "norm": norm.update(dtype=jnp.float32)})
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"params/norm is bfloat16.*float32"):
    checkpoints.restore_newest(other, MANIFEST, {})
  assert _steps(tmp_path) == ["1"], "not reported as damage"
  shutil.rmtree(tmp_path / "1" / "state")
  for change, named in (
    ({"model": {"num_layers": 2, "embed_dim": 32}}, r"model\.num_layers: .* 1, .* 2"),
    ({"tokenizer_digest": "bbbb"}, "tokenizer_digest: .*'aaaa'.*'bbbb'"),
    ({"data": "cccc"}, "data: .*None.*'cccc'"),
  ):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=rf"(?s){tmp_path}/1.*{named}"):
      checkpoints.restore_newest(TARGET, {**MANIFEST, **change}, {})


def test_a_path_without_a_checkpoint_of_this_library_is_named(tmp_path):
  (tmp_path / "empty").mkdir()
  with ocp.CheckpointManager(tmp_path / "foreign") as manager:
    manager.save(5, args=ocp.args.StandardSave(_state(5).params))
  _save(tmp_path / "old", {1: 1.0})
  (tmp_path / "old" / "1" / "manifest" / "metadata").write_text(json.dumps(MANIFEST))
  shutil.copytree(tmp_path / "old" / "1", tmp_path / "2.orbax-checkpoint-tmp")
  for name, message in (
    ("2.orbax-checkpoint-tmp", "unfinished"),
    ("none", "no checkpoint at"),
    ("empty", "no finished checkpoint"),
    ("foreign", "foreign/5 is not a checkpoint of genrm-jax"),
    ("old", "old/1 is not a checkpoint of this version"),
  ):
    refused((message, _load_params, tmp_path / name))


@pytest.mark.parametrize("with_frozen", [True, False])
def test_frozen_parameters_are_optional_in_a_checkpoint_and_always_checked(with_frozen, tmp_path):
  def adapted(step, base=0.0):
    return TrainState(jnp.int32(step), {"lora": jnp.full(2, step, jnp.float32)}, {}, {"w": jnp.arange(4.0) + base})

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(adapted(1), MANIFEST, 1.0, with_frozen=with_frozen)
    checkpoints.wait()
    target = _target(adapted(0))
    _assert_equal(checkpoints.restore_newest(target, MANIFEST, adapted(0).frozen)[0], adapted(1))
    message = f"{tmp_path}/1 was trained beside other frozen parameters: frozen/w differs"
    refused((message, checkpoints.restore_newest, target, MANIFEST, adapted(0, base=1.0).frozen))
  step = saved.find(tmp_path)[0]
  params = saved.read_params(step, saved.read_manifest(step), None)
  assert set(params) == ({"lora", "w"} if with_frozen else {"lora"})


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _arrays_of(step):
  """The files that hold arrays; small arrays are in two of them."""
  return [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]


def _replace(path, old, new):
  assert old in path.read_bytes()
  path.write_bytes(path.read_bytes().replace(old, new))


def _flip_array(step):
  """Flips one bit of `w`: Orbax restores it without an error."""
  for path in _arrays_of(step):
    if b"FLIPME!!" in path.read_bytes():
      _replace(path, b"FLIPME!!", b"FLIPMe!!")


def _empty(step):
  shutil.rmtree(step)
  step.mkdir()


DAMAGE = {
  "the folder is empty": _empty,
  "an array is flipped in one bit": _flip_array,
  "array files are cut": lambda step: [_cut(p) for p in _arrays_of(step)],
  "the manifest is another": lambda step: _replace(
    step / "manifest" / "metadata", b'"eval_loss": 0.5', b'"eval_loss": 0.4'
  ),
  "the manifest is gone": lambda step: shutil.rmtree(step / "manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_another_whole_step_used_instead(damage, tmp_path, capsys):
  """Step 2 is the newest and the best, and is damaged twice."""
  _save(tmp_path, {1: 0.9})
  _save(tmp_path / "other", {2: 0.5})
  shutil.move(tmp_path / "other" / "2", tmp_path / "2")
  (tmp_path / "other").rmdir()
  assert _load_params(tmp_path)[1] == 2
  shutil.copytree(tmp_path / "1", tmp_path.parent / f"{tmp_path.name}_1")
  for kept in (["2.damaged"], ["2.damaged", "2.damaged_2"]):
    DAMAGE[damage](tmp_path / "2")
    params, step = _load_params(tmp_path)
    assert step == 1
    _assert_equal(params, _state(1).params)
    with Checkpoints(tmp_path) as checkpoints:
      _assert_equal(checkpoints.restore_newest(TARGET, MANIFEST, {})[0], _state(1))
      stderr = capsys.readouterr().err
      assert f"{tmp_path}/2 is " in stderr and f"{tmp_path}/1 is whole" in stderr
      assert _steps(tmp_path) == ["1", *kept]
      checkpoints.save(_state(2), MANIFEST, 0.5)  # the run reaches that step again
    assert _steps(tmp_path) == ["2", *kept]
    shutil.copytree(tmp_path.parent / f"{tmp_path.name}_1", tmp_path / "1")
  message = rf"{tmp_path}/2.damaged(: | is damaged.*no other whole step|; give)"
  refused((message, _load_params, tmp_path / "2.damaged"))


def test_digests_depend_on_every_bit_dtype_and_order_and_not_on_the_mesh():
  def of(array):
    return digests.of_tree({"x": array})["x"]

  def flipped(bit):
    bits = np.array(x).view(np.uint32)
    bits[3, 3] ^= np.uint32(1 << bit)
    return bits.view(np.float32)

  x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
  spread = jax.device_put(x, NamedSharding(_mesh(fsdp=4, tensor=2), PartitionSpec("tensor", "fsdp")))
  assert of(x) == of(spread) == of(np.asarray(x)) and len(of(x)) == 16
  others = [x.T, x.reshape(4, 16).at[0, :2].set([1, 0]), -x, x.astype(jnp.int32), *map(flipped, range(32))]
  others += [jnp.float32(0.0), jnp.float32(-0.0), x.astype(jnp.bfloat16), x.astype(jnp.float16)]
  assert len({of(x), *map(of, others)}) == 1 + len(others)
