"""Will it fit, and how long will it take? Compiles a config for a slice of TPUs that is not there.

    python -m experiments.plan --config=experiments/configs/gsm8k.py:gemma2_9b --topology=v5p:2x2x4
      [--verifier=genrm_cot] [--search] [--solutions=21104] [--config.a.b=v]

For each verifier of the config (or those named): its training step, and what scoring with it runs on each host,
compiled by the real TPU compiler (pip install 'genrm-jax[plan]'; any Linux x86_64 machine, minutes of CPU a program).
Shown are the bytes of a chip by what they hold, and a least time by the chip's published rates. With --search the
settings that decide memory are tried, the fastest first, until one fits.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags

from experiments.plan import compiling, tpus
from experiments.plan import estimates as plan_estimates
from experiments.plan import search as plan_search
from experiments.plan import sizes as plan_sizes
from experiments.plan.estimates import Estimate, Total
from experiments.plan.search import Outcome, size_text
from experiments.plan.tpus import Slice
from genrm_jax.pipeline import verifier_stages
from genrm_jax.runtime.errors import one_message
from genrm_jax.verifiers import Verifier


def plan_verifier(
  config: ml_collections.ConfigDict, verifier: Verifier, where: Slice, num_solutions: int, search: bool
) -> str:
  """What is shown of one verifier."""
  outcomes: list[Outcome] = []
  if verifier.is_trained:
    found = plan_search.search_training if search else _as_it_is(plan_search.fit_training)
    outcomes.append(found(config, verifier, where))
  if search:
    outcomes.append(plan_search.search_scoring(config, verifier, where, plan_search.scoring_attempts(config)))
  else:
    outcomes.append(_as_it_is(plan_search.fit_scoring)(config, verifier, where))
  changes = {key: value for outcome in outcomes for key, value in outcome.changes.items()}
  programs = [fit for outcome in outcomes for fit in outcome.programs]
  chosen = plan_sizes.with_settings(config, changes)
  mesh, of_host = (make(config, where).shape for make in (compiling.training_mesh, compiling.engine_mesh))
  estimates, total = plan_estimates.scoring(chosen, verifier, where, of_host, num_solutions)
  totals = [total]
  if verifier.is_trained:
    step, total = plan_estimates.training(chosen, verifier, where, mesh)
    estimates, totals = [step, *estimates], [total, *totals]
  remedies = [plan_search.remedy(chosen, verifier, fit, where) for fit in programs if not fit.fits]
  return "\n".join(
    [
      f"{verifier.name}: {describe(chosen, verifier)}",
      *memory_table(programs),
      *times(estimates, totals),
      *(f"  {line}" for line in remedies),
    ]
  )


def _as_it_is(fit):
  return lambda config, verifier, where: Outcome({}, fit(config, verifier, where))


def describe(config: ml_collections.ConfigDict, verifier: Verifier) -> str:
  """The settings that decide memory and time."""
  scoring = f"scoring {config.engine.rows_per_batch} rows at a time on a host"
  if not verifier.is_trained:
    return scoring
  t = plan_estimates.training_of(config, verifier)
  micro = f"{t.num_micro_batches} micro-batch{'es' if t.num_micro_batches > 1 else ''}"
  return (
    f"batches of {t.rows} x {t.row_length} tokens with at most {t.targets} targets a row, {micro}, remat {t.remat}; "
    f"{scoring}"
  )


def _shape(mesh: Mapping[str, int]) -> str:
  return ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def memory_table(programs: Sequence[compiling.Fit]) -> list[str]:
  """A line for each program: what takes how much of a chip's memory, whether it fits, and how long it compiled."""
  names = [*dict.fromkeys(part for fit in programs for part in fit.parts), "total"]
  widths = [max(11, len(name) + 2) for name in names]

  def line(program: str, cells: Sequence[str], verdict: str) -> str:
    return f"  {program:<16}{''.join(f'{c:>{w}}' for c, w in zip(cells, widths, strict=True))}{verdict}"

  lines = [line("on a chip", names, "")]
  for fit in programs:
    sizes = {**fit.parts, "total": fit.total}
    verdict = "fits" if fit.fits else "DOES NOT FIT"
    verdict += " (by arithmetic, not compiled)" if fit.seconds is None else f" (compiled in {fit.seconds:.0f} s)"
    cells = [size_text(sizes[name]) if name in sizes else "" for name in names]
    lines.append(line(fit.program, cells, f" of {size_text(fit.limit)}: {verdict}"))
  return lines


def times(estimates: Sequence[Estimate], totals: Sequence[Total]) -> list[str]:
  """The least times."""
  return [
    *(
      f"  {e.what}: at least {1000 * e.seconds:,.3g} ms, limited by {e.limit}; {e.flops:.2e} FLOPs a chip; "
      f"at most {e.tokens / e.seconds:,.0f} tokens/s"
      for e in estimates
    ),
    *(f"  {t.what}: at least {t.hours:{',.1f' if t.hours >= 1 else '.2g'}} hours" for t in totals),
  ]


_TOPOLOGY = flags.DEFINE_string("topology", None, "The slice: KIND:SHAPE, such as v5e:2x2.")
_VERIFIER = flags.DEFINE_list("verifier", [], "Verifiers of the config, by name; all if empty.")
_SEARCH = flags.DEFINE_bool("search", False, "Try settings until they fit.")
_SOLUTIONS = flags.DEFINE_integer(
  "solutions", plan_estimates.GSM8K_SOLUTIONS, "How many solutions are scored.", lower_bound=1
)


def _main(argv: list[str]) -> None:
  del argv
  start = time.monotonic()
  with one_message():
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there is left alone
    config: Any = verifier_stages._CONFIG.value
    where = tpus.get_slice(str(_TOPOLOGY.value))
    chosen = plan_sizes.chosen_verifiers(config, _VERIFIER.value)
    mesh, of_host = (make(config, where).shape for make in (compiling.training_mesh, compiling.engine_mesh))
    for verifier in chosen:  # now, and not after minutes
      if verifier.is_trained:
        plan_sizes.check_batch(config, verifier.name, mesh)
    print(f"{config.variant} on {where.name}: {where.num_chips} chips, {where.num_hosts} hosts")
    print(f"Training on a mesh of {_shape(mesh)}, scoring on one of {_shape(of_host)} a host.")
    print(f"Lengths: {plan_sizes.lengths(config).note}.", flush=True)
    for verifier in chosen:
      print(f"\n{plan_verifier(config, verifier, where, _SOLUTIONS.value, _SEARCH.value)}", flush=True)
    print(f"\n{plan_estimates.CAVEAT}\nPlanned in {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(_main, flags_parser=verifier_stages._parse_flags)
