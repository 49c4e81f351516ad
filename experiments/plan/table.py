"""Makes docs/plans.md and results/plans.json: the smallest slices that suffice for the paper's Gemmas on GSM8K.

    python -m experiments.plan.table [--only=gemma_2b/votes/v5e] [--results=FILE.json] [--page=FILE.md]

A cell takes minutes of CPU. Each is kept when it is done, and is done again only if its config has changed since, or
its entry was taken out of the JSON file. The page shows the cells that are there.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import pathlib
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from experiments.configs import gsm8k
from experiments.plan import compiling, search, sizes, tpus
from experiments.plan import estimates as plan_estimates
from experiments.plan.search import Changes, Outcome
from experiments.plan.tpus import Slice
from genrm_jax import verifiers
from genrm_jax.data import jsonl
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What is planned, and with which verifier. The ORM takes no more than GenRM, which learns to solve as well.
WORK = {"orm/genrm": "genrm", "genrm_cot": "genrm_cot", "votes": "genrm_cot"}
_TENSOR_SHARDS = (1, 2, 4)  # that are tried for scoring


def names(only: list[str]) -> list[str]:
  """Cells, MODEL/WORK/KIND, those of `only` if it is not empty.

  Raises:
    UserError: there is no such cell.
  """
  known = ["/".join(parts) for parts in itertools.product(gsm8k.MODELS, WORK, tpus.KINDS)]
  unknown = [name for name in only if name not in known]
  if unknown:
    raise UserError(f"no cell {', '.join(unknown)}; there are: {', '.join(known)}")
  return only or known


def plan_cell(name: str) -> dict[str, Any]:
  """The smallest slice of a kind on which the work fits, with settings and estimates; what was tried before."""
  model, work, kind = _parts(name)
  start, chip = time.monotonic(), tpus.KINDS[kind]
  tried: list[dict[str, Any]] = []
  for shape in chip.slices:
    where = tpus.get_slice(f"{kind}:{shape}")
    say(f"{name} on {where.name}")
    outcome = try_slice(gsm8k.get_config(model), work, where)
    if outcome.fits:
      return {
        "slice": where.name,
        "changes": outcome.changes,
        "programs": [dataclasses.asdict(fit) for fit in outcome.programs],
        **_estimates(gsm8k.get_config(model), work, where, outcome.changes),
        "tried": tried,
        "config": _digest(model),
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}",
        "planned_in_seconds": round(time.monotonic() - start),
      }
    last = outcome.programs[-1]
    tried.append({"slice": where.name, "changes": outcome.changes, "program": last.program, "wanted": last.total})
  raise UserError(f"{name}: no slice up to {chip.slices[-1]} suffices")


def try_slice(config: ml_collections.ConfigDict, work: str, where: Slice) -> Outcome:
  """The fastest settings, by arithmetic, under which the work fits the slice; the last that were tried if none."""
  verifier = verifiers.get_verifier(WORK[work])
  if work == "votes":
    return search.search_scoring(config, verifier, where, voting_attempts(config, where))
  mesh = training_mesh(config.verifiers[verifier.name].loop.batch_size, where)
  on_mesh = sizes.with_settings(config, mesh)
  training = search.search_training(on_mesh, verifier, where)
  if not training.fits or work == "genrm_cot":
    return Outcome(mesh | training.changes, training.programs)
  scoring = search.search_scoring(on_mesh, verifier, where, search.scoring_attempts(config))
  return Outcome(mesh | training.changes | scoring.changes, training.programs + scoring.programs)


def training_mesh(batch_size: int, where: Slice) -> Changes:
  """As many fsdp shards as there are rows for, and the rest on tensor."""
  fsdp = 1
  while batch_size % (2 * fsdp) == 0 and where.num_chips % (2 * fsdp) == 0:
    fsdp *= 2
  return {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": where.num_chips // fsdp}


def voting_attempts(config: ml_collections.ConfigDict, where: Slice) -> list[Changes]:
  """A host's meshes and rows, the fastest first: parameters on tensor shards, and the rest of its chips on copies."""
  verifier, num_chips = verifiers.get_verifier(WORK["votes"]), where.of_one_host.num_chips
  found: list[Changes] = [
    {"engine.mesh.data": num_chips // tensor, "engine.mesh.tensor": tensor, "engine.rows_per_batch": rows}
    for tensor in _TENSOR_SHARDS
    if num_chips % tensor == 0
    for rows in search.ROWS
  ]

  def hours(changes: Changes) -> float:
    changed = sizes.with_settings(config, changes)
    mesh = {axis: changed.engine.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    return plan_estimates.scoring(changed, verifier, where, mesh, plan_estimates.GSM8K_SOLUTIONS)[1].hours

  return sorted(found, key=hours)


def _estimates(config: ml_collections.ConfigDict, work: str, where: Slice, changes: Changes) -> dict[str, Any]:
  verifier = verifiers.get_verifier(WORK[work])
  chosen = sizes.with_settings(config, changes)
  estimates, totals = [], []
  if work != "votes":
    mesh = compiling.training_mesh(chosen, where)
    step, hours = plan_estimates.training(chosen, verifier, where, mesh.shape)
    estimates, totals = [step], [hours]
  if work != "genrm_cot":
    mesh = compiling.engine_mesh(chosen, where)
    more, hours = plan_estimates.scoring(chosen, verifier, where, mesh.shape, plan_estimates.GSM8K_SOLUTIONS)
    estimates, totals = [*estimates, *more], [*totals, hours]
  return {"estimates": [dataclasses.asdict(e) for e in estimates], "totals": [dataclasses.asdict(t) for t in totals]}


def _parts(name: str) -> tuple[str, str, str]:
  model, _, rest = name.partition("/")
  work, _, kind = rest.rpartition("/")
  return model, work, kind


def _digest(model: str) -> str:
  return jsonl.digest_of(gsm8k.get_config(model).to_dict())


def page(cells: Mapping[str, Mapping[str, Any]]) -> str:
  """docs/plans.md."""
  seconds = [c["planned_in_seconds"] for c in cells.values()]
  compilers = ", ".join(sorted({c["compiler"] for c in cells.values()}))
  times = f"{min(seconds)} to {max(seconds)} s"
  lines = [_HEAD.format(compilers=compilers, times=times, caveat=textwrap.fill(plan_estimates.CAVEAT, 120))]
  for model in gsm8k.MODELS:
    mine = [(name, cells[name]) for name in names([]) if name in cells and _parts(name)[0] == model]
    if mine:
      lines += [f"## {model}\n", "| what | slice | settings | GiB of a chip | at least | at least, in all |"]
      lines += ["| --- | --- | --- | ---: | ---: | ---: |", *(_row(name, cell) for name, cell in mine), ""]
  lines += [
    *_compile_times(cells),
    "\n## The chips\n",
    "| | HBM for a program | bfloat16 | memory | links, in and out |",
    "| --- | ---: | ---: | ---: | ---: |",
  ]
  for c in tpus.KINDS.values():
    lines.append(
      f"| [{c.name}]({c.source}) | {c.hbm_bytes / 2**30:.2f} GiB | {c.peak_flops / 1e12:.0f} TFLOP/s "
      f"| {c.hbm_bandwidth / 1e9:,.0f} GB/s | {c.ici_bandwidth / 1e9:,.0f} GB/s |"
    )
  return "\n".join(lines) + "\n"


def _row(name: str, cell: Mapping[str, Any]) -> str:
  fullest = max((sum(p["parts"].values()), p["limit"]) for p in cell["programs"])
  once = "; ".join(f"{e['what']} {_three_digits(1000 * e['seconds'])} ms ({e['limit']})" for e in cell["estimates"])
  whole = "; ".join(f"{t['what']} {t['hours']:.2g} h" for t in cell["totals"])
  memory = " of ".join(f"{size / 2**30:.1f}" for size in fullest)
  return f"| {_parts(name)[1]} | {cell['slice']} | {_settings(cell['changes'])} | {memory} | {once} | {whole} |"


def _compile_times(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """A row for each program of each work, with its seconds on the kinds of chips for each model."""
  lines = [
    _COMPILE_TIMES,
    f"| what | program | {' | '.join(gsm8k.MODELS)} |",
    "| --- | --- |" + " ---: |" * len(gsm8k.MODELS),
  ]
  for work in WORK:
    seconds: dict[str, dict[str, list[str]]] = {}
    for model, kind in itertools.product(gsm8k.MODELS, tpus.KINDS):
      for program in cells.get(f"{model}/{work}/{kind}", {"programs": []})["programs"]:
        seconds.setdefault(program["program"], {}).setdefault(model, []).append(f"{program['seconds']:.1f}")
    for program, of_model in seconds.items():
      lines.append(f"| {work} | {program} | {' | '.join(' / '.join(of_model.get(m, [])) for m in gsm8k.MODELS)} |")
  return lines


def _three_digits(number: float) -> str:
  return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _settings(changes: Mapping[str, Any]) -> str:
  """The changes without what they have in common, those of the engine last."""
  of: dict[str, list[str]] = {"": [], "engine: ": []}
  for key, value in changes.items():
    if ".mesh." not in f".{key}" or value != 1:
      of["engine: " if key.startswith("engine.") else ""].append(f"{key.rpartition('.')[2]}={value}")
  return "; ".join(what + ", ".join(settings) for what, settings in of.items() if settings)


_HEAD = """# Plans: which slice, and how long

The smallest slices of each kind of TPU on which the GSM8K configs of the paper's Gemmas fit, and bounds of their time.
Made by `python -m experiments.plan.table`: the real TPU compiler, on a machine without a TPU
({compilers}). A row took {times} of one CPU core, with all settings that were tried. Of any config and slice:

```bash
pip install -e '.[plan]'
python -m experiments.plan --config=experiments/configs/gsm8k.py:gemma2_9b --topology=v5p:2x2x4 --search
```

`orm/genrm` is GenRM with its solution part, training and scoring; `genrm_cot` is its training; `votes` scores with 32
rationales to a solution. Each host scores by itself, on its own chips, so this is planned for one host, 2x2 chips at
most (a machine with eight counts as two hosts): more hosts take as much less time. What is scored are 1,319 problems x
16 solutions. Settings are those of the config (`mesh.`, `verifiers.NAME.` and `engine.` are left out) that decide
memory: the fastest, by arithmetic, that the compiler takes on the slice. Memory is that of the fullest program. In
brackets stands what limits the time: compute, memory, or the links between chips.

{caveat}
"""


_COMPILE_TIMES = """## Compile times

Seconds of one CPU core for tracing and compiling each program of the plans above, for v5e / v5p / v6e. A run compiles
each once.
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="cells, MODEL/WORK/KIND")
  parser.add_argument("--results", type=pathlib.Path, default=ROOT / "results" / "plans.json")
  parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "plans.md")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with one_message():
    wanted = names(args.only)
    cells = jsonl.read_json(args.results) if args.results.exists() else {}
    cells = {name: cell for name, cell in cells.items() if cell["config"] == _digest(_parts(name)[0])}
    for name in wanted:
      if name in cells:
        say(f"{name}: done before")
      else:
        cells[name] = plan_cell(name)
        jsonl.write_json(args.results, {name: cells[name] for name in names([]) if name in cells})
    jsonl.write_bytes(args.page, page(cells).encode())


if __name__ == "__main__":
  main()
