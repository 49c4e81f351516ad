"""GSM8K's data as records of three splits: the release, or someone's own solutions; rationales released or sampled."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from genrm_jax.data import candidates, grading, jsonl, rationales, readers
from genrm_jax.infer.sampling import sample_keys
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.tasks.gsm8k import problems as gsm8k
from genrm_jax.tasks.gsm8k import released, sample
from genrm_jax.tasks.gsm8k.rows import BadRows

SPLITS = ("train", "val", "eval")


def data_dir(run: Run) -> epath.Path:
  """The folder with the clones; the smoke variant writes a made-up one of the same layout into the workdir."""
  c = run.config
  if c.variant == "smoke":
    return sample.write(run.path("data"), c.task.num_train + c.task.num_val + c.task.num_eval, c.seed)
  if not c.data_dir:
    raise UserError("give the folder with the clones of grade-school-math and genrm-critiques: --config.data_dir=DIR")
  return epath.Path(c.data_dir).expanduser()


def _known(run: Run, where: epath.Path, split: str) -> list[Problem]:
  """GSM8K's own problems, which say what the right answers are."""
  source = run.config.task.problems
  if source not in ("files", "tfds"):
    raise UserError(f"config.task.problems is {source!r}; it is files or tfds")
  return gsm8k.read_problems(where, split) if source == "files" else gsm8k.read_problems_tfds(split)


def read_release(run: Run) -> None:
  """Problems, their pools and, where the config says so, released rationales; splits separate problems, never rows."""
  c, where, bad = run.config.task, data_dir(run), BadRows()
  known = _known(run, where, "train")
  release = released.scan(where, known, c.rounds, bad)
  split_of = _split(release.problems, run)
  if c.direct_set:
    release = released.with_direct_set(release, where, bad)
    if not c.num_train:
      split_of = {p.id: split_of.get(p.id, "train") for p in release.problems}
  problems = {split: [p for p in release.problems if split_of.get(p.id) == split] for split in SPLITS}
  pools = {split: [it for p in problems[split] for it in release.candidates[p.id]] for split in SPLITS}
  for split in ("val", "eval"):  # the direct set was chosen by label
    pools[split] = [it for it in pools[split] if it.source != released.DIRECT_SOURCE]
  of_problem = candidates.by_problem(pools["eval"]).values()
  pools["eval"] = [it for pool in of_problem for it in _drawn(pool, c.eval_candidates, run)]
  if c.candidates:
    known = _known(run, where, "test")
    pools["eval"] = readers.read_candidates(c.candidates, known, gsm8k.GSM8K())
    asked = {it.problem_id for it in pools["eval"]}
    problems["eval"] = [p for p in known if p.id in asked]
  for split in SPLITS:
    jsonl.write_records(run.path("problems", f"{split}.jsonl"), problems[split])
    jsonl.write_records(run.path("candidates", f"{split}.jsonl"), pools[split])
    right = sum(it.correct for it in pools[split])
    say(f"{split}: {len(problems[split])} problems, {len(pools[split])} solutions, {right} of them right")
  if run.config.grader.way == "released":
    raw = released.iter_rationales(where, release, c.rounds, bad)
    _write_rationales(run, raw, pools)
  left_out = bad.to_dict()
  jsonl.write_json(run.path("problems", "left_out.json"), left_out)
  say(f"{left_out['left_out']} of {left_out['rows']} rows left out: {run.path('problems', 'left_out.json')}")


def _split(problems: Sequence[Problem], run: Run) -> dict[str, str]:
  """The split of each problem of the pool, by id: evaluation and validation at random, the others for training."""
  c = run.config.task
  num_eval = 0 if c.candidates else c.num_eval
  needed = num_eval + c.num_val + (c.num_train or 1)
  if needed > len(problems):
    raise UserError(
      f"config.task asks for {c.num_train or 1} + {c.num_val} + {num_eval} problems (num_train, num_val, num_eval); "
      f"the shards in {data_dir(run)} hold {len(problems)}; get more shards or lower these numbers"
    )
  order = [problems[i].id for i in np.random.default_rng(run.config.seed).permutation(len(problems))]
  last = num_eval + c.num_val + c.num_train if c.num_train else len(order)
  parts = (order[num_eval + c.num_val : last], order[num_eval : num_eval + c.num_val], order[:num_eval])
  return {name: split for split, names in zip(SPLITS, parts, strict=True) for name in names}


def _drawn(pool: Sequence[Candidate], num: int, run: Run) -> list[Candidate]:
  """`num` solutions of a problem's pool, all if it has fewer: a draw that hangs on the seed and the problem alone."""
  rng = np.random.default_rng([run.config.seed, zlib.crc32(pool[0].problem_id.encode())])
  return [pool[i] for i in sorted(rng.permutation(len(pool))[:num])]


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
    names = [f"{it.problem_id}/{it.index}" for it in graded]
    keys = sample_keys(run.config.seed, "grader", names, c.num_rationales).reshape(-1, 1)
    rollouts = engine.generate(prompts, keys, run.sample_config("grader"), (), f"grade {split}")
    texts = [run.tokenizer.decode(rollout.ids) for (rollout,) in rollouts]
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
  encode, bos = run.tokenizer.encode, run.tokenizer.bos_id
  return [
    [
      bos,
      *encode(
        grading.reference_prompt(problem_of[it.problem_id].question, reference[it.problem_id, it.index, draw], it.text)
      ),
    ]
    for it, draw in zip(asked, draws, strict=True)
  ]
