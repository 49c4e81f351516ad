"""Builds the stages of a run from its config, for any task and verifiers."""

import functools
from collections.abc import Sequence
from typing import Any

from genrm_jax.pipeline import checks, data_stages, fitting, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.base import optional_method

# Settings that decide what a model is and reads.
_MODEL = ("model", "tokenizer", "prompts", "seed", "task.name")
_SAMPLING = (*_MODEL, "engine.max_tokens", "task")
_RATIONALES = ("rationales/train.jsonl", "rationales/val.jsonl", "rationales/ledger.json")


def make_stages(run: Run) -> list[Stage]:
  """All stages, in order.

  Raises:
    UserError: a setting that a stage needs is missing.
  """
  _check_sources(run)
  before = [*data_stages_of(run)]
  before += verifier_stages_of(run)
  return [*before, _report_stage(run, before)]


def files(run: Run, *kinds: str, splits: Sequence[str] = ()) -> tuple[str, ...]:
  return tuple(f"{kind}/{split}.jsonl" for split in splits or run.splits for kind in kinds)


def data_stages_of(run: Run) -> list[Stage]:
  """The stages for problems, tokenizer, candidates and rationales; which of them depends on task and config."""
  c, way = run.config, data_stages.rationales_from(run)
  stages: list[Stage] = []
  tokenizer = ("tokenizer.model",) if c.tokenizer.type == "sentencepiece" else ()
  problems, pools = files(run, "problems"), files(run, "candidates")
  known: tuple[str, ...] = files(run, "problems", "candidates", splits=["train"])
  sampled = False
  if c.get("bank"):
    stages.append(
      _stage(run, data_stages.copy_bank, "bank", writes=problems + pools, sources=_bank(run), settings=("task",))
    )
  elif optional_method(run.task, "released"):
    with_rationales = _RATIONALES if way == "released" else ()
    known += with_rationales[:1]
    writes = (*problems, *pools, "problems/left_out.json", *with_rationales)
    sources = {"task.candidates": c.task.candidates} if c.task.get("candidates") else {}
    decided_by: tuple[str, ...] = ("task", "seed", "grader.way", "grader.reading", "grader.drop_leaks")
    stages.append(_stage(run, data_stages.read_release, "release", writes=writes, sources=sources, settings=decided_by))
  else:
    stages.append(_stage(run, data_stages.make_problems, "problems", writes=problems, settings=("task", "seed")))
    sampled = True
  if tokenizer:
    given = run.tokenizer_source
    # A given tokenizer comes first; one trained here needs the training texts.
    stage = _stage(
      run,
      data_stages.make_tokenizer,
      "tokenizer",
      reads=() if given else known,
      writes=tokenizer,
      sources=given,
      settings=("tokenizer", *given, "seed", "grader.way"),
    )
    stages.insert(0 if given else len(stages), stage)
  started = [*c.verifiers.values(), *([c.grader] if way in ("reference", "plain") else [])]
  if "base" in c and any(s.get("init_from") == "base" for s in started):
    stages.append(_training(run, data_stages.train_base, "base", (*known, *tokenizer), {}, ("grader.way",)))
  if sampled:
    reads, sources = (*problems, *tokenizer), _checkpoint(run)
    if "generator" in c:
      train = _training(run, data_stages.train_generator, "generator", tokenizer, sources, ("task", "gaps"))
      stages.append(train)
      reads, sources = (*reads, *train.writes), {}
    decided_by, make = (*_SAMPLING, "candidates"), data_stages.make_candidates
    stages.append(_stage(run, make, "candidates", reads, pools, sources, decided_by, devices=True))
  judged = files(run, "problems", "candidates", splits=["train", "val"])
  if way == "program" and optional_method(run.task, "rationale"):
    stages.append(_stage(run, data_stages.write_rationales, "rationales", judged, _RATIONALES, settings=("task",)))
  elif way in ("reference", "plain"):
    reads, sources = _start(run, "grader")
    stages.append(
      _stage(
        run,
        data_stages.sample_rationales,
        "grade",
        reads=(*judged, *tokenizer, *reads),
        writes=_RATIONALES,
        sources=sources,
        settings=(*_SAMPLING, "grader"),
        devices=True,
      )
    )
  return stages


def verifier_stages_of(run: Run) -> list[Stage]:
  """For each verifier: train it, score with it, and sample its own solutions if it was trained to solve."""
  tokenizer = ("tokenizer.model",) if run.config.tokenizer.type == "sentencepiece" else ()
  training_data = files(run, "problems", "candidates", splits=["train", "val"])
  evaluated = files(run, "problems", "candidates", splits=run.eval_splits)
  out: list[Stage] = []
  solve: list[Stage] = []
  for name in run.verifier_names:
    verifier = run.verifier_type(name)
    model, sources = _start(run, name)
    if verifier.is_trained:
      reads = (*training_data, *(_RATIONALES[:2] if verifier.needs_rationales else ()), *tokenizer, *model)
      train = functools.partial(fitting.train_verifier, name=name)
      out.append(_training(run, train, name, reads, sources, ("gaps",)))
      model, sources = out[-1].writes, {}
    score = functools.partial(verifier_stages.score_verifier, run, name)
    scored = tuple(run.scores_file(name, split) for split in run.eval_splits)
    decided_by = (
      *_MODEL,
      "engine.max_tokens",
      f"verifiers.{name}",
      *(["votes"] if verifier.samples_rationales else []),
    )
    needed = verifier.scores_needed(run.config.verifiers[name])
    others = tuple(run.scores_file(other, split) for other in needed for split in run.eval_splits)
    reads = (*evaluated, *tokenizer, *model, *others)
    out.append(
      Stage(
        f"score_{name}", score, reads, scored, sources, decided_by, check=lambda: run.engine_mesh, uses_devices=True
      )
    )
    weight = run.config.verifiers[name].get("solve_weight", 0.0)
    if "candidates" in run.config and (weight or verifier.compared_as_solver):
      again = functools.partial(verifier_stages.solve_again, run, name)
      reads, writes = ("problems/eval.jsonl", *tokenizer, *model), (f"candidates/by_{name}.jsonl",)
      decided_by = (*_SAMPLING, "candidates", f"verifiers.{name}")
      solve.append(Stage(f"solve_{name}", again, reads, writes, {}, decided_by, uses_devices=True))
  return [*out, *solve]


def _report_stage(run: Run, before: Sequence[Stage]) -> Stage:
  """The last stage: reads the evaluated candidates, all scores, and solutions sampled from verifiers."""
  solved = tuple(path for stage in before for path in stage.writes if path.startswith("candidates/by_"))
  scores = tuple(run.scores_file(name, split) for split in run.eval_splits for name in run.verifier_names)
  writes = tuple(f"report/{name}" for name in ("results.json", "report.md", "index.html"))
  report = functools.partial(verifier_stages.write_report, run, before, _notes(run))
  reads = (*files(run, "problems", "candidates", splits=run.eval_splits), *scores, *solved)
  return Stage("report", report, reads, writes, settings=("report", "seed"))


def _stage(run: Run, work, name: str, reads=(), writes=(), sources=None, settings=(), devices: bool = False) -> Stage:
  check = (lambda: run.engine_mesh) if devices else (lambda: None)
  return Stage(
    name, functools.partial(work, run), reads, writes, sources or {}, settings, check=check, uses_devices=devices
  )


def _training(
  run: Run, work: Any, name: str, reads: tuple[str, ...], sources: dict[str, str], settings: tuple[str, ...]
) -> Stage:
  """A stage that trains `name`: the base, the generator or a verifier."""
  is_verifier = name in run.config.verifiers
  key, stage = (f"verifiers.{name}", f"train_{name}") if is_verifier else (name, name)
  scratch = (f"rows_{name}", f"metrics/{name}.jsonl", f"metrics/{name}.examples.json")
  work = functools.partial(work, run)
  check = functools.partial(checks.check_training_devices, run, name)
  return Stage(
    stage, work, reads, (f"checkpoints/{name}",), sources, (*_MODEL, key, *settings), scratch, check, uses_devices=True
  )


def _start(run: Run, name: str) -> tuple[tuple[str, ...], dict[str, str]]:
  """What training starts from, as (reads, sources): a checkpoint of this run, or `config.model.checkpoint`."""
  source = run.training(name).init_from
  return ((f"checkpoints/{source}",), {}) if source else ((), _checkpoint(run))


def _checkpoint(run: Run) -> dict[str, str]:
  return {"model.checkpoint": run.checkpoint_path} if run.checkpoint_path else {}


def _bank(run: Run) -> dict[str, str]:
  names = files(run, "problems", "candidates")
  return {f"bank/{name}": f"{run.config.bank}/{name}" for name in names}


def _check_sources(run: Run) -> None:
  c = run.config
  if "verifiers" not in c:
    raise UserError("the config has no 'verifiers'; see experiments/configs for examples")
  if c.tokenizer.type == "sentencepiece" and "vocab_size" not in c.tokenizer and not run.tokenizer_source:
    if c.model.checkpoint:
      raise UserError(f"{run.checkpoint_path} comes without a tokenizer; set --config.tokenizer.path=FILE of its Gemma")
    raise UserError(
      "no model: set --config.model.checkpoint to the name, folder or .gguf file of a Gemma, or, to train a tokenizer "
      "for a new model, tokenizer.vocab_size"
    )
  started = [name for name, v in c.verifiers.items() if v.get("init_from") == "generator"]
  if c.get("bank") and started:
    raise UserError(
      f"{', '.join(started)}: init_from='generator', but with config.bank none is trained; set another init_from"
    )
  for name in run.verifier_names:
    has_program = data_stages.rationales_from(run) != "program" or optional_method(run.task, "rationale")
    if run.verifier_type(name).needs_rationales and not has_program:
      raise UserError(
        f"verifier {name} needs rationales, but task {run.task.name} has no method `rationale`; write one, "
        "set config.grader.way, or remove the verifier"
      )


def _notes(run: Run) -> list[str]:
  """Notes at the top of the report."""
  c, notes = run.config, list(getattr(run.task, "notes", ()))
  if "base" in c:
    notes.insert(
      0,
      "No pretrained model: a small Gemma trained from scratch on the training texts stands in for one. The figures "
      "show that the code works, not how well a pretrained verifier performs.",
    )
  elif c.tokenizer.type == "char" and c.model.checkpoint:
    notes.insert(0, "No pretrained model: a small base trained from scratch on generic string tasks stands in for one.")
  models = {"generator": c.get("generator", {}), **c.verifiers}
  taken = [f"{name} ({settings['shipped']})" for name, settings in models.items() if settings.get("shipped")]
  if taken:
    notes.append(f"Not trained in this run, but adapters that come with the package: {', '.join(taken)}.")
  return notes
