"""LLM-as-a-Judge: a model that was never trained to verify, asked as GenRM-CoT is."""

import functools

import jax
import numpy as np
import pytest
from char_model import CHAR, CONFIG, PROMPTER

from genrm_jax import verifiers
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.verifiers import GENRM_COT, JUDGE, VERIFIERS

PROBLEMS = [Problem("p0", "last_letter", "eval", "1ab2cd;", "bd"), Problem("p1", "last_letter", "eval", "3xyz;", "z")]
CANDIDATES = [Candidate(p.id, i, t, None, False, "") for p in PROBLEMS for i, t in enumerate(("BbCd;", "Bb;"))]


@functools.cache
def _engine():
  params = jax.jit(gemma.init, static_argnums=0)(CONFIG, jax.random.key(1))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Engine(params, CONFIG, mesh, CHAR.eos_id, rows_per_batch=8, max_tokens=64)


@functools.cache
def _score(verifier, num_votes):
  return verifiers.score_candidates(
    verifier,
    _engine(),
    PROMPTER,
    PROBLEMS,
    CANDIDATES,
    step=0,
    seed=0,
    num_votes=num_votes,
    settings=SampleConfig(8, temperature=1.2),
  )


def test_the_judge_votes_on_rationales_that_it_samples():
  scores = _score(JUDGE, 3)
  assert [(s.problem_id, s.candidate_index, s.verifier, s.step) for s in scores] == [
    (c.problem_id, c.index, "judge", 0) for c in CANDIDATES
  ]
  assert all(len(s.votes) == 3 and len({v.text for v in s.votes}) > 1 for s in scores)
  forced = 0
  for s, c in zip(scores, CANDIDATES, strict=True):
    numbers = [v.p_yes for v in s.votes if v.p_yes is not None]
    assert s.value == (pytest.approx(np.mean(numbers)) if numbers else None)
    question = next(p.question for p in PROBLEMS if p.id == c.problem_id)
    for v in s.votes:
      # Of a text with special tokens, which it does not show, the tokens are not known here.
      if v.state == "forced" and "?" not in v.text and len(CHAR.encode(v.text)) == v.num_tokens:
        ids = [*PROMPTER.cot(question, c.text), *CHAR.encode(v.text + "?")]
        ((yes, _),) = _engine().next_token_probs([ids], (PROMPTER.yes_id, PROMPTER.no_id), "probs")
        assert v.p_yes == pytest.approx(yes, rel=1e-4)
        forced += 1
  assert forced > 3


def test_the_judge_asks_as_genrm_cot_does():
  assert [s.votes for s in _score(JUDGE, 3)] == [s.votes for s in _score(GENRM_COT, 3)]


def test_the_judge_is_not_trained():
  assert [v.is_trained for v in VERIFIERS.values()] == [False, True, True, True, True]
  assert not JUDGE.needs_rationales and JUDGE.writes_rationales
  with pytest.raises(UserError, match="judge is not trained; it scores as it is"):
    verifiers.make_loss(JUDGE, CONFIG, PROMPTER, 1, 0.0)
  with pytest.raises(AssertionError):
    verifiers.verify_example(JUDGE, PROMPTER, PROBLEMS[0], CANDIDATES[0])


def test_verifiers_are_in_the_order_of_the_tables():
  assert list(VERIFIERS) == ["judge", "dpo", "orm", "genrm", "genrm_cot"]
