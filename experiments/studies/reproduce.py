"""Reproduces docs/results.md: every run of both list tasks, their results in results/list_tasks, and the page.

    python -m experiments.studies.reproduce --workdir=DIR [--tasks=last_letter] [--seeds=0,1] [--variants=tiny]

Finished runs are skipped and interrupted ones resume. The studies of a seed use the problems and solutions of its
`tiny` run. One run per core at a time.
"""

import argparse
import concurrent.futures
import datetime
import os
import pathlib
import queue
import subprocess
import sys
from os.path import expanduser

from experiments.studies import results_page
from genrm_jax.data import jsonl
from genrm_jax.evals import report
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say

_SHARED = (
  *("lambda_0.1", "lambda_0.3", "lambda_1", "lambda_only"),
  *("no_shift", "no_gaps", "size_mini", "size_small", "train_500", "steps_3000"),
)
VARIANTS = {
  "last_letter": ("tiny", *_SHARED, "train_2000", "given_first", "no_stop"),
  "word_sorting": ("tiny", *_SHARED, "train_2000"),
}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def list_runs(tasks: list[str], seeds: list[str], variants: list[str]) -> list[tuple[str, str, str]]:
  """(task, variant, seed) of all runs, starting with those that others depend on; no variants: all of each task."""
  unknown = [task for task in tasks if task not in VARIANTS]
  if unknown:
    raise UserError(f"--tasks: unknown task {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
  chosen = [(task, variant, seed) for task in tasks for seed in seeds for variant in variants or VARIANTS[task]]
  return sorted(chosen, key=lambda run: run[1] != "tiny")


def run_one(workdir: pathlib.Path, task: str, variant: str, seed: str, core: int) -> None:
  """Makes one run in its own process, on one core; its output goes to a log beside its folder."""
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
    last_line = (log.read_text().splitlines() or ["empty"])[-1]
    raise UserError(
      f"{task}:{variant}, seed {seed} exited with code {done.returncode}; the last line of {log}: {last_line}"
    )


def collect(workdir: pathlib.Path, task: str, variant: str, seed: str, commit: str, results: pathlib.Path) -> None:
  """Copies the results of a finished run to `results`, with the commit and the time it finished."""
  path = workdir / task / f"{variant}-seed{seed}" / "report" / "results.json"
  copy = jsonl.read_json(path)
  finished = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
  copy["meta"] |= {"commit": commit, "finished": finished}
  target = results / task / f"{variant}-seed{seed}.json"
  target.parent.mkdir(parents=True, exist_ok=True)
  jsonl.write_bytes(target, f"{report.compact_json(copy)}\n".encode())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--workdir",
    type=expanduser,
    required=True,
    help="local folder for the workdirs of all runs, TASK/VARIANT-seedN",
  )
  parser.add_argument("--tasks", default=",".join(VARIANTS), help="comma-separated")
  parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
  parser.add_argument("--variants", default="", help="comma-separated; empty: all variants of each task")
  parser.add_argument(
    "--results",
    type=expanduser,
    default=str(ROOT / "results" / "list_tasks"),
    help="folder to copy the results to",
  )
  parser.add_argument("--out", type=expanduser, default=str(ROOT / "docs"), help="folder to write the page to")
  args = parser.parse_args()
  with one_message():
    if "://" in args.workdir:
      raise UserError(f"--workdir={args.workdir}: parallel runs need a local disk; give a local folder")
    runs = list_runs(_split(args.tasks), _split(args.seeds), _split(args.variants))
    workdir, results = pathlib.Path(args.workdir).absolute(), pathlib.Path(args.results)
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0)):
      cores.put(core)

    def work(run: tuple[str, str, str]) -> None:
      core, name = cores.get(), f"{run[0]}:{run[1]}, seed {run[2]}"
      try:
        say(f"{name}: started")
        run_one(workdir, *run, core)
        collect(workdir, *run, commit, results)
        say(f"{name}: done")
      finally:
        cores.put(core)

    for is_main in (True, False):  # the studies need the banks of the main runs
      with concurrent.futures.ThreadPoolExecutor(max_workers=cores.qsize()) as pool:
        list(pool.map(work, [run for run in runs if (run[1] == "tiny") == is_main]))
    results_page.write_page(results, args.out)


def _split(text: str) -> list[str]:
  return text.split(",") if text else []


if __name__ == "__main__":
  main()
