"""The published results page, from the committed JSON of finished runs.

    python -m experiments.studies.results_page [--results=results/list_tasks] [--out=docs]

reads <results>/<task>/<variant>-seed<k>.json, each a copy of a run's report/results.json, and writes <out>/results.md
and <out>/figures/*.png. The page includes <out>/results_notes.md, which is written by hand, verbatim.
"""

import argparse
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from os.path import expanduser
from typing import Any

import jinja2

from experiments.studies import plots, runs, tables
from experiments.studies.quantities import COT
from experiments.studies.runs import MAIN, SIZE, STEPS, TRAIN, StudyRun, StudyTask
from genrm_jax.data import jsonl
from genrm_jax.evals import metrics, report
from genrm_jax.evals.pages import fenced
from genrm_jax.evals.plots import Figure
from genrm_jax.evals.tables import method_name
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

PAGE, NOTES = "results.md", "results_notes.md"
_SAMPLES = 12  # per task
_SAMPLES_OF_OTHERS = 4  # most of these from verifiers other than GenRM-CoT
_NAME = re.compile(r"(?P<variant>.+)-seed(?P<seed>\d+)\.json")


def read_runs(folder: str | os.PathLike[str]) -> list[StudyRun]:
  """Every run in a folder of results.

  Raises:
    UserError: there are none; a file does not hold the results of the run that its path names.
  """
  paths = sorted(pathlib.Path(folder).glob("*/*.json"))
  if not paths:
    raise UserError(
      f"{folder}: no results; copy each run's report/results.json to {folder}/<task>/<variant>-seed<k>.json"
    )
  found = []
  for path in paths:
    run = runs.read_run(str(path), jsonl.read_json(path))
    name, meta = _NAME.fullmatch(path.name), run.meta
    named = (path.parent.name, name["variant"], int(name["seed"])) if name else None
    if named != (meta["task"], meta["variant"], meta["seed"]):
      raise UserError(
        f"{path}: holds {meta['task']} {meta['variant']} with seed {meta['seed']}; move it to"
        f" {folder}/{meta['task']}/{meta['variant']}-seed{meta['seed']}.json"
      )
    found.append(run)
  return found


def pick_samples(task: StudyTask, count: int = _SAMPLES) -> list[tuple[int, dict[str, Any]]]:
  """Sampled rationales of the main run with their seeds: mostly GenRM-CoT's, alternating between kinds and seeds."""
  of_cot, of_others = (
    _alternate(
      [
        (seed, sample)
        for seed, run in task.runs[MAIN].items()
        for sample in run.results.get("samples", ())
        if (sample["verifier"] == COT) == is_cot
      ]
    )
    for is_cot in (True, False)
  )
  others = of_others[:_SAMPLES_OF_OTHERS]
  return of_cot[: count - len(others)] + others


def _alternate(samples: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
  """The first sample of each kind and seed, then the second of each, and so on."""
  piles: dict[tuple[str, bool, int], list] = {}
  for seed, sample in samples:
    piles.setdefault((sample["kind"], sample["correct"], seed), []).append((seed, sample))
  # By seed first: a short list shows every kind for the first seed before another seed.
  order = sorted(piles, key=lambda key: (key[2], key[0], key[1]))
  rows = itertools.zip_longest(*(piles[key] for key in order))
  return [sample for row in rows for sample in row if sample is not None]


def render(tasks: Sequence[StudyTask], figures: Sequence[Figure], notes: str = "") -> str:
  """The page as Markdown."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([pathlib.Path(__file__).parent, pathlib.Path(report.__file__).parent]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )
  main_tables = [tables.best_of_n(tasks), tables.gains(tasks), tables.verification(tasks)]
  study_tables = [tables.study(tasks, which) for which in (TRAIN, STEPS, SIZE)]
  study_tables += [tables.unified(tasks), tables.ablations(tasks)]
  return environment.get_template("results_page.md.j2").render(
    tasks=tasks,
    draws=metrics.BOOTSTRAP_DRAWS,
    not_run=runs.not_run(tasks),
    notes=notes.strip("\n"),
    main_tables=[table for table in main_tables if table.rows],
    figures=figures,
    study_tables=[table for table in study_tables if table.rows],
    samples={task.name: picked for task in tasks if (picked := pick_samples(task))},
    last_tables=[tables.wall_time(tasks), tables.sources(tasks)],
    method_name=method_name,
    fenced=fenced,
  )


def page_text(results: str | os.PathLike[str], out: str | os.PathLike[str]) -> tuple[str, list[Figure]]:
  """The page and its figures, from a folder of results and the notes in `out`."""
  tasks = runs.make_tasks(read_runs(results))
  figures = plots.draw(tasks)
  notes = pathlib.Path(out) / NOTES
  return render(tasks, figures, notes.read_text() if notes.exists() else ""), figures


def write_page(results: str | os.PathLike[str], out: str | os.PathLike[str]) -> pathlib.Path:
  """Writes results.md and its figures; returns the path of the page."""
  text, figures = page_text(results, out)
  for figure in figures:
    jsonl.write_bytes(pathlib.Path(out) / "figures" / figure.file, figure.png)
  page = pathlib.Path(out) / PAGE
  jsonl.write_bytes(page, text.encode())
  return page


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--results", type=expanduser, default="results/list_tasks", help="folder with the committed results"
  )
  parser.add_argument("--out", type=expanduser, default="docs", help="folder to write the page to")
  args = parser.parse_args()
  with one_message():
    say(f"page: {write_page(args.results, args.out)}")


if __name__ == "__main__":
  main()
