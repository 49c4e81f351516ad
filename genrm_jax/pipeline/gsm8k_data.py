"""GSM8K's data as records of three splits: the release, or someone's own solutions; rationales released or sampled."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath

from genrm_jax.data import candidates, grading, jsonl, rationales, readers
from genrm_jax.infer.sampling import rollout_keys
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.tasks.gsm8k import sample
from genrm_jax.tasks.gsm8k.task import GSM8K

SPLITS = ("train", "val", "eval")


def data_dir(run: Run) -> epath.Path:
  """The folder with the clones; the smoke variant writes a made-up one of the same layout into the workdir."""
  c = run.config
  if c.variant == "smoke":
    return sample.write(run.path("data"), c.task.num_train + c.task.num_val + c.task.num_eval, c.seed)
  if not c.data_dir:
    raise UserError("give the folder with the clones of grade-school-math and genrm-critiques: --config.data_dir=DIR")
  return epath.Path(c.data_dir).expanduser()


def read_release(run: Run) -> None:
  """Problems, their pools and, where the config says so, released rationales; splits separate problems, never rows."""
  c = run.config.task
  names = ("problems", "rounds", "direct_set", "num_train", "num_val", "num_eval", "eval_candidates", "candidates")
  task = GSM8K(str(data_dir(run)), **{name: c[name] for name in names})
  found = task.released(run.config.seed)
  problems, pools = {**found.problems}, {**found.candidates}
  if c.candidates:
    pools["eval"] = readers.read_candidates(c.candidates, problems["eval"], task)
    solved = {it.problem_id for it in pools["eval"]}
    problems["eval"] = [p for p in problems["eval"] if p.id in solved]
  for split in SPLITS:
    jsonl.write_records(run.path("problems", f"{split}.jsonl"), problems[split])
    jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pools[split])
    right = sum(it.correct for it in pools[split])
    say(f"{split}: {len(problems[split])} problems, {len(pools[split])} solutions, {right} of them right")
  if run.config.grader.way == "released":
    _write_rationales(run, found.rationales, pools)
  left_out = found.left_out()
  jsonl.write_json(run.path("problems", "left_out.json"), left_out)
  say(f"{left_out['left_out']} of {left_out['rows']} rows left out: {run.path('problems', 'left_out.json')}")


def _write_rationales(run: Run, raw: Iterable[Rationale], pools: Mapping[str, Sequence[Candidate]]) -> None:
  """rationales/: what the filter makes of raw rationales for training and validation, and the ledger of it.

  They pass one at a time. A grader that has seen the reference has no place in a test: those of evaluation problems are
  left out.
  """
  c = run.config.task
  keep = rationales.Filter(c.reading, c.drop_leaks)
  label = {split: {(it.problem_id, it.index): it.correct for it in pools[split]} for split in ("train", "val")}
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
  run.write_rationales("val", of_val)
  table = {split: ledger.table() for split, ledger in ledgers.items()}
  jsonl.write_json(run.path("rationales", "ledger.json"), {"filter": keep.name, **table})


def grade(run: Run) -> None:
  """Rationales sampled here, by a model that sees a reference solution (paper, section 3.3) or in the plain way."""
  c = run.config.grader
  params, source = run.init_params("grader", run.engine_mesh), c.init_from or str(run.config.model.checkpoint)
  engine, pools, raw = run.engine(params), {}, []
  for split in ("train", "val"):
    pools[split] = run.candidates(split)
    problem_of = {p.id: p for p in run.problems(split)}
    graded = candidates.choose_for_training(pools[split], c.max_per_label, False, run.config.seed)
    asked = [it for it in graded for _ in range(c.num_rationales)]
    draws = list(range(c.num_rationales)) * len(graded)
    prompts = _grader_prompts(run, problem_of, pools[split], asked, draws)
    keys = rollout_keys(run.config.seed, [it.problem_id for it in asked], [it.index for it in asked], draws)
    rollouts = engine.write(prompts, keys[:, None], run.sample_config("grader"), (), f"grade {split}")
    texts = [run.tokenizer.decode(ids) for ((ids, _),) in rollouts]
    raw += grading.as_rationales(asked, texts, source, c.way)
  _write_rationales(run, raw, pools)


def _grader_prompts(
  run: Run,
  problem_of: Mapping[str, Problem],
  pool: Sequence[Candidate],
  asked: Sequence[Candidate],
  draws: Sequence[int],
) -> list[list[int]]:
  """What the grader reads, one prompt for each of `asked`; with a reference, that of its draw."""
  if run.config.grader.way == "plain":
    return [run.prompter.cot(problem_of[it.problem_id].question, it.text) for it in asked]
  reference = {
    (it.problem_id, it.index, draw): text
    for mine in candidates.by_problem(pool).values()
    for draw in range(run.config.grader.num_rationales)
    for it, text in zip(
      mine,
      grading.choose_references(mine, problem_of[mine[0].problem_id].reference, run.config.seed, draw),
      strict=True,
    )
  }
  return [
    run.prompter.grade(problem_of[it.problem_id].question, it.text, reference[it.problem_id, it.index, draw])
    for it, draw in zip(asked, draws, strict=True)
  ]
