"""GSM8K on the solutions and rationales that the paper's authors released.

    python -m experiments.gsm8k --config=experiments/configs/gsm8k.py:tiny --config.data_dir=DATA --workdir=DIR

DATA holds clones of openai/grade-school-math and genrm-star/genrm-critiques. The candidates are the released ones
(Gemini 1.0 Pro), or a file of your own solutions to GSM8K test problems (config.task.candidates); verifiers are
evaluated on a draw from the pools of held-out problems. Rationales for training come from the raw pool, kept where
their verdict agrees with the label (paper, section 3.3), or from a grader of your own (config.grader).
"""

import itertools

from genrm_jax import verifiers
from genrm_jax.data import candidates, grading, jsonl, packing
from genrm_jax.pipeline import gsm8k_data, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.pytrees import KIND_SOLVE
from genrm_jax.records import Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import SentencePieceTokenizer, train_sentencepiece


def make_tokenizer(run: Run) -> None:
  """The SentencePiece file that the config names, or one learnt from the training problems, solutions, rationales."""
  f = run.config.tokenizer
  if f.path:
    jsonl.write_bytes(run.path("tokenizer.model"), SentencePieceTokenizer(f.path).file_bytes)
    return
  texts = itertools.chain(
    (p.question for p in run.problems("train")),
    (c.text for c in run.candidates("train")),
    (r.text for r in _first_rationales(run, "train").values()),
  )
  train_sentencepiece(texts, run.path("tokenizer.model"), f.vocab_size, seed=run.config.seed, max_lines=f.max_lines)


def _first_rationales(run: Run, split: str) -> dict[tuple[str, int], Rationale]:
  """The first released rationale of each candidate that was kept; none where a grader of our own writes them later."""
  first: dict[tuple[str, int], Rationale] = {}
  if run.config.grader.way == "released":
    for r in jsonl.iter_records(run.path("rationales", f"{split}.jsonl"), Rationale):
      if r.kept:
        first.setdefault((r.problem_id, r.candidate_index), r)
  return first


def base_examples(run: Run, split: str) -> list[packing.Example]:
  """Every token of what a verifier reads and writes is a target: problem, solution, rationale, verdict question.

  The verdict itself is left out: the base is not told which solutions are right.
  """
  question_of = {p.id: p.question for p in run.problems(split)}
  rationale_of, prompter = _first_rationales(run, split), run.prompter
  examples = []
  pool = candidates.choose_for_training(run.candidates(split), run.config.base.max_per_label, False, run.config.seed)
  for c in pool:
    question, rationale = question_of[c.problem_id], rationale_of.get((c.problem_id, c.index))
    if rationale:
      prompt = prompter.cot(question, c.text)
      text = [*prompt[1:], *prompter.rationale(rationale.text, c.correct)[:-2]]  # without verdict and end mark
    else:
      prompt = prompter.direct(question, c.text)
      text = prompt[1:]
    examples.append(packing.sft_example(f"candidate {c.index} of {c.problem_id}", prompt[:1], text, KIND_SOLVE))
  return examples


def train_base(run: Run) -> None:
  """A language model of the training texts, from scratch: it stands in for pretraining."""
  c = run.config.base
  run.train(
    "base",
    lambda: {split: base_examples(run, split) for split in ("train", "val")},
    lambda m: verifiers.sft_loss(run.model, m, 1.0, c.remat),
    c,
  )


def make_stages(run: Run) -> list[Stage]:
  """All stages, in order."""
  c = run.config
  if c.grader.way not in ("released", *grading.WAYS):
    raise UserError(f"config.grader.way is {c.grader.way!r}; it is released, {' or '.join(grading.WAYS)}")
  records = tuple(f"{kind}/{split}.jsonl" for kind in ("problems", "candidates") for split in gsm8k_data.SPLITS)
  written = ("rationales/train.jsonl", "rationales/val.jsonl", "rationales/ledger.json")
  texts = ("problems/train.jsonl", "candidates/train.jsonl")
  released = c.grader.way == "released"
  known = (*texts, *written[:1]) if released else texts
  writes = records + ("problems/left_out.json",) + (written if released else ())
  stages = [
    Stage("release", lambda: gsm8k_data.read_release(run), writes=writes),
    Stage("tokenizer", lambda: make_tokenizer(run), reads=known, writes=("tokenizer.model",)),
  ]
  if any(it.init_from == "base" for it in (*c.verifiers.values(), *(() if released else (c.grader,)))):
    reads, writes = (*known, "tokenizer.model"), ("checkpoints/base",)
    stages.append(Stage("base", lambda: train_base(run), reads=reads, writes=writes, uses_devices=True))
  if not released:
    stages.append(Stage("grade", lambda: gsm8k_data.grade(run), reads=records, writes=written, uses_devices=True))
  stages += verifier_stages.verifier_stages(run, list)
  notes = [
    "Candidates: the released solutions of Gemini 1.0 Pro to GSM8K train problems; the evaluation problems are in no "
    "training row."
  ]
  if c.task.candidates:
    notes = [f"Candidates: {c.task.candidates}, solutions to GSM8K test problems."]
  if "base" in c:
    notes.insert(
      0,
      "No pretrained model: a small Gemma trained from scratch on the training texts stands in for one; "
      "its figures say how the code works, not how well a pretrained verifier does.",
    )
  return [*stages, verifier_stages.report_stage(run, stages, notes)]


if __name__ == "__main__":
  verifier_stages.main(make_stages)
