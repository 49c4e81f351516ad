import launchers
import pytest


@pytest.fixture
def bench(request, tmp_path):
  """Stubs for the launcher that the test's module is about."""
  return launchers.bench_of(tmp_path, request.path.stem.removeprefix("test_") + ".sh")
