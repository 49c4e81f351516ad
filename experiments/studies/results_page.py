"""The published page of results from the committed JSON of finished runs.

    python -m experiments.studies.results_page [--results=results/list_tasks] [--out=docs]

reads <results>/<task>/<variant>-seed<k>.json, each a copy of a run's report/results.json, and writes <out>/results.md
and <out>/figures/*.png. <out>/results_notes.md, written by hand, is put into the page as it is.
"""

import argparse
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from experiments.studies import plots as study_plots
from experiments.studies import runs as studies
from experiments.studies import tables as study_tables
from experiments.studies.runs import MAIN, SIZE, STEPS, TRAIN, Run, Task
from genrm_jax.data import jsonl as store
from genrm_jax.evals import metrics, report
from genrm_jax.evals.per_problem import COT
from genrm_jax.evals.tables import method_name
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

PAGE, NOTES = "results.md", "results_notes.md"
_SAMPLES = 12  # a task
_SAMPLES_OF_OTHERS = 4  # of these, of verifiers other than GenRM-CoT
_NAME = re.compile(r"(?P<variant>.+)-seed(?P<seed>\d+)\.json")


def read_runs(folder: str | os.PathLike[str]) -> list[Run]:
  """Every run of a folder of results.

  Raises:
    UserError: there are none; a file is not the results of the run that its name tells.
  """
  paths = sorted(pathlib.Path(folder).glob("*/*.json"))
  if not paths:
    raise UserError(
      f"{folder}: no results; copy each run's report/results.json to {folder}/<task>/<variant>-seed<k>.json"
    )
  runs = []
  for path in paths:
    run = studies.read_run(str(path), store.read_json(path))
    name, meta = _NAME.fullmatch(path.name), run.meta
    told = (path.parent.name, name["variant"], int(name["seed"])) if name else None
    if told != (meta["task"], meta["variant"], meta["seed"]):
      raise UserError(
        f"{path}: holds {meta['task']} {meta['variant']} with seed {meta['seed']}, so its place is"
        f" {folder}/{meta['task']}/{meta['variant']}-seed{meta['seed']}.json"
      )
    runs.append(run)
  return runs


def pick_samples(task: Task, count: int = _SAMPLES) -> list[tuple[int, dict[str, Any]]]:
  """Sampled rationales of the main run with their seeds: mostly of GenRM-CoT, seeds and kinds in turn."""
  of_cot, of_others = (
    _in_turn(
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


def _in_turn(samples: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
  """One of each kind and seed, then the second of each, and so on."""
  piles: dict[tuple[str, bool, int], list] = {}
  for seed, sample in samples:
    piles.setdefault((sample["kind"], sample["correct"], seed), []).append((seed, sample))
  # A short list shows every kind of the first seed before it shows another seed.
  order = sorted(piles, key=lambda key: (key[2], key[0], key[1]))
  return [it for row in itertools.zip_longest(*(piles[key] for key in order)) for it in row if it is not None]


def _fenced(text: str) -> str:
  """A block of code whose fence is longer than any in the text."""
  longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}text\n{text}\n{fence}"


def render(tasks: Sequence[Task], figures: Sequence[Any], notes: str = "") -> str:
  """The page as Markdown."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader([pathlib.Path(__file__).parent, pathlib.Path(report.__file__).parent]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )
  main_tables = [study_tables.best_of_n(tasks), study_tables.gains(tasks), study_tables.verification(tasks)]
  others = [study_tables.study(tasks, which) for which in (TRAIN, STEPS, SIZE)]
  others += [study_tables.unified(tasks), study_tables.ablations(tasks)]
  return environment.get_template("results_page.md.j2").render(
    tasks=tasks,
    draws=metrics.BOOTSTRAP_DRAWS,
    not_run=studies.not_run(tasks),
    notes=notes.strip("\n"),
    main_tables=[table for table in main_tables if table.rows],
    figures=figures,
    study_tables=[table for table in others if table.rows],
    samples={task.name: picked for task in tasks if (picked := pick_samples(task))},
    last_tables=[study_tables.wall_time(tasks), study_tables.sources(tasks)],
    method_name=method_name,
    fenced=_fenced,
  )


def page_text(results: str | os.PathLike[str], out: str | os.PathLike[str]) -> tuple[str, list[Any]]:
  """The page and its figures, from a folder of results and the notes in `out`."""
  tasks = studies.gather(read_runs(results))
  figures = study_plots.draw(tasks)
  notes = pathlib.Path(out) / NOTES
  return render(tasks, figures, notes.read_text() if notes.exists() else ""), figures


def write_page(results: str | os.PathLike[str], out: str | os.PathLike[str]) -> pathlib.Path:
  """Writes results.md and its figures; returns the path of the page."""
  text, figures = page_text(results, out)
  for figure in figures:
    store.write_bytes(pathlib.Path(out) / "figures" / figure.file, figure.png)
  page = pathlib.Path(out) / PAGE
  store.write_bytes(page, text.encode())
  return page


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--results", default="results/list_tasks", help="the folder of committed results")
  parser.add_argument("--out", default="docs", help="where the page is written")
  args = parser.parse_args()
  with one_message():
    say(f"page: {write_page(args.results, args.out)}")


if __name__ == "__main__":
  main()
