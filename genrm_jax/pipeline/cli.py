"""The command line of every experiment.

python -m experiments.TASK --config=FILE.py:VARIANT --workdir=DIR [--config.a.b=VALUE] [--stages=...]
genrm-jax TASK --config=NAME:VARIANT --workdir=DIR
"""

import pkgutil
import runpy
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from genrm_jax.pipeline import api, locate, settings, stages
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime import distributed, memory
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say
from genrm_jax.training import preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: FILE.py:VARIANT, or NAME:VARIANT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all files of the run, local or gs://BUCKET/PATH.")
_STAGES = flags.DEFINE_list("stages", [], "Names of stages to run; all if empty.")
_RERUN = flags.DEFINE_bool("rerun", False, "Do stages again whose settings, inputs or results have changed.")
_DISTRIBUTED = flags.DEFINE_enum(
  "distributed", "", ["", "auto"], "auto: detect the processes of a TPU pod, SLURM, Open MPI or GKE."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, if processes are numbered by hand.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Number of processes in the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process, from 0.")
_TIMEOUT = flags.DEFINE_integer("distributed_timeout_s", 300, "Seconds to wait for all processes.")


def main(task: str = "", make: Callable[[Run], list[Stage]] = make_stages) -> None:
  """Runs the stages of an experiment. A UserError ends in one message and exit code 1, SIGTERM in 143, Ctrl-C in 130.

  Args:
    task: required value of `config.task.name`; "" accepts any.
    make: builds the stages of a run.
  """

  def run_main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax logs each internal step
    with one_message(leave=distributed.leave):
      if len(argv) > 1:
        raise UserError(f"{' '.join(argv[1:])}: no such argument; settings are --config.KEY=VALUE, stages --stages=A,B")
      _check_task(task)
      settings.check(_CONFIG.value.to_dict())
      api.use_cpu_devices(_CONFIG.value.cpu_devices)  # before JAX starts
      distributed.start(_distributed_settings())
      memory.keep_freed_memory()
      with preemption.handled():
        run = api.open_run(_CONFIG.value, _WORKDIR.value)
        stages.run_stages(run.workdir, run.config.to_dict(), make(run), _STAGES.value, say, _RERUN.value)

  flags.mark_flags_as_required(["config", "workdir"])
  app.run(run_main, flags_parser=_parse_flags)


def console() -> None:
  """The command `genrm-jax NAME ...`: one of these modules, or an experiment. The current folder is importable."""
  modules = {
    "score": "genrm_jax.pipeline.score_command",
    "suite": "genrm_jax.pipeline.suite_command",
    "serve": "genrm_jax.serve.command",
    "export": "genrm_jax.export",
  }
  for module in pkgutil.iter_modules([str(locate.experiments_folder())]):
    if module.name not in ("configs", "studies"):
      modules[module.name] = f"experiments.{module.name}"
  name = sys.argv[1] if len(sys.argv) > 1 else ""
  if name not in modules:
    print(f"usage: genrm-jax {{{','.join(sorted(modules))}}} ...; genrm-jax NAME --help", file=sys.stderr)
    sys.exit(0 if name in ("-h", "--help") else 1)
  sys.path.insert(0, "")
  sys.argv = [f"genrm-jax {name}", *sys.argv[2:]]
  runpy.run_module(modules[name], run_name="__main__", alter_sys=True)


def _check_task(task: str) -> None:
  given = _CONFIG.value.get("task", {})
  name = given.get("name") if hasattr(given, "get") else None
  if task and name != task:
    raise UserError(f"the config is for task {name!r}, not {task!r}; run it with python -m experiments.run")


def _distributed_settings() -> distributed.Settings:
  auto = _DISTRIBUTED.value == "auto"
  return distributed.Settings(auto, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _TIMEOUT.value)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line with absl; raises one UserError for a config file or key that does not exist."""
  overrides = [a.split("=")[0] for a in argv if a.startswith("--config.")]
  with one_message():
    for i, arg in enumerate(argv):
      if arg.startswith("--config="):
        argv[i] = f"--config={locate.config_path(arg[9:])}"
        api.get_config(arg[9:])  # says what is wrong with a file in one line
    try:
      rest = app.parse_flags_with_usage(argv)
      _CONFIG.value.to_dict()  # a file that failed to load raises only now
    except OSError as e:
      raise UserError(f"cannot load the config: {str(e).splitlines()[-1].strip()}") from e
    except (AttributeError, KeyError) as e:
      if not overrides:
        raise
      inner = e.args[0] if e.args else ""
      key = inner.args[0] if isinstance(inner, KeyError) else inner
      raise UserError(f"{', '.join(overrides)}: the config has no key {str(key).replace(chr(10), '. ')}") from e
  return rest
