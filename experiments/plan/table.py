"""Makes the tables of docs/plans.md and results/plans.json: the smallest slices that fit the paper's Gemmas on GSM8K.

    python -m experiments.plan.table [--only=gemma_2b/votes/v5e] [--results=FILE.json] [--page=FILE.md]

A cell takes minutes of CPU and is saved when it is done. With --only those cells are planned again; otherwise the cells
that are missing or whose config has changed. Of the page, what follows the line `MARK` is replaced.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import pathlib
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments.configs import gsm8k
from experiments.plan import costs, search, tpus
from experiments.plan.planned import PlannedRun, planned
from experiments.plan.search import Changes, Outcome
from experiments.plan.tpus import Slice
from genrm_jax.data import jsonl
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The work that is planned, and its verifier. The ORM needs no more than GenRM, which learns to solve as well.
WORK = {"orm/genrm": "genrm", "genrm_cot": "genrm_cot", "votes": "genrm_cot"}
MARK = "<!-- The tables are written by python -m experiments.plan.table. -->\n"
_HEADER = """
| what | slice | settings | GiB per chip | compilation, s | commit | at least | at least, in all |
| --- | --- | --- | ---: | ---: | --- | ---: | ---: |"""


def names(only: list[str]) -> list[str]:
  """The cells MODEL/WORK/KIND, or those of `only`. UserError if there is no such cell."""
  known = ["/".join(parts) for parts in itertools.product(gsm8k.MODELS, WORK, tpus.KINDS)]
  if unknown := [name for name in only if name not in known]:
    raise UserError(f"no cell {', '.join(unknown)}; there are: {', '.join(known)}")
  return only or known


def plan_cell(name: str) -> dict[str, Any]:
  """The smallest slice of a kind on which the work fits, and with which settings; and the attempts before."""
  model, work, kind = _parts(name)
  start, tried = time.monotonic(), list[dict[str, Any]]()
  for shape in tpus.KINDS[kind].slices:
    run = planned(gsm8k.get_config(model), tpus.get_slice(f"{kind}:{shape}"))
    say(f"{name} on {run.where.name}")
    outcome = try_slice(run, work)
    if outcome.fits:
      git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
      return {
        "slice": run.where.name,
        "changes": outcome.changes,
        "programs": [dataclasses.asdict(fit) for fit in outcome.programs],
        **times(run.changed(outcome.changes), work),
        "tried": tried,
        "config": _digest(model),
        "commit": git.stdout.strip() or "unknown",
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}",
        "planned_in_seconds": round(time.monotonic() - start),
      }
    last = outcome.programs[-1]
    tried.append({"slice": run.where.name, "changes": outcome.changes, "program": last.program, "wanted": last.total})
  raise UserError(f"{name}: no slice up to {tpus.KINDS[kind].slices[-1]} is large enough")


def try_slice(run: PlannedRun, work: str) -> Outcome:
  """The fastest settings, by arithmetic, with which the work fits on the run's slice; the last attempt if none does."""
  name, outcome = WORK[work], Outcome({}, [])
  if work != "votes":
    mesh = training_mesh(run.config.verifiers[name].loop.batch_size, run.where)
    run = run.changed(mesh)
    outcome = search.search(run, name, search.training_attempts(run, name), search.fit_training)
    outcome = Outcome(mesh | outcome.changes, outcome.programs)
  if work == "genrm_cot" or not outcome.fits:
    return outcome
  scoring = search.search(run, name, search.scoring_attempts(run, name), search.fit_scoring)
  return Outcome(outcome.changes | scoring.changes, outcome.programs + scoring.programs)


def training_mesh(batch_size: int, where: Slice) -> Changes:
  """As many fsdp shards as the batch has rows for; the rest of the chips are tensor shards."""
  fsdp = 1
  while batch_size % (2 * fsdp) == 0 and where.num_chips % (2 * fsdp) == 0:
    fsdp *= 2
  return {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": where.num_chips // fsdp}


def times(run: PlannedRun, work: str) -> dict[str, Any]:
  """The estimates and totals of the work, by arithmetic."""
  parts = [costs.training(run, WORK[work])] if work != "votes" else []
  parts += [costs.scoring(run, WORK[work], costs.GSM8K_SOLUTIONS)] if work != "genrm_cot" else []
  found = zip(("estimates", "totals"), zip(*parts, strict=True), strict=True)
  return {key: [dataclasses.asdict(one) for part in of_parts for one in part] for key, of_parts in found}


def _parts(name: str) -> tuple[str, str, str]:
  model, _, rest = name.partition("/")
  work, _, kind = rest.rpartition("/")
  return model, work, kind


def _digest(model: str) -> str:
  return jsonl.digest_of(gsm8k.get_config(model).to_dict())


def tables(cells: Mapping[str, Mapping[str, Any]]) -> str:
  """A table for each model."""
  lines = []
  for model in gsm8k.MODELS:
    rows = [_row(name, cells[name]) for name in names([]) if name in cells and _parts(name)[0] == model]
    lines += [f"\n## {model}", _HEADER, *rows] if rows else []
  return "\n".join(lines) + "\n"


def _row(name: str, cell: Mapping[str, Any]) -> str:
  fullest = max((sum(p["parts"].values()), p["limit"]) for p in cell["programs"])
  memory = " of ".join(f"{size / 2**30:.1f}" for size in fullest)
  compiled = f"{sum(p['seconds'] for p in cell['programs']):.0f}"
  once = "; ".join(f"{e['what']} {1000 * e['seconds']:,.3g} ms ({e['limit']})" for e in cell["estimates"])
  whole = "; ".join(f"{t['what']} {t['hours']:.2g} h" for t in cell["totals"])
  # By their last names; mesh axes of size 1 are left out.
  changes = {key: value for key, value in cell["changes"].items() if ".mesh." not in f".{key}" or value != 1}
  of = {
    what: ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in changes.items() if k.startswith("engine.") is of_engine)
    for what, of_engine in (("", False), ("engine: ", True))
  }
  settings = "; ".join(what + text for what, text in of.items() if text)
  columns = [_parts(name)[1], cell["slice"], settings, memory, compiled, cell["commit"], once, whole]
  return f"| {' | '.join(columns)} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="cells, MODEL/WORK/KIND")
  parser.add_argument("--results", type=pathlib.Path, default=ROOT / "results" / "plans.json")
  parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "plans.md")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with one_message():
    cells = jsonl.read_json(args.results) if args.results.exists() else {}
    for name in names(args.only):
      if not args.only and name in cells and cells[name]["config"] == _digest(_parts(name)[0]):
        say(f"{name}: done before")
      else:
        cells[name] = plan_cell(name)
        jsonl.write_json(args.results, {name: cells[name] for name in names([]) if name in cells})
    text = args.page.read_text().partition(MARK)[0] if args.page.exists() else ""
    args.page.write_text(text + MARK + tables(cells))


if __name__ == "__main__":
  main()
