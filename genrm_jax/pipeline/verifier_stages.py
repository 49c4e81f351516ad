"""The stages of the verifiers, which every experiment shares, and the command line."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

import genrm_jax
from genrm_jax import verifiers
from genrm_jax.data import candidates, jsonl, packing
from genrm_jax.evals import browse, report
from genrm_jax.model import gemma
from genrm_jax.pipeline import locate, scoring
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.records import Candidate, Problem, Rationale, Score
from genrm_jax.runtime import distributed, memory
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say
from genrm_jax.train import saved

# The verifiers' stages.


def training_candidates(run: Run, split: str, settings: ml_collections.ConfigDict) -> list[Candidate]:
  """The solutions to the first `max_problems` problems of a split (0: to all)."""
  pool = run.candidates(split)
  if not settings.max_problems or split != "train":
    return pool
  ids = {p.id for p in run.problems(split)[: settings.max_problems]}
  return [c for c in pool if c.problem_id in ids]


def verifier_examples(
  run: Run, verifier: verifiers.Verifier, split: str, settings: ml_collections.ConfigDict
) -> tuple[list[packing.Example], list[tuple[Problem, Candidate, Rationale | None]]]:
  """Training examples of one verifier on one split (with correct solutions if lambda > 0), and what they ask."""
  problem_of = {p.id: p for p in run.problems(split)}
  pool = training_candidates(run, split, settings)
  asked: list[tuple[Problem, Candidate, Rationale | None]]
  written: dict[tuple[str, int], list[Rationale]] = {}
  if verifier.needs_rationales and settings.max_rationales:
    for r in jsonl.iter_records(run.path("rationales", f"{split}.jsonl"), Rationale):
      of_candidate = written.setdefault((r.problem_id, r.candidate_index), []) if r.kept else []
      if len(of_candidate) < settings.max_rationales:
        of_candidate.append(r)
    pool = [c for c in pool if (c.problem_id, c.index) in written]
  chosen = candidates.choose_for_training(pool, settings.max_per_label, settings.balanced, run.config.seed)
  if verifier.needs_rationales:
    asked = [(problem_of[c.problem_id], c, r) for c in chosen for r in written.get((c.problem_id, c.index), [])]
  else:
    asked = [(problem_of[c.problem_id], c, None) for c in chosen]
  examples = [verifiers.verify_example(verifier, run.prompter, p, c, r) for p, c, r in asked]
  if settings.solve_weight:
    examples += [verifiers.solve_example(run.prompter, problem_of[c.problem_id], c.text) for c in chosen if c.correct]
  return examples, asked


def train_verifier(run: Run, name: str, augment: Callable[[list[packing.Example]], list[packing.Example]]) -> None:
  """Trains one verifier, after the gate on its verdict tokens."""
  settings = run.config.verifiers[name]
  verifier = verifiers.get_verifier(name)
  if verifier.learns_pairs:
    train_on_pairs(run, name, augment)
    return

  def make_examples() -> dict[str, list[packing.Example]]:
    examples, asked = verifier_examples(run, verifier, "train", settings)
    longest = max(len(e.tokens) for e in examples)
    verifiers.check_verdict_tokens(verifier, run.prompter, packing.pack(examples, longest), asked)
    return {"train": augment(examples), "val": verifier_examples(run, verifier, "val", settings)[0]}

  run.train(
    name,
    make_examples,
    lambda m: verifiers.make_loss(verifier, run.model, run.prompter, m, settings.solve_weight, remat=settings.remat),
    settings,
    verifier=name,
  )


def train_on_pairs(run: Run, name: str, augment: Callable[[list[packing.Example]], list[packing.Example]]) -> None:
  """Trains the DPO verifier; its reference is what it starts from."""
  settings, verifier = run.config.verifiers[name], verifiers.get_verifier(name)

  def make_examples() -> dict[str, list[packing.Example]]:
    examples: dict[str, list[packing.Example]] = {}
    asked: list[tuple[Problem, Candidate, Rationale | None]] = []
    for split in ("train", "val"):
      problem_of = {p.id: p for p in run.problems(split)}
      pairs = candidates.choose_pairs(training_candidates(run, split, settings), settings.max_pairs, run.config.seed)
      examples[split] = [verifiers.pair_example(run.prompter, problem_of[a.problem_id], a, b) for a, b in pairs]
      if split == "train":
        asked = [(problem_of[c.problem_id], c, None) for both in pairs for c in both]
    longest = max(len(e.tokens) for e in examples["train"])
    verifiers.check_verdict_tokens(verifier, run.prompter, packing.pack(examples["train"], longest), asked)
    return {**examples, "train": augment(examples["train"])}

  run.train(
    name,
    make_examples,
    lambda m: verifiers.make_loss(verifier, run.model, run.prompter, m, 0.0, settings.beta, settings.remat),
    settings,
    verifier=name,
    prepare=lambda rows, max_targets, params: verifiers.with_reference(
      rows, max_targets, params, run.model, run.mesh, run.train_config(name).micro_batch_size
    ),
  )


def write_report(run: Run, all_stages: Sequence[Stage], notes: Sequence[str]) -> None:
  """report/: report.md, index.html, results.json and figures."""
  config = run.config
  by_split = {}
  for split in run.eval_splits:
    problems, pool = run.problems(split), run.candidates(split)
    scores = {n: jsonl.read_records(run.path(run.scores_file(n, split)), Score) for n in run.verifier_names}
    by_split[split] = problems, pool, scores
  embedding, rest = gemma.num_params(run.model)
  meta = {
    **identity(run),
    "model": f"{run.model.name}, {embedding + rest:,} parameters",
    "num_params": embedding + rest,
    "train_steps": {n: v.optim.num_steps for n, v in config.verifiers.items() if "optim" in v},
    "wall_seconds": staging.seconds_of(run.workdir, all_stages),
    "notes": [*notes, *_left_out(run)],
  }
  found = {}
  for split, told in by_split.items():
    ns, ks = config.report.ns, config.report.ks
    if split != "eval":
      ns, ks = ns[-1:], ks[-1:]
    costs = scoring.token_costs(run, *told[:2])
    found[split] = report.build_results(*told, ns=ns, ks=ks, seed=config.seed, meta=meta, costs=costs)
  results = found["eval"]
  if "in_distribution" in found:
    results["in_distribution"] = {k: v for k, v in found["in_distribution"].items() if k != "meta"}
  problems, pool, scores = by_split["eval"]
  solved = {n: run.path("candidates", f"by_{n}.jsonl") for n in run.verifier_names}
  results["generation"] = {
    n: report.generation_results(problems, jsonl.read_records(path, Candidate), config.seed)
    for n, path in solved.items()
    if path.is_file()
  }
  results["samples"] = report.sample_records(problems, pool, scores)
  report.write_report(results, run.path("report"), examples=browse.pick_examples(problems, pool, scores))
  say(f"report: {run.path('report', 'index.html')}")


def _left_out(run: Run) -> list[str]:
  """A line for each verifier whose training examples did not all fit into a row."""
  lines = []
  for name in run.verifier_names:
    path = run.path("metrics", f"{name}.examples.json")
    told = jsonl.read_json(path)["train"] if path.exists() else {"left_out": 0}
    if told["left_out"]:
      lines.append(
        f"{name}: {told['left_out']:,} of {told['examples']:,} training examples are longer than a row of "
        f"{told['row_length']} tokens and were left out."
      )
  return lines


def identity(run: Run) -> dict[str, Any]:
  """What a report says first of its run: code, task, config, bank."""
  config = run.config
  return {
    "code_version": genrm_jax.__version__,
    "task": config.task.name,
    "variant": config.variant,
    "seed": config.seed,
    "config_hash": jsonl.read_json(run.path("config.json"))["hash"],
    "config": config.to_dict(),
    "bank": bank_digest(run),
  }


def bank_digest(run: Run) -> str:
  """SHA-256 over the problems and candidates that are evaluated."""
  return jsonl.digest_of([jsonl.file_digest(run.path(kind, "eval.jsonl")) for kind in ("problems", "candidates")])


def verifier_stages(run: Run, augment: Callable[[list[packing.Example]], list[packing.Example]]) -> list[Stage]:
  """Train (where it is trained) and score, for each verifier of the config."""
  out = []
  data = tuple(f"{kind}/{split}.jsonl" for kind in ("problems", "candidates") for split in ("train", "val"))
  written = tuple(f"rationales/{split}.jsonl" for split in ("train", "val"))
  for name in run.verifier_names:
    verifier = verifiers.get_verifier(name)
    source = run.config.verifiers[name].init_from
    model = (f"checkpoints/{source}",) if source else ()
    if verifier.is_trained:
      needs = data + (written if verifier.needs_rationales else ()) + model
      model = (f"checkpoints/{name}",)
      train = functools.partial(train_verifier, run, name, augment)
      out.append(Stage(f"train_{name}", train, reads=needs, writes=model, uses_devices=True))
    asked = tuple(f"{kind}/{split}.jsonl" for split in run.eval_splits for kind in ("problems", "candidates"))
    scored = tuple(run.scores_file(name, split) for split in run.eval_splits)
    score = functools.partial(scoring.score_verifier, run, name)
    out.append(Stage(f"score_{name}", score, reads=asked + model, writes=scored, uses_devices=True))
  return out


def report_stage(run: Run, before: Sequence[Stage], notes: Sequence[str]) -> Stage:
  """The last stage; it reads what is scored, all scores, and what verifiers have solved."""
  solved = tuple(path for stage in before for path in stage.writes if path.startswith("candidates/by_"))
  reads = solved + tuple(
    name
    for split in run.eval_splits
    for name in (
      f"problems/{split}.jsonl",
      f"candidates/{split}.jsonl",
      *(run.scores_file(n, split) for n in run.verifier_names),
    )
  )
  writes = tuple(f"report/{name}" for name in ("results.json", "report.md", "index.html"))
  return Stage("report", lambda: write_report(run, before, notes), reads=reads, writes=writes)


# The command line.


def use_cpu_devices(number: int) -> None:
  """Splits a CPU into so many devices, if that is what JAX runs on and XLA_FLAGS does not say otherwise.

  A small model keeps two cores busy as two devices, each with half of the batch, and hardly as one.
  """
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", number)


_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: FILE.py:VARIANT.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything that the run makes is kept: a folder, or gs://BUCKET/PATH."
)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, by name; all if empty.")
_DISTRIBUTED = flags.DEFINE_enum(
  "distributed", "", ["", "auto"], "auto: the processes of a TPU pod, of SLURM, Open MPI or GKE find each other."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where processes are numbered by hand.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0.")
_TIMEOUT = flags.DEFINE_integer("distributed_timeout_s", 300, "Seconds to wait for all processes.")


def main(make_stages: Callable[[Run], list[Stage]]) -> None:
  """Runs an experiment's stages. A user's mistake ends in one message and exit code 1."""

  def run_main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells of its every step
    with one_message(leave=distributed.leave):
      use_cpu_devices(_CONFIG.value.cpu_devices)
      distributed.start(_distributed_settings())
      run = Run(ml_collections.FrozenConfigDict(_CONFIG.value), saved.absolute(_WORKDIR.value))
      stages = make_stages(run)
      if "verifiers" in run.config:  # an experiment that trains none has no such settings
        run.check_settings()
      memory.keep_freed_memory()
      config = run.config.to_dict()
      distributed.check_same("the config", jsonl.digest_of(config))
      distributed.from_main(lambda: staging.claim_workdir(run.workdir, config))
      staging.run_stages(run.workdir, stages, _STAGES.value, say)

  flags.mark_flags_as_required(["config", "workdir"])
  app.run(run_main, flags_parser=_parse_flags)


def _distributed_settings() -> distributed.Settings:
  auto = _DISTRIBUTED.value == "auto"
  return distributed.Settings(auto, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _TIMEOUT.value)


def _located(argument: str) -> str:
  flag, _, path = argument.partition("=")
  return f"{flag}={locate.config_path(path)}" if flag in ("--config", "-config") else argument


def _parse_flags(argv: list[str]) -> list[str]:
  """The command line, parsed by absl, with words for a config file or a key that is not there."""
  overrides = [a.split("=")[0] for a in argv if a.startswith("--config.")]
  with one_message():
    try:
      rest = app.parse_flags_with_usage([_located(a) for a in argv])
      _CONFIG.value.to_dict()  # a file that could not be loaded shows itself only here
    except OSError as e:
      raise UserError(f"cannot load the config: {str(e).splitlines()[-1].strip()}") from e
    except (AttributeError, KeyError) as e:
      if not overrides:
        raise
      inner = e.args[0] if e.args else ""
      key = inner.args[0] if isinstance(inner, KeyError) else inner
      raise UserError(f"{', '.join(overrides)}: the config has no key {str(key).replace(chr(10), '. ')}") from e
  return rest
