"""The safetensors format: its own library reads and writes the same; damaged files and full disks."""

import errno
import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from refusals import refused

from genrm_jax.checkpoints import safetensors
from genrm_jax.runtime.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)


def _tensors():
  rng = np.random.default_rng(0)
  return {
    "b.weight": rng.normal(size=(3, 4)).astype(np.float32),
    "a.weight": rng.normal(size=(2, 3, 5)).astype(BF16),
    "half": rng.normal(size=7).astype(np.float16),
    "number": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
  }


def _write(folder, tensors, max_shard_bytes=10**9):
  shapes = [(name, t.dtype, t.shape) for name, t in tensors.items()]
  with safetensors.new_files(epath.Path(folder)) as create:
    safetensors.write(create, tensors.items(), shapes, max_shard_bytes)
  return epath.Path(folder)


def _read(folder):
  found = {}
  for path in sorted(folder.glob("*.safetensors")):
    for name, entry in safetensors.read_index(path).items():
      assert name not in found
      found[name] = safetensors.read_tensor(path, entry)
  return found


def _assert_same(got, want):
  assert set(got) == set(want)
  for name, tensor in want.items():
    assert (got[name].dtype, got[name].shape, got[name].tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())


def test_round_trip(tmp_path, monkeypatch):
  folder = _write(tmp_path / "new" / "folder", _tensors())
  assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
  _assert_same(_read(folder), _tensors())
  matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
  _assert_same(_read(_write(tmp_path / "view", {"w": matrix.T})), {"w": np.ascontiguousarray(matrix.T)})
  monkeypatch.setattr(safetensors, "_BLOCK_BYTES", 10)
  _assert_same(_read(_write(tmp_path / "blocks", _tensors())), _tensors())


def test_shards_and_their_index(tmp_path):
  folder = _write(tmp_path, _tensors(), max_shard_bytes=62)
  names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  assert sorted(path.name for path in folder.iterdir()) == [*names, "model.safetensors.index.json"]
  _assert_same(_read(folder), _tensors())
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  want = dict(zip(_tensors(), [names[0], names[1], names[2], names[2], names[2]], strict=True))
  assert index == {"metadata": {"total_size": 126}, "weight_map": want}


def test_the_safetensors_library_reads_and_writes_the_same(tmp_path):
  library = pytest.importorskip("safetensors")
  library_numpy = pytest.importorskip("safetensors.numpy")
  path = _write(tmp_path / "ours", _tensors()) / "model.safetensors"
  _assert_same(library_numpy.load_file(path), _tensors())
  with library.safe_open(path, "numpy") as f:
    assert f.metadata() == {"format": "pt"}
  (tmp_path / "theirs").mkdir()
  library_numpy.save_file(_tensors(), tmp_path / "theirs" / "model.safetensors", {"format": "np"})
  _assert_same(_read(epath.Path(tmp_path / "theirs")), _tensors())


def test_tensors_of_other_dtypes_and_truncated_ones_are_listed_and_not_read(tmp_path):
  entries = {"packed": ("U8", [3, 2], [0, 6]), "w": ("F32", [2], [6, 14])}
  named = {name: dict(zip(("dtype", "shape", "data_offsets"), e, strict=True)) for name, e in entries.items()}
  header, path = json.dumps(named).encode(), epath.Path(tmp_path / "model.safetensors")
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(14))
  index, whole = safetensors.read_index(path), path.read_bytes()
  assert index["packed"].shape == (3, 2)
  path.write_bytes(whole + b"x")
  refused(("malformed", safetensors.read_index, path))
  path.write_bytes(whole)
  refused((r"U8.*BF16", safetensors.read_tensor, path, index["packed"]))
  path.write_bytes(path.read_bytes()[:-1])
  refused(("truncated since", safetensors.read_tensor, path, index["w"]))


@pytest.mark.parametrize(
  ("stop", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space"), UserError)]
)
def test_files_get_their_names_after_all_are_written_and_a_stop_or_full_disk_leaves_none(stop, raised, tmp_path):
  (tmp_path / "tokenizer.model").write_text("stays")

  def tensors():
    yield "a", np.zeros(10, np.float32)
    assert not list(tmp_path.glob("*.safetensors")) and list(tmp_path.glob("*.partial"))
    raise stop

  shapes = [(name, np.dtype(np.float32), (10,)) for name in "ab"]
  with pytest.raises(raised), safetensors.new_files(epath.Path(tmp_path)) as create:
    safetensors.write(create, tensors(), shapes, 50)
  assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
