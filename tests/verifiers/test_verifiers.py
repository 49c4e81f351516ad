"""What each verifier is trained on, its loss against one worked out by hand, the gate, and its scores."""

import dataclasses

import jax
import numpy as np
import pytest
from char_model import CANDIDATES, CHAR, CONFIG, DATA, PROBLEMS, PROMPTER, WIDTH, engine, log_probs, logits, verifier
from char_model import params as params_of
from refusals import refused

from genrm_jax.data import packing
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.records import Vote
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.verifiers import base, scoring
from genrm_jax.verifiers.base import VERIFIERS, TargetCounts, VoteConfig, make_verifier, verifier_class

TRAINED = ("orm", "genrm", "genrm_cot")
QUESTION = {p.id: p.question for p in PROBLEMS}


def _target(name, item):
  """The prompt of an item, and the target ids after it."""
  question, text, correct = item.problem.question, item.candidate.text, item.candidate.correct
  if name == "genrm_cot":
    rationale = CHAR.encode(f"{item.rationale.text}?{' Yes' if correct else ' No'}")
    return PROMPTER.cot(question, text), [*rationale, CHAR.eos_id]
  return PROMPTER.direct(question, text), [int(correct) if name == "orm" else PROMPTER.verdict_id(correct)]


@pytest.mark.parametrize("name", [*TRAINED, "dpo"])
def test_the_gate_finds_another_prompt_a_flipped_label_a_missing_example_and_a_missing_end(name, monkeypatch):
  v = verifier(name)
  items, right = v.select(DATA), v.example
  v.check_gate(items)
  changed = dict(verify="?{verdict_question}", verify_cot="!!", solve="S{question}==")

  def flipped(item):
    if name == "dpo":
      return right(item._replace(chosen=item.rejected, rejected=item.chosen))
    return right(item._replace(candidate=dataclasses.replace(item.candidate, correct=not item.candidate.correct)))

  def without_end(item):
    example = right(item)
    return dataclasses.replace(example, weights=example.weights * (example.targets != CHAR.eos_id))

  wrongs = [verifier(name, Prompter(CHAR, dataclasses.replace(PROMPTER.format, **changed))).example, flipped]
  for wrong in (*wrongs, lambda item: right(items[0]), *([without_end] if name == "dpo" else [])):
    monkeypatch.setattr(v, "example", wrong)
    refused((r"(?s)not scored where it is trained.*scored: .*trained: ", v.check_gate, items))


def test_the_gate_checks_a_sample_of_each_label(monkeypatch):
  v, items = verifier("genrm"), verifier("genrm").select(DATA) * 400
  made = []
  monkeypatch.setattr(v, "example", lambda item, make=v.example: made.append(item.candidate.correct) or make(item))
  v.check_gate(items)
  assert len(made) < 300 and set(made) == {True, False}
  assert base.gate_sample([]) == []


def test_the_gate_reads_rationales_as_scoring_does():
  item = verifier("genrm_cot").select(DATA)[0]
  short = Prompter(CHAR, make_format("genrm_short"))

  def check(prompter, text):
    rationale = dataclasses.replace(item.rationale, text=text)
    verifier("genrm_cot", prompter).check_gate([item._replace(rationale=rationale)])

  check(short, "ab.")
  check(PROMPTER, "ab? So")
  refused(
    ("reads as 'contradictory'", check, PROMPTER, "ab? No."),
    ("other tokens than a sampled one", check, short, "ab.\n"),
  )


def _rows(v, row_length=WIDTH):
  return packing.pack(list(v.examples(DATA)), row_length)


def _loss(v, rows, max_targets=None):
  loss_fn = v.loss(CONFIG, TargetCounts(max_targets or rows.max_targets, 0), "none")
  loss, sums = jax.jit(loss_fn)(params_of(), rows.take(np.arange(rows.num_rows)))
  assert float(sums["loss"][0]) == float(loss) and float(sums["loss"][1]) == 1
  return float(loss), {name: (float(total), float(count)) for name, (total, count) in sums.items()}


@pytest.mark.parametrize(
  ("name", "weight", "z_loss", "every_token"),
  [
    ("orm", 0.0, 0.0, False),
    ("orm", 0.0, 0.5, True),
    ("genrm", 0.0, 0.0, False),
    ("genrm", 0.3, 0.0, False),
    ("genrm_cot", 0.3, 0.0, False),
  ],
)
def test_loss_is_that_worked_out_by_hand(name, weight, z_loss, every_token):
  v = verifier(name, solve_weight=weight, z_loss=z_loss, every_token=every_token)
  items, verify, squares = v.select(DATA), [], []
  assert sum(i.candidate.correct for i in items) * 2 == len(items) == 6, "balanced"
  for item in items:
    prompt, target = _target(name, item)
    if name == "orm":
      first = len(PROMPTER.solve(item.problem.question)) if every_token else -1  # of the solution, or the last token
      z = logits(prompt)[first:, CHAR.cls_id]
      r = 1 / (1 + np.exp(-z))
      squares += (np.log(np.exp(0.0) + np.exp(z)) ** 2).tolist()
      verify += (-np.log(r if item.candidate.correct else 1 - r)).tolist()
    else:
      verify += (-log_probs(prompt, target)).tolist()
  solve = np.concatenate([-log_probs(PROMPTER.solve(p.question), PROMPTER.solution(p.reference)) for p in PROBLEMS])
  rows = _rows(v)
  loss, sums = _loss(v, rows)
  want = np.mean(verify) + weight * np.mean(solve) + (z_loss * np.mean(squares) if z_loss else 0.0)
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  assert sums.get("z_loss") == (pytest.approx((np.sum(squares), len(squares)), rel=1e-4) if z_loss else None)
  np.testing.assert_allclose(sums["loss_verify"], (np.sum(verify), len(verify)), rtol=1e-4)
  assert sums["loss_solve"] == pytest.approx((solve.sum(), len(solve)) if weight else (0, 0), rel=1e-4)
  np.testing.assert_allclose(loss, _loss(v, rows, WIDTH)[0], rtol=1e-6, err_msg="logits at targets alone suffice")


def test_the_orm_computes_one_logit_per_target():
  v = verifier("orm")
  loss_fn = v.loss(CONFIG, TargetCounts(4, 0), "none")
  text = str(jax.make_jaxpr(loss_fn)(params_of(), _rows(v).take(np.arange(1))))
  assert f",4,{CONFIG.vocab_size}]" not in text.replace(" ", "") and "1,4,1]" in text.replace(" ", "")


def test_only_solutions_with_a_majority_for_their_label_are_trained_on():
  """Of a solution's rationales, kept or not, more than the given share must have the label as their verdict."""
  yes, no, none = True, False, None
  verdicts = {
    **{("p0", 0): [yes, yes, no], ("p0", 1): [no, yes, none, no], ("p1", 0): [yes, none, none], ("p1", 1): [no]},
    **{("p2", 0): [yes, yes, yes, no, no, no], ("p2", 1): [no, no, no, yes]},
  }
  label = {(c.problem_id, c.index): c.correct for c in CANDIDATES}
  rationales = [
    base.Rationale(*solution, i, f"{i}", verdict, "hand", kept=verdict is label[solution])
    for i in range(6)
    for solution, each in verdicts.items()
    for verdict in each[i : i + 1]
  ]
  half = {("p0", 0), ("p1", 1), ("p2", 1)}
  for share, wanted in ((0.0, set(verdicts)), (0.3, set(verdicts)), (0.34, {*verdicts} - {("p1", 0)}), (0.5, half)):
    v = verifier("genrm_cot", min_agreement=share, balanced=False, max_rationales=2)
    items = v.select(DATA._replace(rationales=iter(rationales)))
    found = [(i.problem.id, i.candidate.index) for i in items]
    assert set(found) == wanted and all(i.rationale.kept for i in items)
    assert {s: found.count(s) for s in wanted} == {s: min(2, verdicts[s].count(label[s])) for s in wanted}


def _score(name, candidates=CANDIDATES, *, num_votes=3, rows_per_batch=8, max_tokens=WIDTH):
  votes = VoteConfig(num_votes, 0, SampleConfig(8, temperature=1.2))
  of = engine(rows_per_batch=rows_per_batch, max_tokens=max_tokens)
  return scoring.score_candidates(verifier(name), of, PROBLEMS, candidates, votes, step=40)


def _read(scores):
  """The votes of each candidate, rounded to what another batch may change."""

  def fields(v):
    return v.state, v.text, v.num_tokens, None if v.p_yes is None else round(v.p_yes, 5)

  return {(s.problem_id, s.candidate_index): [fields(v) for v in s.votes] for s in scores}


def test_votes_are_a_function_of_the_texts():
  twin = dataclasses.replace(CANDIDATES[0], index=9)
  pool = [*CANDIDATES, twin]
  want = _read(_score("genrm_cot", pool))
  assert want["p0", 9] == want["p0", 0], "equal texts"
  assert len({tuple(votes) for votes in want.values()}) == len(want) - 1
  order = np.random.default_rng(0).permutation(len(pool))
  assert _read(_score("genrm_cot", [pool[i] for i in order])) == want
  some = _read(_score("genrm_cot", pool[2:5], rows_per_batch=2))
  assert some == {key: want[key] for key in some} and len(some) == 3
  assert _read(_score("genrm_cot", pool, num_votes=2)) == {key: votes[:2] for key, votes in want.items()}
  assert _read(_score("judge", pool)) == want, "the judge asks and votes like GenRM-CoT"
  greedy = _read(_score("genrm_cot_greedy", pool))
  for c in CANDIDATES:
    ((state, text, num_tokens, _),) = greedy[c.problem_id, c.index]
    ids = PROMPTER.cot(QUESTION[c.problem_id], c.text)
    for _ in range(num_tokens):
      ids.append(int(logits(ids)[-1].argmax()))
    assert CHAR.decode(ids[-num_tokens:]) == text and state in ("ok", "forced", "missing", "malformed")


def test_equal_texts_are_scored_once(monkeypatch):
  v, sizes = verifier("genrm"), []
  votes_of = v.votes
  monkeypatch.setattr(v, "votes", lambda e, pairs, *how: sizes.append(len(pairs)) or votes_of(e, pairs, *how))
  pairs = [("1ab2cd;", "BbCd;"), ("1ab2cd;", "Bb;"), ("1ab2cd;", "BbCd;")]
  votes = scoring.score_pairs(v, engine(), pairs, VoteConfig(1, 0, SampleConfig(8)))
  assert sizes == [2] and votes[0] == votes[2] != votes[1]


@pytest.mark.parametrize(("name", "num_votes"), [("genrm", 1), ("genrm_cot", 3), ("dpo", 1)])
def test_a_solution_that_is_too_long_is_truncated_and_the_others_are_scored(name, num_votes):
  long = dataclasses.replace(CANDIDATES[0], index=7, text="B" * 60)
  *fitting, last = _score(name, [*CANDIDATES[:2], long])
  assert all(s.value is not None or name == "genrm_cot" for s in fitting)
  assert {v.state for s in fitting for v in s.votes} != {"truncated"}
  assert (last.value, [v.state for v in last.votes]) == (None, ["truncated"] * num_votes)


@pytest.mark.parametrize("name", [*TRAINED, "judge"])
def test_a_text_that_cannot_be_encoded_is_named(name):
  good, how = ("1ab2cd;", "BbCd;"), VoteConfig(1, 0, SampleConfig(8))
  for pair, message in (
    (("1ab", "B\ud83d"), "the solution has half of a surrogate pair, .*, at character 1"),
    (("\udc00", "B"), "the question has half of a surrogate pair"),
    (("1ab", "é"), "the char tokenizer has no 'é'"),
    (("1ab", None), "the solution is None, expected a string"),
  ):
    refused((f"^pair 2: {message}", scoring.score_pairs, verifier(name), engine(), [good, good, pair], how))
  bad = dataclasses.replace(CANDIDATES[0], index=7, text="\ud83d")
  refused((r"^candidate 7 of p0: the solution has half", _score, name, [*CANDIDATES, bad]))


def test_votes_and_examples_of_another_type_or_number_are_refused(monkeypatch):
  v, votes = verifier("genrm"), VoteConfig(1, 0, SampleConfig(8))
  for returned, message in (
    (None, "NoneType for 1 pairs"),
    ([], "0 items for 1 pairs"),
    ([[0.5]], r"\[0.5\] for a pair, expected a list of Vote"),
    ([[Vote("ok", 0.5, 0.5, 0)] * 2], r"2 votes for a pair, but num_votes\(\) says 1"),
  ):
    monkeypatch.setattr(v, "votes", lambda *args, returned=returned: returned)
    message = f"verifier genrm: votes\\(\\) returned {message}"
    refused((message, scoring.score_pairs, v, engine(), [("1ab2cd;", "BbCd;")], votes))
  monkeypatch.setattr(v, "example", lambda item: {"tokens": [1]})
  monkeypatch.setattr(v, "check_gate", lambda items: None)
  refused((r"example\(\) returned .*expected an Example", next, v.examples(DATA)))


def test_verifiers_are_found_by_name_and_by_import_path_and_have_their_settings_checked(tmp_path, monkeypatch):
  names = ["Judge", "DPO", "DPOReference", "ORM", "GenRM", "GenRMCoT", "GreedyRationale"]
  assert [verifier_class(kind).__name__ for kind in VERIFIERS] == names
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "own_verifiers.py").write_text(
    "from genrm_jax.verifiers.genrm import GenRM\nfrom genrm_jax.verifiers.base import Verifier\n"
    "class Mine(GenRM): pass\nclass Other: pass\nclass Half(Verifier):\n  def prompt(self, q, y): return []\n"
  )
  (tmp_path / "broken_verifier.py").write_text("import nothing_of_this_name\n")
  mine = make_verifier("mine", PROMPTER, {"kind": "own_verifiers:Mine"})
  assert (mine.name, mine.is_trained) == ("mine", True)
  for kind, message in (
    ("prm", r"unknown verifier 'prm'; there are: judge, dpo, .*, genrm_cot, .*, or the import path"),
    ("own_verifiers:Nobody", r"own_verifiers.py has no class Nobody"),
    ("own_verifiers:Other", r"Other is not a subclass of .*Verifier"),
    ("own_verifiers:Half", r"Half lacks votes, example"),
    ("broken_verifier:Mine", r"module broken_verifier does not import .*nothing_of_this_name"),
    ("not_there:Mine", r"module not_there does not import"),
  ):
    refused((message, make_verifier, "x", PROMPTER, {"kind": kind}))
  counts = TargetCounts(1, 1)
  for name, settings, message in (
    ("orm", {"solve_weight": 0.25}, "orm is a classifier: solve_weight must be 0"),
    ("dpo", {"beta": 0.0}, "beta must be positive"),
    ("dpo", {"beta": float("nan")}, "beta must be positive"),
  ):
    refused((message, verifier(name, **settings).loss, CONFIG, counts, "none"))
  refused(("dpo is trained on pairs: solve_weight must be 0", next, verifier("dpo", solve_weight=0.25).examples(DATA)))
