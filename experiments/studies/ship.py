"""Makes trained adapters that come with the package, and measures them as they are shipped.

    python -m experiments.studies.ship --config=experiments/configs/gsm8k.py:gemma3_270m --config.data_dir=DATA \
      --workdir=DIR --verifier=genrm --name=gsm8k-gemma3-270m

DIR is a run of that config whose verifier is trained. The adapters, rounded to bfloat16, go to genrm_jax/shipped/NAME
with the log of their training. Opened by name, they then score the run's held-out candidates, which gives the figures
of their card. A second start only does what is missing.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from absl import app, flags, logging
from ml_collections import config_flags

import genrm_jax
from genrm_jax.checkpoints.names import NOTICE
from genrm_jax.data import jsonl
from genrm_jax.evals import report, tables
from genrm_jax.pipeline import api, shipped, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.runtime import memory
from genrm_jax.runtime.errors import one_message
from genrm_jax.runtime.progress import say
from genrm_jax.training import compact

_TABLES = ("Accuracy of the selected", "Differences", "Verification")
_CARD = pathlib.Path(__file__).with_name("ship_card.md.j2")


# Scored by hand, to see that the adapters do elsewhere what they do here.
_EXAMPLES = [
  ("Tom has 3 bags of 4 apples. How many apples?", f"3 * 4 = {product}. The answer is {product}.")
  for product in (12, 14)
]


def ship(run: Run, verifier: str, name: str) -> None:
  """Writes genrm_jax/shipped/NAME: adapters, log, card with figures on the run's held-out candidates.

  Raises:
    UserError: the verifier was not trained as adapters saved alone, or a file cannot be read or written.
  """
  folder = shipped.FOLDER / name
  if not compact.is_compact(folder):
    compact.write(run.path("checkpoints", verifier), folder)
  shutil.copyfile(run.path("metrics", f"{verifier}.jsonl"), folder / "training.jsonl")
  jsonl.write_bytes(folder / "NOTICE", f"{NOTICE}\n".encode())
  problems, pool = run.problems("eval"), run.candidates("eval")
  scores = f"scores/shipped/{name}.jsonl"
  trained = genrm_jax.load(name, rows_per_batch=run.config.engine.rows_per_batch)
  if not run.path(scores).exists():
    verifier_stages.write_scores(run, trained, scores, problems, pool)
  results = report.build_results(
    problems,
    pool,
    {verifier: jsonl.read_scores(run.path(scores), verifier)},
    ns=run.config.report.ns,
    ks=[k for k in run.config.report.ks if k <= trained.how.num_votes],
    seed=run.config.seed,
    meta={**verifier_stages.identity(run), "shipped": name},
    top_scores=run.config.report.top_scores,
  )
  jsonl.write_bytes(folder / "results.json", (json.dumps(results["metrics"], indent=1) + "\n").encode())
  examples = list(zip(_EXAMPLES, trained.score_many(_EXAMPLES), strict=True))
  jsonl.write_bytes(folder / "README.md", card(run, name, trained.manifest, results, examples).encode())
  say(f"{folder / 'README.md'}: written")


def card(
  run: Run, name: str, manifest: Mapping[str, Any], results: Mapping[str, Any], examples: Sequence[tuple[Any, Any]]
) -> str:
  """What the adapters are, how they were made, and how good they are: Markdown."""
  about = jsonl.read_object(
    run.path("metrics", f"{manifest['run']}.examples.json"), {"train": dict.fromkeys(("examples", "row_length"), int)}
  )
  found = {table.title: table for table in tables.result_tables(results)}
  wanted = [table for title, table in found.items() if title.startswith(_TABLES)]
  template = jinja2.Template(_CARD.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
  return template.render(
    name=name,
    manifest=manifest,
    settings=manifest["verifier"]["settings"],
    size=(shipped.FOLDER / name / "adapters.safetensors").stat().st_size / 1e6,
    about=about["train"],
    verifier=tables.method_name(manifest["run"]),
    last_step=json.loads((shipped.FOLDER / name / "training.jsonl").read_text().splitlines()[-1])["step"],
    results=results,
    tables=wanted,
    examples=examples,
    variant=run.config.variant,
    notice=NOTICE,
  )


_CONFIG = config_flags.DEFINE_config_file("config", None, "The config of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_VERIFIER = flags.DEFINE_string("verifier", None, "The verifier to ship.", required=True)
_NAME = flags.DEFINE_string("name", None, "The name by which genrm_jax.load opens it.", required=True)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  with one_message():
    api.use_cpu_devices(_CONFIG.value.cpu_devices)
    memory.keep_freed_memory()
    ship(api.open_run(_CONFIG.value, _WORKDIR.value), _VERIFIER.value, _NAME.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
