"""The stages of the list tasks: problems, a generator, its solutions, rationales of a program, verifiers, report.

Verifiers are trained on short lists and evaluated on longer ones (paper, section 4.1). Every model starts from
`config.model.checkpoint`: a real Gemma, or the small base of experiments/assets that stands in for one.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from genrm_jax import verifiers
from genrm_jax.data import candidates, jsonl, packing, rationales
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import rollout_keys
from genrm_jax.pipeline import verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.tasks import natural
from genrm_jax.tasks.compact import renumber
from genrm_jax.tasks.last_letter import LastLetter
from genrm_jax.tasks.word_sorting import WordSorting, read_bbh
from genrm_jax.text.tokenizer import SentencePieceTokenizer
from genrm_jax.train import saved

ListTask = LastLetter | WordSorting

_ALL_SPLITS = ("train", "val", "eval", "in_distribution")
# Each purpose draws from a stream of its own, so that changing one leaves the others as they were.
_STREAMS = {"train": 1, "val": 2, "eval": 3, "in_distribution": 4, "generator": 5, "gaps": 6}


def _splits(run: Run) -> list[str]:
  return [split for split in _ALL_SPLITS if split in run.config.task]


def _files(run: Run, kind: str) -> tuple[str, ...]:
  return tuple(f"{kind}/{split}.jsonl" for split in _splits(run))


def _rng(run: Run, purpose: str) -> np.random.Generator:
  return np.random.default_rng([run.config.seed, _STREAMS[purpose]])


def make_problems(run: Run, task: ListTask) -> None:
  """Problems of all splits; a question that stands in an earlier one is drawn again."""
  seen: set[str] = set()
  for split in _splits(run):
    c = run.config.task[split]
    rng = _rng(run, split)
    if c.get("bbh"):
      jsonl.write_records(run.path("problems", f"{split}.jsonl"), read_bbh(c.bbh))
      continue
    made: list[Problem] = []
    while len(made) < c.num_problems:
      problem = task.problem(rng, int(rng.integers(c.min_words, c.max_words + 1)), split, len(made))
      if problem.question not in seen:
        seen.add(problem.question)
        made.append(problem)
    jsonl.write_records(run.path("problems", f"{split}.jsonl"), made)


def with_gaps(run: Run, examples: Sequence[packing.Example]) -> list[packing.Example]:
  """Random gaps in the positions after the characters that `config.gaps` names."""
  limits = {run.tokenizer.encode(char)[0]: gap for chars, gap in run.config.gaps.items() for char in chars}
  rng = _rng(run, "gaps")
  return [packing.with_gaps(e, limits, rng) for e in examples]


def train_generator(run: Run, task: ListTask) -> None:
  """A generator for lists of all lengths, as a pretrained model would be one, stopped early, so that it errs.

  Its training problems are its own; no verifier sees them.
  """
  c = run.config.generator

  def make_examples() -> dict[str, list[packing.Example]]:
    rng = _rng(run, "generator")
    examples = []
    for i in range(c.num_examples):
      problem = task.problem(rng, int(rng.integers(c.min_words, c.max_words + 1)), "generator", i)
      examples.append(verifiers.solve_example(run.prompter, problem, problem.reference))
    examples = with_gaps(run, examples)
    return {"train": examples[c.num_eval_examples :], "val": examples[: c.num_eval_examples]}

  run.train("generator", make_examples, lambda m: verifiers.sft_loss(run.model, m, 1.0, c.remat), c)


def _solve_prompt(run: Run, task: ListTask, question: str, shown: bool) -> list[int]:
  """The prompt for a solution; with worked examples before it for a model as it came, which has not learnt the form."""
  prompt = run.prompter.solve(question)
  if not shown:
    return prompt
  shots = run.tokenizer.encode(task.few_shot(run.prompter.format.render(run.prompter.format.solve)))
  return [run.tokenizer.bos_id, *shots, *prompt[1:]]


def sample_solutions(
  run: Run, task: ListTask, engine: Engine, source: str, problems: Sequence[Problem], num: int, shown: bool
) -> list[Candidate]:
  """`num` graded solutions to each problem; `shown`: with worked examples in the prompt."""

  def generate(repeated: Sequence[Problem], indices: Sequence[int]) -> list[str]:
    keys = rollout_keys(run.config.seed, [p.id for p in repeated], indices, [0] * len(repeated))
    prompts = [_solve_prompt(run, task, p.question, shown) for p in problems]
    settings = run.sample_config("candidates")
    rollouts = engine.write(prompts, keys.reshape(len(problems), num), settings, (), "sample solutions")
    texts = [run.tokenizer.decode(ids) for mine in rollouts for ids, _ in mine]
    return [natural.first_solution(text) for text in texts] if shown else texts

  return candidates.sample_candidates(problems, num, task, generate, source)


def make_candidates(run: Run, task: ListTask) -> None:
  """Solutions of the generator to the problems of every split."""
  if "generator" in run.config:
    params, step = run.load_params("generator", run.engine_mesh)
    source = f"generator/{step}"
  else:
    params, source = run.init_params("candidates", run.engine_mesh), str(run.config.model.checkpoint)
  c, engine = run.config.candidates, run.engine(params)
  for split in _splits(run):
    problems = run.problems(split)
    num = c.num_train if split in ("train", "val") else c.num_eval
    pool = sample_solutions(run, task, engine, source, problems, num, shown="generator" not in run.config)
    if c.add_reference:
      pool += [candidates.grade(p, num, p.reference, task, "reference") for p in problems]
    jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pool)
    say(f"{split}: pass@1 {np.mean([c.correct for c in pool]):.3f} over {len(pool)} solutions")


def copy_bank(run: Run) -> None:
  """Problems and solutions of another run of this experiment, so that verifiers are compared on the same ones.

  Without `task.index_shift` the lists of the training splits are renumbered from 0 on.
  """
  bank = saved.absolute(run.config.bank)
  for name in (*_files(run, "problems"), *_files(run, "candidates")):
    if not (bank / name).is_file():
      raise UserError(f"{bank} has no {name}; config.bank must be the workdir of a run of {run.config.task.name}")
    # A broken line is told now, and not when a verifier has been trained.
    if name.startswith("problems/"):
      jsonl.read_records(bank / name, Problem)
    else:
      jsonl.read_records(bank / name, Candidate)
    jsonl.write_bytes(run.path(name), (bank / name).read_bytes())
  if not run.config.task.index_shift:
    for split in ("train", "val"):
      problems, pool = renumber(run.problems(split), run.candidates(split))
      jsonl.write_records(run.path("problems", f"{split}.jsonl"), problems)
      jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pool)


def write_rationales(run: Run, task: ListTask) -> None:
  """The program's rationales for the solutions on which verifiers are trained."""
  table = {}
  for split in ("train", "val"):
    pool: list[Candidate] = candidates.distinct(run.candidates(split))
    records = rationales.by_program(run.problems(split), pool, task.rationale)
    run.write_rationales(split, records)
    table[split] = rationales.ledger(records, pool)
  jsonl.write_json(run.path("rationales", "ledger.json"), table)


def solve_again(run: Run, task: ListTask, name: str) -> None:
  """A verifier's own solutions (paper, section 4.3: unified training)."""
  params, step = run.load_params(name, run.engine_mesh)
  problems, engine = run.problems("eval"), run.engine(params)
  pool = sample_solutions(run, task, engine, f"{name}/{step}", problems, run.config.candidates.num_eval, shown=False)
  jsonl.write_records(run.path("candidates", f"by_{name}.jsonl"), pool)
  say(f"{name}: pass@1 {np.mean([c.correct for c in pool]):.3f} over {len(pool)} solutions of its own")


def _bank_stages(run: Run, task: ListTask) -> list[Stage]:
  problems, pools = _files(run, "problems"), _files(run, "candidates")
  if run.config.bank:
    return [Stage("bank", lambda: copy_bank(run), writes=problems + pools)]
  stages = [Stage("problems", lambda: make_problems(run, task), writes=problems)]
  needs = problems
  if "generator" in run.config:
    trained = "checkpoints/generator"
    stages.append(Stage("generator", lambda: train_generator(run, task), writes=(trained,), uses_devices=True))
    needs = (*problems, trained)
  return [
    *stages,
    Stage("candidates", lambda: make_candidates(run, task), reads=needs, writes=pools, uses_devices=True),
  ]


def copy_tokenizer(run: Run) -> None:
  """The SentencePiece file that the config names goes into the workdir."""
  jsonl.write_bytes(run.path("tokenizer.model"), SentencePieceTokenizer(run.config.tokenizer.path).file_bytes)


def _check_sources(run: Run) -> None:
  """UserError where the config does not name what the stages start from."""
  c = run.config
  if c.task.style == "natural" and not (c.model.checkpoint and c.tokenizer.path):
    raise UserError("give a Gemma and its tokenizer: --config.model.checkpoint=DIR --config.tokenizer.path=FILE")
  started = [name for name, v in c.verifiers.items() if v.init_from == "generator"]
  if c.bank and started:
    raise UserError(f"{', '.join(started)}: init_from is the generator, but with config.bank none is trained here")


def make_stages(make_task: Callable[..., ListTask], run: Run) -> list[Stage]:
  """All stages, in order."""
  _check_sources(run)
  c = run.config.task
  task = make_task(style=c.style, walk=c.walk.to_dict())
  judged = tuple(f"{kind}/{split}.jsonl" for split in ("train", "val") for kind in ("problems", "candidates"))
  written = ("rationales/train.jsonl", "rationales/val.jsonl")
  tokenizer = Stage("tokenizer", lambda: copy_tokenizer(run), writes=("tokenizer.model",))
  stages = [
    *([tokenizer] if run.config.tokenizer.type == "sentencepiece" else []),
    *_bank_stages(run, task),
    Stage("rationales", lambda: write_rationales(run, task), reads=judged, writes=written),
    *verifier_stages.verifier_stages(run, lambda examples: with_gaps(run, examples)),
  ]
  for name in run.verifier_names:
    # GenRM-CoT also where it did not learn to: lambda 0 of the sweep.
    if name == "genrm_cot" or run.config.verifiers[name].get("solve_weight"):
      reads, writes = ("problems/eval.jsonl", f"checkpoints/{name}"), (f"candidates/by_{name}.jsonl",)
      stages.append(
        Stage(f"solve_{name}", functools.partial(solve_again, run, task, name), reads, writes, uses_devices=True)
      )
  train, evaluated = ("-".join(str(n) for n in sorted({w.min_words, w.max_words})) for w in (c.train, c.eval))
  evaluated = "those of BIG-Bench Hard (2-20)" if c.eval.get("bbh") else evaluated
  notes = [f"Generator and verifiers are trained on lists of {train} words and evaluated on {evaluated}."]
  if c.style == "compact" and run.config.model.checkpoint:
    notes.insert(0, "No pretrained model: a small base trained from scratch on generic string tasks stands in for one.")
  return [*stages, verifier_stages.report_stage(run, stages, notes)]
