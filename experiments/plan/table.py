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
from collections.abc import Mapping
from typing import Any

import jax

from experiments.configs import gsm8k
from experiments.plan import costs, search, tpus
from experiments.plan.planned import planned
from genrm_jax.data import jsonl
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The verifier of each work, and the parts of it. The ORM needs no more than GenRM, which learns to solve as well.
WORK = {
  "orm/genrm": ("genrm", ("training", "scoring")),
  "genrm_cot": ("genrm_cot", ("training",)),
  "votes": ("genrm_cot", ("scoring",)),
}
NAMES = ["/".join(parts) for parts in itertools.product(gsm8k.MODELS, WORK, tpus.KINDS)]
MARK = "<!-- The tables are written by python -m experiments.plan.table. -->\n"
_HEADER = """
| what | slice | settings | GiB per chip | compilation, s | commit | at least | at least, in all |
| --- | --- | --- | ---: | ---: | --- | ---: | ---: |"""


def plan_cell(name: str) -> dict[str, Any]:
  """The smallest slice of a kind on which MODEL/WORK/KIND fits, and with which settings; and the attempts before."""
  (model, *work, kind), tried = name.split("/"), list[dict[str, Any]]()
  git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
  verifier, parts = WORK["/".join(work)]
  for shape in tpus.KINDS[kind].slices:
    run = planned(gsm8k.get_config(model), tpus.get_slice(f"{kind}:{shape}"))
    say(f"{name} on {run.where.name}")
    plan = search.plan(run, verifier, parts, costs.GSM8K_SOLUTIONS, searches=True)
    if plan.fits:
      return {
        "slice": run.where.name,
        "changes": plan.changes,
        "programs": [dataclasses.asdict(fit) for fit in plan.programs],
        "estimates": [e._asdict() for steps in plan.times.values() for e in steps],
        "totals": [{"what": part, "hours": costs.hours(steps)} for part, steps in plan.times.items()],
        "tried": tried,
        "config": _digest(model),
        "commit": git.stdout.strip() or "unknown",
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}",
      }
    last = next(fit for fit in plan.programs if not fit.fits)
    tried.append({"slice": run.where.name, "changes": plan.changes, "program": last.program, "wanted": last.total})
  raise UserError(f"{name}: no slice up to {tpus.KINDS[kind].slices[-1]} is large enough")


def _digest(model: str) -> str:
  return jsonl.digest_of(gsm8k.get_config(model).to_dict())


def tables(cells: Mapping[str, Mapping[str, Any]]) -> str:
  """A table for each model."""
  lines = []
  for model in gsm8k.MODELS:
    rows = [_row(name, cells[name]) for name in NAMES if name in cells and name.startswith(f"{model}/")]
    lines += [f"\n## {model}", _HEADER, *rows] if rows else []
  return "\n".join(lines) + "\n"


def _row(name: str, cell: Mapping[str, Any]) -> str:
  fullest = max((sum(p["parts"].values()), p["limit"]) for p in cell["programs"])
  memory = " of ".join(f"{size / 2**30:.1f}" for size in fullest)
  compiled = f"{sum(p['seconds'] for p in cell['programs']):.0f}"
  changes = {k: v for k, v in cell["changes"].items() if ".mesh." not in f".{k}" or v != 1}
  shown = (("engine " if k.startswith("engine.") else "") + f"{k.rpartition('.')[2]}={v}" for k, v in changes.items())
  once = "; ".join(f"{e['what']} {costs.ms_text(e['seconds'])} ({e['limit']})" for e in cell["estimates"])
  whole = "; ".join(f"{t['what']} {t['hours']:.2g} h" for t in cell["totals"])
  work = name.partition("/")[2].rpartition("/")[0]
  return f"| {' | '.join([work, cell['slice'], ', '.join(shown), memory, compiled, cell['commit'], once, whole])} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="cells, MODEL/WORK/KIND")
  parser.add_argument("--results", type=pathlib.Path, default=ROOT / "results" / "plans.json")
  parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "plans.md")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with one_message():
    if unknown := [name for name in args.only if name not in NAMES]:
      raise UserError(f"no cell {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    cells = jsonl.read_json(args.results) if args.results.exists() else {}
    for name in args.only or NAMES:
      if args.only or cells.get(name, {}).get("config") != _digest(name.partition("/")[0]):
        cells[name] = plan_cell(name)
        jsonl.write_json(args.results, {name: cells[name] for name in NAMES if name in cells})
    text = args.page.read_text().partition(MARK)[0] if args.page.exists() else ""
    args.page.write_text(text + MARK + tables(cells))


if __name__ == "__main__":
  main()
