"""Will it fit, and how long will it take? Compiles a config for a slice of TPUs, on a machine that has none.

    python -m experiments.plan --config=gsm8k:gemma2_9b --topology=v5p:2x2x4
      [--verifier=genrm_cot] [--search] [--solutions=21104] [--config.a.b=VALUE]

For each verifier of the config, or those named: the training step, and what scoring runs on each host, compiled by the
TPU compiler (pip install 'genrm-jax[plan]'; any Linux x86_64 machine, minutes of CPU per program). Shows the bytes per
chip by content, how many programs a run compiles, and lower bounds of time from the chip's published rates. With
--search the settings that decide memory are tried, the fastest first, until they fit.
"""

import time

import jax
from absl import app, flags, logging

from experiments.plan import costs, programs, search, tpus
from experiments.plan.compiling import Memory
from experiments.plan.planned import PlannedRun, planned
from genrm_jax.pipeline import api, cli
from genrm_jax.runtime.errors import UserError, one_message

_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice: KIND:SHAPE, such as v5e:2x2.")
_VERIFIER = flags.DEFINE_list("verifier", [], "Verifiers of the config, by name; all if empty.")
_SEARCH = flags.DEFINE_bool("search", False, "Try settings until they fit.")
_SOLUTIONS = flags.DEFINE_integer("solutions", costs.GSM8K_SOLUTIONS, "How many solutions are scored.", lower_bound=1)


def show(run: PlannedRun, name: str, num_solutions: int, searches: bool) -> str:
  """The plan of one verifier, as text."""
  parts = ["training", "scoring"] if run.verifier(name).is_trained else ["scoring"]
  plan = search.plan(run, name, parts, num_solutions, searches)
  lines = [f"--config.{key}={value}" for key, value in plan.changes.items()] + [*map(_memory_line, plan.programs)]
  if not plan.fits:
    lines.append("To fit: --search, a larger slice, adapters (lora.rank), or a smaller engine.rows_per_batch")
  training, scoring = programs.num_compilations(run.changed(plan.changes), name)
  each = ", ".join(f"{n} {program}" for program, n in scoring.items())
  lines.append(f"compilations: {training} for training, at most {sum(scoring.values())} for scoring ({each})")
  lines += [f"{e.what}: at least {costs.ms_text(e.seconds)} ({e.limit}), {e.number:,} times" for e in plan.estimates]
  whats = {"training": "training", "scoring": f"scoring {num_solutions:,} solutions"}
  lines += [f"{whats[total['what']]}: at least {total['hours']:,.2g} hours" for total in plan.totals]
  return "\n  ".join([f"{name}:", *lines])


def _memory_line(memory: Memory) -> str:
  parts = " + ".join(f"{part} {size / 2**20:,.2f}" for part, size in memory.parts.items())
  how = "by arithmetic, not compiled" if memory.seconds is None else f"compiled in {memory.seconds:.0f} s"
  size = f"{memory.total / 2**20:,.2f} of {memory.limit / 2**20:,.0f} MiB per chip"
  return f"{memory.program}: {parts} = {size}: {'fits' if memory.fits else 'DOES NOT FIT'} ({how})"


def _main(argv: list[str]) -> None:
  del argv
  start = time.monotonic()
  logging.set_verbosity(logging.WARNING)
  with one_message():
    jax.config.update("jax_platforms", "cpu")  # leave a TPU of this machine alone
    run = planned(cli._CONFIG.value, tpus.get_slice(str(_TOPOLOGY.value)))
    names = api.chosen_verifiers(run, _VERIFIER.value)
    if not names:
      raise UserError(f"the config {run.config.variant} has no verifiers; give one that trains or scores with some")
    for name in names if not _SEARCH.value else []:
      if run.verifier(name).is_trained:
        programs.train_programs(run, name)  # a mistake is found now, not after minutes
    meshes = [", ".join(f"{axis}={n}" for axis, n in mesh.shape.items()) for mesh in (run.mesh, run.engine_mesh)]
    print(f"{run.config.variant} on {run.where.name}: {run.where.num_chips} chips, {run.where.num_hosts} hosts")
    print(f"Training mesh: {meshes[0]}. Scoring mesh of each host: {meshes[1]}.")
    print(f"Model {run.model.name}, vocabulary {run.model.vocab_size:,}. Assumed tokens of texts: {run.lengths}")
    for name in names:
      print(f"\n{show(run, name, _SOLUTIONS.value, _SEARCH.value)}", flush=True)
    seconds = time.monotonic() - start
    print(f"\nTimes are lower bounds, not measurements: see docs/plans.md. Planned in {seconds:.0f} s.")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(_main, flags_parser=cli._parse_flags)
