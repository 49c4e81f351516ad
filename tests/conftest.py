"""What all tests share. The environment is set here, before anything imports jax."""

import os
import tempfile

import quick_compiles

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  flags = [os.environ.get("XLA_FLAGS", ""), quick_compiles.XLA_FLAGS, "--xla_force_host_platform_device_count=8"]
  os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A folder for this test run: its workers, and the processes that tests start, inherit it and share what is in it.
if "GENRM_TESTS_SHARED" not in os.environ:
  _shared = tempfile.TemporaryDirectory(prefix="genrm-tests-", ignore_cleanup_errors=True)
  os.environ["GENRM_TESTS_SHARED"] = _shared.name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["GENRM_TESTS_SHARED"], "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import fcntl
import functools
import pathlib

import gemma_like
import processes
import pytest

from genrm_jax.text import tokenizer as tokenizers

# Folders without JAX, and files whose JAX others test too: these are the same on every Python.
_ONE_PYTHON = {
  *("data", "evals", "launch", "plan", "serve", "studies", "tasks", "text"),
  *("dpo", "easy_to_hard", "export", "extending", "gcs", "gguf", "install", "library", "names"),
  *("parity", "smoke", "two_processes", "verifiers", "docs_site", "score_file", "suite"),
}


# Files that take longest, the longest first: begun last, one of them would keep one core waiting.
_LONGEST = (
  *(
    "two_processes",
    "smoke",
    "gcs",
    "device_splits",
    "plan",
    "library",
    "trained",
    "distributed",
    "serve",
    "engine",
    "export",
  ),
  *("stages", "install", "extending", "configs", "loop", "sweep", "easy_to_hard", "step"),
)


def pytest_collection_modifyitems(items):
  def name(item):
    return item.path.stem.removeprefix("test_")

  for item in items:
    if {item.path.parent.name, name(item)} & _ONE_PYTHON:
      item.add_marker(pytest.mark.one_python)
  items.sort(key=lambda item: _LONGEST.index(name(item)) if name(item) in _LONGEST else len(_LONGEST))


@pytest.fixture(scope="session")
def smoke_run() -> pathlib.Path:
  """A workdir after `python -m experiments.last_letter --config=last_letter:smoke`, for all workers to read."""
  shared = pathlib.Path(os.environ["GENRM_TESTS_SHARED"])
  workdir, log = shared / "last_letter", shared / "last_letter.log"
  with (shared / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not log.exists():
      done = processes.run("-m", "experiments.last_letter", "--config=last_letter:smoke", f"--workdir={workdir}")
      assert (done.returncode, done.stdout) == (0, ""), done.stderr
      log.write_text(done.stderr)
  return workdir


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):

  @functools.cache
  def make(name):
    path = tmp_path_factory.mktemp(name) / f"{name}.model"
    if name == "char":
      return tokenizers.CharTokenizer()
    if name == "trained":
      return tokenizers.train_sentencepiece(gemma_like.TEXTS, path, vocab_size=500)
    return gemma_like.write(path, family=int(name[-1]))

  return make


@pytest.fixture(scope="session", params=["char", "trained", "gemma2", "gemma3"])
def tokenizer(request, make_tokenizer):
  return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def trained(make_tokenizer):
  return make_tokenizer("trained")


@pytest.fixture(scope="session")
def gemma(make_tokenizer):
  return make_tokenizer("gemma3")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The folder that holds clones of public data: GENRM_DATA_DIR, else ../shared/data beside the repository."""
  default = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
  folder = pathlib.Path(os.environ.get("GENRM_DATA_DIR", default))
  if not folder.is_dir():
    pytest.skip(f"no data at {folder}; set GENRM_DATA_DIR to the folder that holds clones of the public data")
  return folder
