"""What each verifier is trained on, its loss against one worked out by hand, the gate, and its scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from char_model import CHAR, CONFIG, PROMPTER

from genrm_jax import verifiers
from genrm_jax.data import packing
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter, get_format
from genrm_jax.train import optim, step
from genrm_jax.verifiers import GENRM, GENRM_COT, ORM

WIDTH = 64  # of a packed row, and of the reference
ALL = (ORM, GENRM, GENRM_COT)
QUESTIONS = {"1ab2cd;": "BbCd;", "3xyz4uv;": "DzEv;", "0abc1d2efg;": "AcBdCg;"}
PROBLEMS = [Problem(f"p{i}", "last_letter", "train", q, a[1::2], a) for i, (q, a) in enumerate(QUESTIONS.items())]
CANDIDATES = [
  Candidate(p.id, index, text, text[1::2], correct, "hand")
  for p in PROBLEMS
  for index, (text, correct) in enumerate([(p.reference, True), (p.reference[:-2] + "q;", False)])
]
RATIONALES = {
  (c.problem_id, c.index): Rationale(
    c.problem_id, c.index, 0, f"{c.text}{'+' if c.correct else '-'}", None, "hand", True
  )
  for c in CANDIDATES
}


def _asked(verifier):
  problem = {p.id: p for p in PROBLEMS}
  return [
    (problem[c.problem_id], c, RATIONALES[c.problem_id, c.index] if verifier.needs_rationales else None)
    for c in CANDIDATES
  ]


def _verify_examples(verifier, prompter=PROMPTER):
  return [verifiers.verify_example(verifier, prompter, *asked) for asked in _asked(verifier)]


def _solve_examples():
  return [verifiers.solve_example(PROMPTER, p, p.reference) for p in PROBLEMS]


@functools.cache
def _params():
  return jax.jit(gemma.init, static_argnums=0)(CONFIG, jax.random.key(1))


@functools.cache
def _mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


# --- what is trained


def _supervised(example):
  """(the tokens up to a target's place, the target) of every place with weight."""
  assert set(example.weights.tolist()) <= {0.0, 1.0}
  places = np.flatnonzero(example.weights)
  return [(example.tokens[: t + 1].tolist(), int(example.targets[t])) for t in places]


def _kinds(example):
  return set(example.kind[example.weights > 0].tolist()), set(example.kind[example.weights == 0].tolist())


def test_orm_learns_the_label_at_the_last_token():
  for (problem, candidate, _), example in zip(_asked(ORM), _verify_examples(ORM), strict=True):
    assert _supervised(example) == [(PROMPTER.direct(problem.question, candidate.text), int(candidate.correct))]
    assert _kinds(example) == ({KIND_VERIFY}, {0})


def test_genrm_learns_the_verdict_after_the_question():
  for (problem, candidate, _), example in zip(_asked(GENRM), _verify_examples(GENRM), strict=True):
    verdict = PROMPTER.yes_id if candidate.correct else PROMPTER.no_id
    assert _supervised(example) == [(PROMPTER.direct(problem.question, candidate.text), verdict)]
    assert _kinds(example) == ({KIND_VERIFY}, {0})


def _continuation(prompt, target):
  return [([*prompt, *target[:t]], target[t]) for t in range(len(target))]


def test_genrm_cot_learns_rationale_question_verdict_and_end():
  for (problem, candidate, rationale), example in zip(_asked(GENRM_COT), _verify_examples(GENRM_COT), strict=True):
    text = rationale.text + "?" + (" Yes" if candidate.correct else " No")
    prompt = PROMPTER.cot(problem.question, candidate.text)
    assert _supervised(example) == _continuation(prompt, [*CHAR.encode(text), CHAR.eos_id])
    assert _kinds(example) == ({KIND_VERIFY}, {0})


def test_a_solution_is_learnt_with_its_end():
  for problem, example in zip(PROBLEMS, _solve_examples(), strict=True):
    target = [*CHAR.encode(problem.reference), CHAR.eos_id]
    assert _supervised(example) == _continuation(PROMPTER.solve(problem.question), target)
    assert _kinds(example) == ({KIND_SOLVE}, {0})


def test_an_example_is_named_after_its_candidate():
  assert _verify_examples(GENRM)[3].name == "candidate 1 of p1"
  assert _solve_examples()[2].name == "a solution of p2"


def test_unknown_verifier():
  assert verifiers.get_verifier("genrm_cot") is GENRM_COT
  with pytest.raises(UserError, match="unknown verifier 'prm'; there are: judge, dpo, orm, genrm, genrm_cot"):
    verifiers.get_verifier("prm")


# --- the gate


@pytest.mark.parametrize("verifier", ALL, ids=lambda v: v.name)
def test_the_gate_opens_for_what_was_packed(verifier):
  rows = packing.pack(_verify_examples(verifier) + _solve_examples(), WIDTH)
  assert rows.data.segments.max() > 1
  verifiers.check_verdict_tokens(verifier, PROMPTER, rows, _asked(verifier))


@pytest.mark.parametrize("verifier", ALL, ids=lambda v: v.name)
def test_the_gate_shows_both_sequences_where_the_prompt_differs(verifier):
  other = Prompter(CHAR, dataclasses.replace(PROMPTER.format, verify="??", verify_cot="!!"))
  rows = packing.pack(_verify_examples(verifier, other), WIDTH)
  problem, candidate, rationale = _asked(verifier)[0]
  scored, trained = (verifier.prompt(p, problem.question, candidate.text) for p in (PROMPTER, other))
  target = int(candidate.correct) if verifier is ORM else PROMPTER.yes_id
  if rationale is not None:
    scored, trained = ([*prompt, *CHAR.encode(rationale.text + "?")] for prompt in (scored, trained))
  with pytest.raises(UserError, match="candidate 0 of p0: the verdict is not scored where it was trained") as e:
    verifiers.check_verdict_tokens(verifier, PROMPTER, rows, _asked(verifier))
  assert str(e.value).endswith(f"\n  scored:  {scored} -> {target}\n  trained: {trained} -> {target}")


@pytest.mark.parametrize("verifier", ALL, ids=lambda v: v.name)
def test_the_gate_shows_a_flipped_label(verifier):
  flipped = [(p, dataclasses.replace(c, correct=not c.correct), r) for p, c, r in _asked(verifier)]
  rows = packing.pack([verifiers.verify_example(verifier, PROMPTER, *asked) for asked in flipped], WIDTH)
  right, wrong = (1, 0) if verifier is ORM else (PROMPTER.yes_id, PROMPTER.no_id)
  with pytest.raises(UserError, match=rf"(?s)scored: .* -> {right}\n  trained: .* -> {wrong}$"):
    verifiers.check_verdict_tokens(verifier, PROMPTER, rows, _asked(verifier))


def test_the_gate_stays_shut_for_one_that_is_missing():
  examples = _verify_examples(GENRM)
  rows = packing.pack(examples[:-1], WIDTH)
  with pytest.raises(UserError, match="candidate 1 of p2"):
    verifiers.check_verdict_tokens(GENRM, PROMPTER, rows, _asked(GENRM))


def _gate_for(prompter, text):
  problem, candidate, rationale = _asked(GENRM_COT)[0]
  asked = [(problem, candidate, dataclasses.replace(rationale, text=text))]
  rows = packing.pack([verifiers.verify_example(GENRM_COT, prompter, *asked[0])], 200)
  verifiers.check_verdict_tokens(GENRM_COT, prompter, rows, asked)


def test_the_gate_reads_rationales_as_scoring_does():
  short = Prompter(CHAR, get_format("genrm_short"))
  _gate_for(short, "ab.")
  with pytest.raises(UserError, match="the rationale for candidate 0 of p0 reads as 'contradictory'"):
    _gate_for(PROMPTER, "ab? No.")
  for prompter, text, sampled, forced in (
    (PROMPTER, "ab? So", "ab?", "ab? So"),
    (short, "ab.\n", "ab.\n" + short.format.verdict_question, "ab." + short.format.verdict_question),
  ):
    with pytest.raises(UserError, match="a forced verdict would be asked for with other tokens") as e:
      _gate_for(prompter, text)
    assert str(e.value).endswith(f"\n  sampled: {CHAR.encode(sampled)}\n  forced:  {CHAR.encode(forced)}")


# --- losses


@jax.jit
def _forward(params, tokens):
  ones = jnp.ones_like(tokens)
  x, _ = gemma.forward(params, CONFIG, tokens, jnp.cumsum(ones, 1) - 1, ones)
  return gemma.unembed(params, CONFIG, x)


def _logits(ids):
  """Logits after the last of the ids, of a sequence by itself."""
  tokens = np.zeros((1, WIDTH), np.int32)
  tokens[0, : len(ids)] = ids
  return np.asarray(_forward(_params(), tokens), np.float64)[0, len(ids) - 1]


def _nll(prompt, target):
  """-log p of each target token after the prompt and the targets before it."""
  logits = [_logits(ids) for ids, _ in _continuation(prompt, target)]
  return [np.log(np.exp(z).sum()) - z[t] for z, t in zip(logits, target, strict=True)]


def _loss(verifier, rows, solve_weight=0.0, max_targets=None):
  loss_fn = verifiers.make_loss(verifier, CONFIG, PROMPTER, max_targets or rows.max_targets, solve_weight)
  loss, sums = jax.jit(loss_fn)(_params(), rows.take(np.arange(rows.num_rows)))
  assert float(sums["loss"][0]) == float(loss) and float(sums["loss"][1]) == 1
  return float(loss), {name: (float(total), float(count)) for name, (total, count) in sums.items()}


def test_orm_loss_is_binary_cross_entropy_of_the_class_logit():
  loss, sums = _loss(ORM, packing.pack(_verify_examples(ORM), WIDTH))
  want = []
  for problem, candidate, _ in _asked(ORM):
    r = 1 / (1 + np.exp(-_logits(PROMPTER.direct(problem.question, candidate.text))[CHAR.cls_id]))
    want.append(-np.log(r if candidate.correct else 1 - r))
  np.testing.assert_allclose(loss, np.mean(want), rtol=1e-4)
  assert sums["loss_verify"][1] == len(CANDIDATES) and sums["loss_solve"] == (0, 0)


def test_genrm_loss_is_minus_log_p_of_the_verdict():
  loss, sums = _loss(GENRM, packing.pack(_verify_examples(GENRM), WIDTH))
  want = [_nll(PROMPTER.direct(p.question, c.text), [PROMPTER.verdict_id(c.correct)])[0] for p, c, _ in _asked(GENRM)]
  np.testing.assert_allclose(loss, np.mean(want), rtol=1e-4)
  np.testing.assert_allclose(sums["loss_verify"], (np.sum(want), len(want)), rtol=1e-4)


def _by_hand():
  """-log p of every verification target of GenRM-CoT, and of every solution target."""
  verify, solve = [], []
  for p, c, r in _asked(GENRM_COT):
    verify += _nll(PROMPTER.cot(p.question, c.text), PROMPTER.rationale(r.text, c.correct))
  for p in PROBLEMS:
    solve += _nll(PROMPTER.solve(p.question), PROMPTER.solution(p.reference))
  return verify, solve


@pytest.mark.parametrize("solve_weight", [0.0, 0.3])
def test_loss_is_verification_plus_lambda_times_solution(solve_weight):
  rows = packing.pack(_verify_examples(GENRM_COT) + _solve_examples(), WIDTH)
  verify, solve = _by_hand()
  loss, sums = _loss(GENRM_COT, rows, solve_weight)
  np.testing.assert_allclose(loss, np.mean(verify) + solve_weight * np.mean(solve), rtol=1e-4)
  np.testing.assert_allclose(sums["loss_verify"], (np.sum(verify), len(verify)), rtol=1e-4)
  np.testing.assert_allclose(sums["loss_solve"], (np.sum(solve), len(solve)), rtol=1e-4)
  assert abs(np.mean(verify) - np.mean(solve)) > 0.01


def test_solutions_do_not_move_the_gradient_where_lambda_is_0():
  rows = packing.pack(_verify_examples(GENRM) + _solve_examples(), WIDTH)
  batch = rows.take(np.arange(rows.num_rows))
  other = dataclasses.replace(batch, targets=np.where(batch.kind == KIND_SOLVE, 7, batch.targets))
  assert (other.targets != batch.targets).any()

  @jax.jit
  def grads(batch, solve_weight):
    loss_fn = verifiers.sft_loss(CONFIG, rows.max_targets, solve_weight)
    return jax.grad(lambda params: loss_fn(params, batch)[0])(_params())

  def difference(solve_weight):
    one, two = grads(batch, solve_weight), grads(other, solve_weight)
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))

  assert difference(0.0) == 0.0
  assert difference(0.1) > 1e-3


@pytest.mark.parametrize("verifier", [ORM, GENRM_COT], ids=lambda v: v.name)
def test_logits_at_targets_only_give_the_loss_of_all_logits(verifier):
  solve = [] if verifier is ORM else _solve_examples()
  rows = packing.pack(_verify_examples(verifier) + solve, WIDTH)
  assert rows.max_targets < WIDTH // 2
  weight = 0.3 if solve else 0.0
  np.testing.assert_allclose(_loss(verifier, rows, weight)[0], _loss(verifier, rows, weight, WIDTH)[0], rtol=1e-6)


def test_a_classifier_has_no_solution_part():
  with pytest.raises(UserError, match=r"orm is a classifier: solve_weight must be 0, not 0\.25"):
    verifiers.make_loss(ORM, CONFIG, PROMPTER, 1, 0.25)


@pytest.mark.parametrize(
  ("verifier", "solve_weight"), [(ORM, 0.0), (GENRM, 0.0), (GENRM_COT, 0.5)], ids=["orm", "genrm", "genrm_cot"]
)
def test_training_lowers_the_loss(verifier, solve_weight):
  rows = packing.pack(_verify_examples(verifier) + (_solve_examples() if solve_weight else []), WIDTH)
  batch = rows.take(np.arange(rows.num_rows))
  optimizer = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-2, num_steps=40))
  shardings = sharding.param_shardings(gemma.param_specs(CONFIG), _mesh(), CONFIG.rules)
  with jax.set_mesh(_mesh()):
    state = step.init_state(jax.tree.map(jnp.copy, _params()), optimizer)
    loss_fn = verifiers.make_loss(verifier, CONFIG, PROMPTER, rows.max_targets, solve_weight)
    train_step = step.make_train_step(loss_fn, optimizer, _mesh(), step.state_shardings(state, shardings, _mesh()))
    losses = []
    for _ in range(40):
      state, sums = train_step(state, batch)
      losses.append({name: float(total) / max(float(count), 1) for name, (total, count) in sums.items()})
  parts = ("loss", "loss_verify", "loss_solve") if solve_weight else ("loss", "loss_verify")
  for part in parts:
    assert losses[-1][part] < 0.5 * losses[0][part], (part, losses[0], losses[-1])


# --- scores


TWIN = dataclasses.replace(PROBLEMS[0], id="twin")


def _score(verifier, candidates, *, seed=0, num_votes=3, rows_per_batch=8):
  engine = Engine(_params(), CONFIG, _mesh(), CHAR.eos_id, rows_per_batch, max_tokens=WIDTH)
  settings = SampleConfig(8, temperature=1.2)
  return verifiers.score_candidates(
    verifier,
    engine,
    PROMPTER,
    [*PROBLEMS, TWIN],
    candidates,
    step=40,
    seed=seed,
    num_votes=num_votes,
    settings=settings,
  )


def _votes(scores):
  """What was read of each candidate, rounded to what another batch may change."""
  return {
    (s.problem_id, s.candidate_index): [
      (v.state, v.text, v.num_tokens, None if v.p_yes is None else round(v.p_yes, 5)) for v in s.votes
    ]
    for s in scores
  }


@pytest.mark.parametrize("verifier", ALL, ids=lambda v: v.name)
def test_a_score_for_each_candidate(verifier):
  scores = _score(verifier, CANDIDATES)
  assert [(s.problem_id, s.candidate_index) for s in scores] == [(c.problem_id, c.index) for c in CANDIDATES]
  assert {(s.verifier, s.step) for s in scores} == {(verifier.name, 40)}
  for s, (problem, candidate, _) in zip(scores, _asked(verifier), strict=True):
    assert len(s.votes) == (3 if verifier is GENRM_COT else 1)
    numbers = [v.p_yes for v in s.votes if v.p_yes is not None]
    assert s.value == (pytest.approx(np.mean(numbers)) if numbers else None)
    z = _logits(verifier.prompt(PROMPTER, problem.question, candidate.text))
    if verifier is ORM:
      assert s.value == pytest.approx(1 / (1 + np.exp(-z[CHAR.cls_id])), rel=1e-4)
    elif verifier is GENRM:
      p = np.exp(z) / np.exp(z).sum()
      assert (s.value, s.votes[0].p_no) == pytest.approx((p[PROMPTER.yes_id], p[PROMPTER.no_id]), rel=1e-4)
    else:
      assert len({v.text for v in s.votes}) > 1


def test_votes_belong_to_the_candidate_and_to_nothing_else():
  # The same solution once more, under another index, and to the same question under another name.
  twins = [dataclasses.replace(CANDIDATES[0], index=9), dataclasses.replace(CANDIDATES[0], problem_id=TWIN.id)]
  pool = [*CANDIDATES, *twins]
  want = _votes(_score(GENRM_COT, pool))
  order = np.random.default_rng(0).permutation(len(pool))
  assert _votes(_score(GENRM_COT, [pool[i] for i in order])) == want
  some = _votes(_score(GENRM_COT, pool[2:5]))
  assert some == {key: want[key] for key in some} and len(some) == 3
  fewer = _votes(_score(GENRM_COT, pool, num_votes=2))
  assert fewer == {key: votes[:2] for key, votes in want.items()}
  assert want["p0", 9] != want["p0", 0] != want["twin", 0] != want["p0", 9]
  assert _votes(_score(GENRM_COT, pool, seed=1)) != want
