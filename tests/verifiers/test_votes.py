"""Votes against probabilities worked out by a plain forward pass, and the state of every kind of rationale."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_model as tiny

from genrm_jax.infer.engine import Engine, Rollout
from genrm_jax.infer.sampling import SampleConfig, sample_keys
from genrm_jax.records import VOTE_STATES, Vote
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer
from genrm_jax.verifiers import votes as score

CHAR = CharTokenizer()
PROMPTER = Prompter(CHAR, make_format("compact"))
TRACKED = (PROMPTER.yes_id, PROMPTER.no_id)
SETTINGS = SampleConfig(6)


def _engine(**kwargs):
  return tiny.engine(CHAR.vocab_size, end_id=CHAR.eos_id, **kwargs)


def _logits(ids):
  return tiny.logits(ids, CHAR.vocab_size)[-1]


def _prompts():
  return [PROMPTER.direct(q, s) for q, s in (("1ab2cd;", "BbCd;"), ("3xy;", "Dx;"), ("0abc1d2efg;", "AcBdCg;"))]


def test_direct_votes_are_p_yes_and_the_sigmoid_of_the_class_logit():
  prompts = _prompts()
  votes = [vote for (vote,) in score.direct_votes(_engine(), PROMPTER, prompts, "score")]
  want = np.stack([tiny.softmax(_logits(p))[list(TRACKED)] for p in prompts])
  assert [(v.state, v.num_tokens, v.text) for v in votes] == [("ok", 0, "")] * 3
  np.testing.assert_allclose([(v.p_yes, v.p_no) for v in votes], want, rtol=1e-4)
  assert (want.sum(1) < 0.9).all(), "of the whole vocabulary, not of the two"
  prompts = _prompts()
  votes = [vote for (vote,) in score.classifier_votes(_engine(), PROMPTER, prompts, "score")]
  z = np.array([_logits(p)[CHAR.cls_id] for p in prompts], np.float64)
  np.testing.assert_allclose([v.p_yes for v in votes], 1 / (1 + np.exp(-z)), rtol=1e-4)
  np.testing.assert_allclose([v.p_no for v in votes], 1 / (1 + np.exp(z)), rtol=1e-4)
  assert [(v.state, v.num_tokens) for v in votes] == [("ok", 0)] * 3


def test_a_likelihood_vote_keeps_the_order_of_very_unlikely_solutions(monkeypatch):
  log_likelihood = [-701.0, -0.25, -700.0, -900.0, -0.0]
  monkeypatch.setattr(Engine, "log_likelihood", lambda self, *args: np.array(log_likelihood))
  votes = [vote for (vote,) in score.likelihood_votes(_engine(), [[1]] * 5, [[2]] * 5, "score")]
  assert [(v.state, v.p_no, v.num_tokens, v.text) for v in votes] == [("ok", None, 0, "")] * 5
  p = [v.p_yes for v in votes]
  assert 0 == p[3] < p[0] < p[2] < p[1] < p[4] == 1 and p[1] == pytest.approx(np.exp(-0.25), rel=1e-12)
  assert p[2] / p[0] == pytest.approx(np.e)
  assert score.mean_p_yes([votes[0]]) == p[0], "a mean of one loses nothing"
  yes, no = Vote("ok", 0.9, 0.05, 3), Vote("forced", 0.2, 0.7, 9)
  silent = [Vote(state, None, None, 4) for state in ("truncated", *VOTE_STATES[3:])]
  assert score.mean_p_yes([yes, *silent, no]) == pytest.approx(0.55)
  assert score.mean_p_yes([Vote("ok", 0.0, 1.0, 1), *silent]) == 0.0
  assert score.mean_p_yes(silent) is None and score.mean_p_yes([]) is None


def _generate_by_hand(monkeypatch, texts):
  """Makes Engine.generate return texts (a last "$" is the end mark) with tracked probabilities (place, place + 0.5)."""

  def encode(text):
    return [*CHAR.encode(text.removesuffix("$")), *([CHAR.eos_id] if text.endswith("$") else [])]

  def generate(self, prompts, keys, settings, tracked, label):
    assert (tracked, settings) == (TRACKED, SETTINGS) and keys.shape == (len(texts), len(texts[0]))
    assert len(prompts) == len(texts)
    ids = [[encode(text) for text in of_prompt] for of_prompt in texts]
    return [[Rollout(x, np.arange(len(x))[:, None] + np.array([0, 0.5])) for x in of_prompt] for of_prompt in ids]

  monkeypatch.setattr(Engine, "generate", generate)


def _votes(engine, prompts, num_votes):
  keys = jax.random.split(jax.random.key(0), (len(prompts), num_votes))
  return score.rationale_votes(engine, PROMPTER, prompts, keys, SETTINGS, "score")


def test_every_rationale_gets_its_state(monkeypatch):
  texts = [
    ["ab+? Yes$", "?", "ab$", "?x? Yes$"],
    ["a? No", "abcdef", "? Yes? No$", "?x Yes$"],
  ]
  _generate_by_hand(monkeypatch, texts)
  prompts = [PROMPTER.cot("1ab;", "Bb;"), PROMPTER.cot("2cd;", "2c;")]
  votes = _votes(_engine(), prompts, 4)
  assert [[v.state for v in mine] for mine in votes] == [
    ["ok", "forced", "missing", "ok"],
    ["ok", "forced", "contradictory", "malformed"],
  ]
  assert [[v.num_tokens for v in mine] for mine in votes] == [[6, 1, 3, 5], [3, 6, 5, 4]]
  assert [[v.text for v in mine] for mine in votes] == [[text.removesuffix("$") for text in mine] for mine in texts]
  assert [(v.p_yes, v.p_no) for v in (votes[0][0], votes[0][3], votes[1][0])] == [(4, 4.5), (3, 3.5), (2, 2.5)]
  for vote, ids in (
    (votes[0][1], [*prompts[0], *CHAR.encode("?")]),
    (votes[1][1], [*prompts[1], *CHAR.encode("abcdef?")]),
  ):
    np.testing.assert_allclose([vote.p_yes, vote.p_no], tiny.softmax(_logits(ids))[list(TRACKED)], rtol=1e-4)
  for vote in (votes[0][2], *votes[1][2:]):
    assert (vote.p_yes, vote.p_no) == (None, None)


@pytest.mark.parametrize(("room", "state"), [(0, "truncated"), (1, "forced")])
def test_a_verdict_is_forced_where_the_context_has_room(monkeypatch, room, state):
  _generate_by_hand(monkeypatch, [["abcdef", "ab? No"]])
  prompt = PROMPTER.cot("1ab;", "Bb;")
  votes = _votes(_engine(max_tokens=len(prompt) + 6 + room), [prompt], 2)
  assert [[v.state for v in mine] for mine in votes] == [[state, "ok"]]
  assert (votes[0][0].p_yes is None) == (state == "truncated")
  assert votes[0][0].num_tokens == 6 and votes[0][0].text == "abcdef"


def test_a_question_cut_in_the_middle_is_completed(monkeypatch):
  prompter = Prompter(CHAR, make_format("genrm_short"))
  question = prompter.format.render(prompter.format.conclude)
  _generate_by_hand(monkeypatch, [["ab." + question[:n] for n in (0, 1, 17, len(question) - 1)]])
  prompt = prompter.cot("a?", "b")
  keys = jax.random.split(jax.random.key(0), (1, 4))
  (votes,) = score.rationale_votes(_engine(), prompter, [prompt], keys, SETTINGS, "score")
  want = tiny.softmax(_logits([*prompt, *CHAR.encode("ab." + question)]))[list(TRACKED)]
  assert [v.state for v in votes] == ["forced"] * 4
  np.testing.assert_allclose([(v.p_yes, v.p_no) for v in votes], [want] * 4, rtol=1e-3)


def test_sampled_rationales_are_read_where_they_were_sampled(monkeypatch):
  generate, generated = Engine.generate, []
  monkeypatch.setattr(Engine, "generate", lambda *args: generated.append(generate(*args)) or generated[0])
  # A question and verdicts that a model of random weights samples now and then.
  prompter = Prompter(CHAR, dataclasses.replace(PROMPTER.format, verdict_question="w", yes="M", no="Q"))
  prompts = [prompter.cot("1ab;", "Bb;"), prompter.cot("2cd3ef;", "CcDf;")]
  keys = sample_keys(0, "vote", ["p/0", "p/1"], 24)
  votes = score.rationale_votes(_engine(), prompter, prompts, keys, SampleConfig(20, 1.5, top_k=3), "score")
  (question,), verdicts = CHAR.encode("w"), [prompter.yes_id, prompter.no_id]
  counts = dict.fromkeys(VOTE_STATES, 0)
  for prompt, rolled, mine in zip(prompts, generated[0], votes, strict=True):
    for rollout, vote in zip(rolled, mine, strict=True):
      ids = rollout.ids
      counts[vote.state] += 1
      assert (vote.num_tokens, vote.text) == (len(ids), CHAR.decode(ids))
      words = [t for t in range(1, len(ids)) if ids[t - 1] == question and ids[t] in verdicts]
      answered = [t for t in words if not CHAR.decode(ids[t + 1 :])[:1].isalnum()]
      if vote.state in ("ok", "forced"):
        asked = ids[: answered[-1]] if answered else ids if ids[-1] == question else [*ids, question]
        want = tiny.softmax(_logits([*prompt, *asked]))[verdicts]
        np.testing.assert_allclose([vote.p_yes, vote.p_no], want, rtol=1e-3)
        assert vote.state == ("ok" if answered else "forced")
      else:
        assert (vote.p_yes, vote.p_no) == (None, None)
  assert min(counts[state] for state in ("ok", "forced")) >= 3, counts
