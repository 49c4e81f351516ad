"""Makes the tables of docs/plans.md and results/plans.json: the smallest slices that fit the paper's Gemmas on GSM8K.

    python -m experiments.plan.table [--only gemma_2b/votes/v5e ...]

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
RESULTS, PAGE = ROOT / "results" / "plans.json", ROOT / "docs" / "plans.md"
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
        **dataclasses.asdict(plan),
        "tried": tried,
        "config": _digest(model),
        "commit": git.stdout.strip() or "unknown",
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}",
      }
    last = next(memory for memory in plan.programs if not memory.fits)
    tried.append({"slice": plan.slice, "changes": plan.changes, "program": last.program, "wanted": last.total})
  raise UserError(f"{name}: no slice up to {tpus.KINDS[kind].slices[-1]} is large enough")


def _digest(model: str) -> str:
  return jsonl.digest_of(gsm8k.get_config(model).to_dict())


def _table(model: str, cells: Mapping[str, Mapping[str, Any]]) -> str:
  rows = [_row(name, cells[name]) for name in NAMES if name in cells and name.startswith(f"{model}/")]
  return "\n".join([f"\n## {model}", _HEADER, *rows, ""]) if rows else ""


def _row(name: str, cell: Mapping[str, Any]) -> str:
  size, limit = max((sum(p["parts"].values()), p["limit"]) for p in cell["programs"])
  changes = {k: v for k, v in cell["changes"].items() if ".mesh." not in f".{k}" or v != 1}
  columns = [
    name.partition("/")[2].rpartition("/")[0],
    cell["slice"],
    ", ".join(
      ("engine " if k.startswith("engine.") else "") + f"{k.rpartition('.')[2]}={v}" for k, v in changes.items()
    ),
    f"{size / 2**30:.1f} of {limit / 2**30:.1f}",
    f"{sum(p['seconds'] for p in cell['programs']):.0f}",
    cell["commit"],
    "; ".join(f"{e['what']} {costs.ms_text(e['seconds'])} ({e['limit']})" for e in cell["estimates"]),
    "; ".join(f"{t['what']} {t['hours']:.2g} h" for t in cell["totals"]),
  ]
  return f"| {' | '.join(columns)} |"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", nargs="*", default=[], choices=NAMES, metavar="MODEL/WORK/KIND", help="cells")
  only = parser.parse_args().only
  jax.config.update("jax_platforms", "cpu")
  cells = jsonl.read_json(RESULTS) if RESULTS.exists() else {}
  for name in only or NAMES:
    if only or cells.get(name, {}).get("config") != _digest(name.partition("/")[0]):
      with one_message():
        cells[name] = plan_cell(name)
      jsonl.write_json(RESULTS, {name: cells[name] for name in NAMES if name in cells})
  PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "".join(_table(model, cells) for model in gsm8k.MODELS))


if __name__ == "__main__":
  main()
