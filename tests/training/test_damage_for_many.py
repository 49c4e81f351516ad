"""Two processes restore the same whole step and stop together, even if only one reads the damage or gets the signal."""

import processes

_RESTORE = """
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import tiny_run
from jax.sharding import NamedSharding, PartitionSpec

from genrm_jax.pytrees import TrainState
from genrm_jax.runtime import distributed, sharding
from genrm_jax.training.checkpoint import Checkpoints

port, index, workdir = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
distributed.start(distributed.Settings(False, f"localhost:{port}", 2, index, 30))
mesh = sharding.make_mesh(fsdp=2)
split = NamedSharding(mesh, PartitionSpec("fsdp"))


def state(step):
  replicated = NamedSharding(mesh, PartitionSpec())
  w = jax.jit(lambda: jax.random.normal(jax.random.key(step), (8, 4096)), out_shardings=split)()
  number = jax.jit(lambda: jnp.int32(step), out_shardings=replicated)()
  return TrainState(number, {"w": w}, {})


def damage_step_2(folder, damage):
  files = [p for p in (folder / "2" / "state").rglob("ocdbt.process_1/d/*") if p.is_file()]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  if damage == "manifest":
    (folder / "2" / "manifest" / "metadata").write_text("{")


target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0))
for damage in ("cut", "manifest"):
  folder = workdir / damage
  with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(state(step), {"run": "tiny"}, 1.0 / (3 - step))
  distributed.barrier()
  distributed.from_main(lambda: damage_step_2(folder, damage))
  with Checkpoints(folder) as checkpoints:
    restored, _ = checkpoints.restore_newest(target, {"run": "tiny"}, {})
    distributed.barrier()
    restored_from = int(restored.step), sorted(p.name for p in folder.iterdir())
    checkpoints.save(state(2), {"run": "tiny"}, 0.1)
  print(damage, *restored_from, sorted(p.name for p in folder.iterdir() if p.name.isdecimal()))
  distributed.barrier()


class SignalledInLastSave(Checkpoints):
  def wait(self):
    if self._saving == tiny_run.NUM_STEPS and index:
      os.kill(os.getpid(), signal.SIGTERM)
    super().wait()


tiny_run.loop.Checkpoints = SignalledInLastSave
tiny_run.train(workdir / "tiny", on=mesh)
print("went on")
"""


def test_all_processes_resume_from_the_same_whole_step(tmp_path):
  port, env = processes.free_port(), {"XLA_FLAGS": "", "PYTHONPATH": f"{processes.ROOT}:{processes.ROOT}/tests/helpers"}
  started = processes.start([["-c", _RESTORE, port, i, tmp_path] for i in range(2)], **env)
  (code, out, error), (other_code, other_out, other_error) = processes.finish(started, timeout=120)
  assert (code, other_code) == (143, 143) and "went on" not in out + other_out, error + other_error
  for stdout in (out, other_out):
    lines = [line for line in stdout.splitlines() if line.startswith(("cut", "manifest"))]
    assert lines == [f"{damage} 1 ['1', '2.damaged'] ['2']" for damage in ("cut", "manifest")]
  assert error.count("/2 is damaged") == 2 and "is damaged" not in other_error
