"""Repeats docs/results.md: every run of both list tasks, the figures of each into results/list_tasks, and the page.

    python -m experiments.studies.reproduce --workdir=DIR [--tasks=last_letter] [--seeds=0,1] [--variants=tiny]

A run that is finished is not run again, one that was stopped goes on. The studies of a seed use the problems and the
solutions of its `tiny` run. As many runs go side by side as the machine has cores, each on one.
"""

import argparse
import concurrent.futures
import datetime
import os
import pathlib
import queue
import subprocess
import sys

from experiments.studies import results_page
from genrm_jax.data import jsonl as store
from genrm_jax.evals import report
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

_SHARED = (
  "lambda_0.1",
  "lambda_0.3",
  "lambda_1",
  "lambda_only",
  "no_shift",
  "no_gaps",
  "size_mini",
  "size_small",
  "train_500",
  "steps_3000",
)
VARIANTS = {
  "last_letter": ("tiny", *_SHARED, "train_2000", "given_first", "no_stop"),
  "word_sorting": ("tiny", *_SHARED, "train_2000"),
}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def plan(tasks: list[str], seeds: list[str], only: list[str]) -> list[tuple[str, str, str]]:
  """(task, variant, seed) of all runs, those first on which others depend."""
  unknown = [task for task in tasks if task not in VARIANTS]
  if unknown:
    raise UserError(f"no task {', '.join(unknown)}; there are: {', '.join(VARIANTS)}")
  chosen = [(task, variant, seed) for task in tasks for seed in seeds for variant in only or VARIANTS[task]]
  return sorted(chosen, key=lambda run: run[1] != "tiny")


def run_one(workdir: pathlib.Path, task: str, variant: str, seed: str, core: int) -> None:
  """One run in a process of its own, on one core; its output goes to a log beside its folder."""
  folder = workdir / task / f"{variant}-seed{seed}"
  command = [sys.executable, "-m", f"experiments.{task}", f"--config=experiments/configs/{task}.py:{variant}"]
  command += [f"--workdir={folder}", f"--config.seed={seed}"]
  if variant != "tiny":
    command.append(f"--config.bank={workdir / task / f'tiny-seed{seed}'}")
  folder.parent.mkdir(parents=True, exist_ok=True)
  log = folder.with_name(f"{folder.name}.log")
  with log.open("a") as out:
    done = subprocess.run(
      command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, {core})
    )
  if done.returncode:
    end = (log.read_text().splitlines() or ["empty"])[-1]
    raise UserError(f"{task}:{variant}, seed {seed} ended with code {done.returncode}; the end of {log}: {end}")


def collect(workdir: pathlib.Path, task: str, variant: str, seed: str, commit: str, results: pathlib.Path) -> None:
  """The figures of a finished run, with the commit and the time, go into the results."""
  path = workdir / task / f"{variant}-seed{seed}" / "report" / "results.json"
  found = store.read_json(path)
  finished = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
  found["meta"] |= {"commit": commit, "finished": finished}
  target = results / task / f"{variant}-seed{seed}.json"
  target.parent.mkdir(parents=True, exist_ok=True)
  store.write_bytes(target, f"{report.compact_json(found)}\n".encode())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="each run has a folder in it: TASK/VARIANT-seedN")
  parser.add_argument("--tasks", default=",".join(VARIANTS), help="which tasks")
  parser.add_argument("--seeds", default="0,1,2", help="which seeds")
  parser.add_argument("--variants", default="", help="which variants; all of a task if empty")
  parser.add_argument("--results", default=str(ROOT / "results" / "list_tasks"), help="where the figures are kept")
  parser.add_argument("--out", default=str(ROOT / "docs"), help="where the page is written")
  args = parser.parse_args()
  with one_message():
    if "://" in args.workdir:
      raise UserError(f"--workdir={args.workdir}: runs side by side are kept on a local disk; give a folder")
    runs = plan(_listed(args.tasks), _listed(args.seeds), _listed(args.variants))
    workdir, results = pathlib.Path(args.workdir).absolute(), pathlib.Path(args.results)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
      cores.put(core)

    def work(run: tuple[str, str, str]) -> None:
      core, name = cores.get(), f"{run[0]}:{run[1]}, seed {run[2]}"
      try:
        say(f"{name}: starts")
        run_one(workdir, *run, core)
        collect(workdir, *run, commit, results)
        say(f"{name}: done")
      finally:
        cores.put(core)

    for depended in (True, False):  # on a bank others wait
      with concurrent.futures.ThreadPoolExecutor(max_workers=cores.qsize()) as pool:
        list(pool.map(work, [run for run in runs if (run[1] == "tiny") == depended]))
    results_page.write_page(results, args.out)


def _listed(text: str) -> list[str]:
  return text.split(",") if text else []


if __name__ == "__main__":
  main()
