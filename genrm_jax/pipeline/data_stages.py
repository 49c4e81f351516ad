"""Stages that prepare data for the verifiers: problems, tokenizer, generator, candidates, rationales, base model."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from genrm_jax.data import candidates, grading, jsonl, rationales, readers
from genrm_jax.data.packing import Example, sft_example
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import sample_keys
from genrm_jax.pipeline import checks, fitting, sharing
from genrm_jax.pipeline.run import Run
from genrm_jax.pytrees import KIND_SOLVE
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.tasks.base import Released, checked_grade, checked_problems, optional_method
from genrm_jax.tasks.compact import renumber
from genrm_jax.text.tokenizer import train_sentencepiece
from genrm_jax.training import saved
from genrm_jax.verifiers.base import sft_loss, solve_example

WAYS = ("program", "released", *grading.WAYS)  # where training rationales come from


def rationales_from(run: Run) -> str:
  """Where training rationales come from, one of WAYS."""
  way = run.config.grader.way if "grader" in run.config else "program"
  if way not in WAYS:
    raise UserError(f"config.grader.way is {way!r}; choose one of {', '.join(WAYS)}")
  return way


def method(run: Run, name: str) -> Callable[..., Any]:
  """An optional method of the task. Raises UserError if the task does not define it."""
  found = optional_method(run.task, name)
  if found is None:
    raise UserError(f"task {run.task.name} has no method `{name}`, which this config needs; see docs/extending.md")
  return found


# Problems and released data.


def make_problems(run: Run) -> None:
  """Writes the problems of every split; questions that an earlier split contains are left out of later ones."""
  seen: set[str] = set()
  for split in run.splits:
    made = checked_problems(run.task, split, run.rng(split))
    problems = [p for p in made if p.question not in seen]
    if len(problems) < len(made):
      say(f"{split}: left out {len(made) - len(problems)} problems that an earlier split contains")
    seen |= {p.question for p in problems}
    jsonl.write_records(run.path("problems", f"{split}.jsonl"), problems)


def read_release(run: Run) -> None:
  """Writes the problems, candidates and, if configured, filtered rationales that come with the task."""
  released: Released = method(run, "released")(run.config.seed)
  problems, pools = dict(released.problems), dict(released.candidates)
  own = run.config.task.get("candidates", "")
  if own:
    pools["eval"] = readers.read_candidates(own, problems["eval"], run.task)
    with_solutions = {c.problem_id for c in pools["eval"]}
    problems["eval"] = [p for p in problems["eval"] if p.id in with_solutions]
  for split in run.splits:
    jsonl.write_records(run.path("problems", f"{split}.jsonl"), problems[split])
    jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pools[split])
    num_right, unread = sum(c.correct for c in pools[split]), sum(c.answer is None for c in pools[split])
    counts = f"{num_right} of them correct" + (f", {unread} without an answer" if unread else "")
    say(f"{split}: {len(problems[split])} problems, {len(pools[split])} solutions, {counts}")
  if rationales_from(run) == "released":
    write_filtered(run, released.rationales, pools)
  left_out = released.left_out()
  jsonl.write_json(run.path("problems", "left_out.json"), left_out)
  checks.check_pools(run)
  say(f"{left_out['left_out']} of {left_out['rows']} rows left out: {run.path('problems', 'left_out.json')}")


def copy_bank(run: Run) -> None:
  """Copies problems and candidates from another run of this task, so that verifiers are compared on equal data."""
  bank = saved.absolute(run.config.bank)
  _check_bank(run, bank)
  for split in run.splits:
    for kind in ("problems", "candidates"):
      path = bank / kind / f"{split}.jsonl"
      if not path.is_file():
        raise UserError(f"no {path}; config.bank must be the workdir of a run of {run.task.name}")
      jsonl.write_bytes(run.path(kind, path.name), path.read_bytes())
    # Report what is wrong now, not after hours of training.
    problems, pool = jsonl.read_records(bank / "problems" / path.name, Problem), jsonl.read_records(path, Candidate)
    known = {p.id for p in problems}
    unknown = next((c.problem_id for c in pool if c.problem_id not in known), None)
    if unknown is not None:
      raise UserError(f"{path}: a candidate for problem {unknown!r}, which {bank}/problems/{split}.jsonl does not have")
    if split in ("train", "val") and not run.config.task.get("index_shift", True):
      problems, pool = renumber(problems, pool)
      jsonl.write_records(run.path("problems", f"{split}.jsonl"), problems)
      jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pool)
  checks.check_pools(run)


def _check_bank(run: Run, bank: epath.Path) -> None:
  """Raises UserError if the folder is not the workdir of a run of this task."""
  path = bank / "config.json"
  if not path.is_file():
    raise UserError(f"no {path}; config.bank must be the workdir of a run of {run.task.name}")
  found = jsonl.read_json(path)
  task = found["config"].get("task") if isinstance(found, dict) and isinstance(found.get("config"), dict) else None
  name = task.get("name") if isinstance(task, dict) else None
  if name != run.config.task.name:
    raise UserError(
      f"config.bank = {bank} is a run of task {name!r}, not {run.config.task.name!r}; give one of this task"
    )


# Tokenizer.


def make_tokenizer(run: Run) -> None:
  """Writes the given SentencePiece model, or trains one on problems, solutions and rationales."""
  c, given = run.config.tokenizer, run.given_tokenizer()
  if given:
    jsonl.write_bytes(run.path("tokenizer.model"), given.file_bytes)
    return

  def texts() -> Iterator[str]:
    yield from (p.question for p in run.problems("train"))
    yield from (c.text for c in run.candidates("train"))
    yield from (r.text for r in first_rationales(run, "train").values())

  train_sentencepiece(texts(), run.path("tokenizer.model"), c.vocab_size, seed=run.config.seed, max_lines=c.max_lines)


def first_rationales(run: Run, split: str) -> dict[tuple[str, int], Rationale]:
  """The first kept rationale of each candidate, by (problem id, index); empty unless rationales are released."""
  first: dict[tuple[str, int], Rationale] = {}
  if rationales_from(run) == "released":
    for r in run.rationales(split):
      if r.kept:
        first.setdefault((r.problem_id, r.candidate_index), r)
  return first


# Generator and candidates.


def train_generator(run: Run) -> None:
  """Trains a generator on "generator" problems, which no verifier sees; stopped early, so that it makes errors."""
  if fitting.take_shipped(run, "generator"):
    return
  rows = fitting.write_rows(
    run, "generator", fitting.held_out(run, "generator", fitting.with_gaps(run, _solutions(run)))
  )
  fitting.fit(run, "generator", sft_loss(run.model, rows.counts.max_targets, 1.0, run.remat("generator")), rows)


def _solutions(run: Run) -> Iterator[Example]:
  for problem in checked_problems(run.task, "generator", run.rng("generator")):
    yield solve_example(run.prompter, problem, problem.reference)


def make_candidates(run: Run) -> None:
  """Samples and grades the generator's solutions to the problems of every split."""
  is_trained = "generator" in run.config
  if is_trained:
    params, step = run.load_params("generator", run.engine_mesh)
    source = f"generator/{step}"
  else:
    params, source = run.init_params("candidates", run.engine_mesh), run.model.name
  c, engine = run.config.candidates, run.engine(params)
  for split in run.splits:
    problems = run.problems(split)
    in_training = split in ("train", "val")
    num, num_edited = (c.num_train, c.get("num_edited", 0)) if in_training else (c.num_eval, 0)
    pool = sample_solutions(run, engine, source, problems, num, few_shot=not is_trained)
    say(f"{split}: pass@1 {np.mean([c.correct for c in pool]):.3f} over {len(pool)} solutions")
    if c.add_reference or num_edited:
      pool += [_candidate(run, p, num, p.reference, "reference") for p in problems]
    if num_edited:
      pool += _edited_solutions(run, problems, num + 1, num_edited)
    jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pool)


def _edited_solutions(run: Run, problems: Sequence[Problem], first: int, num: int) -> list[Candidate]:
  """`num` incorrect solutions per problem by the task's program, with indices from `first`."""
  edited, made = method(run, "edited"), list[Candidate]()
  for p in problems:
    rng = np.random.default_rng([run.config.seed, zlib.crc32(p.id.encode())])
    made += [_candidate(run, p, first + i, edited(p, rng), "edited") for i in range(num)]
  return made


def sample_solutions(
  run: Run, engine: Engine, source: str, problems: Sequence[Problem], num: int, few_shot: bool
) -> list[Candidate]:
  """Samples and grades `num` solutions per problem; `few_shot` puts the task's worked examples before each prompt."""
  settings = run.sample_config("candidates")
  shots = run.tokenizer.encode(method(run, "few_shot")(run.prompter.template("solve"))) if few_shot else []

  def work(part: Sequence[Problem]) -> list[list[Candidate]]:
    prompts = [run.prompter.solve(p.question) for p in part]
    prompts = [[bos, *shots, *rest] for bos, *rest in prompts]
    keys = sample_keys(run.config.seed, "generator", [p.id for p in part], num)
    rollouts = engine.generate(prompts, keys, settings, (), "sample solutions")
    return [
      [_sampled(run, problem, i, rollout.ids, source, few_shot) for i, rollout in enumerate(of_problem)]
      for problem, of_problem in zip(part, rollouts, strict=True)
    ]

  found = sharing.map_records(run.path("candidates", source.replace("/", "_")), problems, work, Candidate)
  return [c for of_problem in found for c in of_problem]


def _sampled(run: Run, problem: Problem, index: int, ids: Sequence[int], source: str, few_shot: bool) -> Candidate:
  text = run.tokenizer.decode(ids)
  cut = optional_method(run.task, "first_solution")
  if few_shot and cut:
    text = cut(text)
  return _candidate(run, problem, index, text, source)


def _candidate(run: Run, problem: Problem, index: int, text: str, source: str) -> Candidate:
  grade = checked_grade(run.task, problem, text)
  return Candidate(problem.id, index, text, grade.answer, grade.correct, source)


# Rationales.


def write_rationales(run: Run) -> None:
  """Writes rationales for the training and validation solutions with the task's program."""
  table = {}
  for split in ("train", "val"):
    pool = candidates.distinct(run.candidates(split))
    records = rationales.by_program(run.problems(split), pool, method(run, "rationale"))
    jsonl.write_records(run.path("rationales", f"{split}.jsonl"), records)
    table[split] = rationales.ledger(records, pool)
  jsonl.write_json(run.path("rationales", "ledger.json"), table)


def sample_rationales(run: Run) -> None:
  """Samples rationales from a grader model, with reference solutions (paper, section 3.3) or without."""
  c = run.config.grader
  engine, source = run.engine(run.init_params("grader", run.engine_mesh)), c.init_from or run.model.name
  pools: dict[str, list[Candidate]] = {}
  raw: list[Rationale] = []
  for split in ("train", "val"):
    pools[split] = run.candidates(split)
    problem_of = {p.id: p for p in run.problems(split)}
    chosen = candidates.choose_for_training(pools[split], c.max_per_label, False, run.config.seed)
    prompt_of = _grader_prompts(run, problem_of, pools[split])

    def work(part: Sequence[Candidate], prompt_of=prompt_of) -> list[list[Rationale]]:
      names = [f"{g.problem_id}/{g.index}" for g in part]
      keys: jax.Array = sample_keys(run.config.seed, "grader", names, c.num_rationales)
      prompts = [prompt_of(g, draw) for g in part for draw in range(c.num_rationales)]
      rollouts = engine.generate(prompts, keys.reshape(-1, 1), run.sample_config("grader"), (), "grade")
      texts = [run.tokenizer.decode(rollout.ids) for (rollout,) in rollouts]
      repeated = [g for g in part for _ in range(c.num_rationales)]
      records = iter(grading.as_rationales(repeated, texts, source, c.way))
      return [[next(records) for _ in range(c.num_rationales)] for _ in part]

    found = sharing.map_records(run.path("rationales", split), chosen, work, Rationale)
    raw += [r for of_candidate in found for r in of_candidate]
  write_filtered(run, raw, pools)


def _grader_prompts(run: Run, problem_of: Mapping[str, Problem], pool: Sequence[Candidate]):
  """A function (candidate, draw) -> token ids of the grader's prompt. Each draw has its own reference solution."""
  if run.config.grader.way == "plain":
    return lambda g, draw: run.prompter.cot(problem_of[g.problem_id].question, g.text)
  reference = {
    (c.problem_id, c.index, draw): text
    for of_problem in candidates.by_problem(pool).values()
    for draw in range(run.config.grader.num_rationales)
    for c, text in zip(
      of_problem,
      grading.choose_references(of_problem, problem_of[of_problem[0].problem_id].reference, run.config.seed, draw),
      strict=True,
    )
  }
  return lambda g, draw: run.prompter.grade(
    problem_of[g.problem_id].question, g.text, reference[g.problem_id, g.index, draw]
  )


def write_filtered(run: Run, raw: Iterable[Rationale], pools: Mapping[str, Sequence[Candidate]]) -> None:
  """Filters raw rationales, and writes those for training and validation with a ledger of what was dropped and why.

  Streams `raw`. Rationales for other splits are skipped: a grader that saw the reference must not enter an evaluation.
  """
  keep = rationales.Filter(run.config.grader.reading, run.config.grader.drop_leaks)
  label = {split: {(c.problem_id, c.index): c.correct for c in pools[split]} for split in ("train", "val")}
  ledgers = {split: rationales.Ledger() for split in label}
  of_val: list[Rationale] = []

  def of_train() -> Iterator[Rationale]:
    for r in raw:
      split = next((s for s in label if (r.problem_id, r.candidate_index) in label[s]), None)
      if split is None:
        continue
      correct = label[split][r.problem_id, r.candidate_index]
      filtered = keep(r, correct)
      ledgers[split].add(filtered, correct)
      if split == "train":
        yield filtered
      else:
        of_val.append(filtered)

  jsonl.write_records(run.path("rationales", "train.jsonl"), of_train())
  jsonl.write_records(run.path("rationales", "val.jsonl"), of_val)
  table = {split: ledger.table() for split, ledger in ledgers.items()}
  jsonl.write_json(run.path("rationales", "ledger.json"), {"filter": keep.name, **table})


# A base model from scratch.


def train_base(run: Run) -> None:
  """Trains a language model from scratch on the training texts, in place of pretraining."""
  rows = fitting.write_rows(run, "base", {split: _base_examples(run, split) for split in ("train", "val")})
  fitting.fit(run, "base", sft_loss(run.model, rows.counts.max_targets, 1.0, run.remat("base")), rows)


def _base_examples(run: Run, split: str) -> Iterator[Example]:
  """All tokens that a verifier reads or writes are targets: problem, solution, rationale, verdict question.

  The verdict is left out, so the base does not learn which solutions are correct.
  """
  question_of = {p.id: p.question for p in run.problems(split)}
  rationale_of, prompter = first_rationales(run, split), run.prompter
  pool = candidates.choose_for_training(run.candidates(split), run.config.base.max_per_label, False, run.config.seed)
  for c in pool:
    question, rationale = question_of[c.problem_id], rationale_of.get((c.problem_id, c.index))
    if rationale:
      prompt = prompter.cot(question, c.text)
      text = [*prompt[1:], *prompter.rationale(rationale.text, c.correct)[:-2]]  # without verdict and end mark
    else:
      prompt = prompter.direct(question, c.text)
      text = prompt[1:]
    yield sft_example(f"candidate {c.index} of {c.problem_id}", prompt[:1], text, KIND_SOLVE)
