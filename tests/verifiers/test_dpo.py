"""The DPO verifier: its pairs, its loss against one worked out by hand, its gate, and its scores."""

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
from genrm_jax.model import gemma, lora
from genrm_jax.pytrees import KIND_VERIFY, PairBatch, TokenBatch
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter
from genrm_jax.train import loop, losses, optim, step
from genrm_jax.verifiers import DPO, GENRM

BETA = 0.3
WIDTH = 64  # of a packed row, and of the reference
REFERENCE, POLICY = 4, 2  # keys of parameters
QUESTIONS = {"1ab2cd;": "BbCd;", "3xyz4uv;": "DzEv;", "0abc1d2efg;": "AcBdCg;"}
PROBLEMS = [Problem(f"p{i}", "last_letter", "train", q, a[1::2], a) for i, (q, a) in enumerate(QUESTIONS.items())]
PAIRS = [
  (
    p,
    Candidate(p.id, 0, p.reference, p.answer, True, "hand"),
    Candidate(p.id, 1 + i, p.reference[:-2] + wrong, None, False, "hand"),
  )
  for p in PROBLEMS
  for i, wrong in enumerate(("q;", "st7u;"))
]
ASKED = [(p, c, None) for p, *pair in PAIRS for c in pair]


@functools.cache
def _params(key):
  return jax.jit(gemma.init, static_argnums=0)(CONFIG, jax.random.key(key))


@functools.cache
def _mesh(num_devices=1):
  fsdp = 2 if num_devices > 1 else 1
  return sharding.make_mesh(data=-1, fsdp=fsdp, devices=jax.devices()[:num_devices])


def _examples(prompter=PROMPTER):
  return [verifiers.pair_example(prompter, *pair) for pair in PAIRS]


@functools.cache
def _rows(row_length=WIDTH):
  rows = packing.pack(_examples(), row_length)
  return verifiers.with_reference(rows, rows.max_targets, _params(REFERENCE), CONFIG, _mesh(), 2)


@jax.jit
def _forward(params, tokens):
  ones = jnp.ones_like(tokens)
  x, _ = gemma.forward(params, CONFIG, tokens, jnp.cumsum(ones, 1) - 1, ones)
  return gemma.unembed(params, CONFIG, x)


@functools.cache
def _log_probs(key, question, solution):
  """log p of every token of a solution with its end mark, from the logits of one sequence by itself."""
  prompt, target = PROMPTER.solve(question), [*CHAR.encode(solution), CHAR.eos_id]
  ids = [*prompt, *target]
  tokens = np.zeros((1, WIDTH), np.int32)
  tokens[0, : len(ids)] = ids
  z = np.asarray(_forward(_params(key), tokens), np.float64)[0, len(prompt) - 1 : len(ids) - 1]
  return z[np.arange(len(target)), target] - np.log(np.exp(z).sum(-1))


def _margin(key, pair):
  """log p(chosen) - log p(rejected)."""
  problem, chosen, rejected = pair
  return _log_probs(key, problem.question, chosen.text).sum() - _log_probs(key, problem.question, rejected.text).sum()


# --- what is trained


def test_a_pair_is_two_solutions_that_do_not_see_each_other():
  for (problem, chosen, rejected), e in zip(PAIRS, _examples(), strict=True):
    assert e.name == f"candidates 0 and {rejected.index} of {problem.id}"
    prompt = PROMPTER.solve(problem.question)
    for segment, c in ((1, chosen), (2, rejected)):
      here, target = e.segments == segment, [*CHAR.encode(c.text), CHAR.eos_id]
      assert e.tokens[here].tolist() == [*prompt, *target[:-1]]
      assert e.positions[here].tolist() == list(range(here.sum()))
      assert e.targets[here][len(prompt) - 1 :].tolist() == target
      assert e.weights[here].tolist() == [0] * (len(prompt) - 1) + [1] * len(target)
      assert set(e.kind[here & (e.weights > 0)].tolist()) == {KIND_VERIFY}


def test_a_pair_is_correct_first():
  problem, chosen, rejected = PAIRS[0]
  with pytest.raises(AssertionError):
    verifiers.pair_example(PROMPTER, problem, rejected, chosen)


def test_pairs_are_packed_whole_and_counted_in_each_row():
  rows = packing.pack(_examples(), WIDTH)
  assert rows.num_rows < len(PAIRS) and rows.num_examples == len(PAIRS)
  found = []
  for r in range(rows.num_rows):
    segments, texts = rows.data.segments[r], {}
    assert segments.max() % 2 == 0 and set(np.diff(segments[segments > 0]).tolist()) <= {0, 1}
    for s in range(1, segments.max() + 1):
      target = rows.data.targets[r][(segments == s) & (rows.data.weights[r] > 0)]
      texts[s] = CHAR.decode(target[:-1].tolist())
      assert target[-1] == CHAR.eos_id
    found += [(texts[s], texts[s + 1]) for s in range(1, segments.max(), 2)]
  assert sorted(found) == sorted((c.text, r.text) for _, c, r in PAIRS)


def test_gaps_leave_the_start_of_each_half_where_it_is():
  (mark,) = CHAR.encode(";")
  e, rng = _examples()[1], np.random.default_rng(0)
  starts = np.flatnonzero(np.diff(e.segments, prepend=0))
  wide = [packing.with_gaps(e, {mark: 9}, rng) for _ in range(9)]
  assert all(g.positions[starts].tolist() == [0, 0] for g in wide)
  assert any((g.positions[e.segments == 2] != e.positions[e.segments == 2]).any() for g in wide)


# --- the reference


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_reference_is_log_p_of_every_target(batch_size):
  rows = packing.pack(_examples(), WIDTH)
  assert rows.num_rows % 4, "the last batch is not full"
  got = verifiers.with_reference(rows, rows.max_targets, _params(REFERENCE), CONFIG, _mesh(), batch_size)
  assert isinstance(got.data, PairBatch) and got.data.reference.dtype == np.float32
  assert not got.data.reference[rows.data.weights == 0].any()
  for r in range(rows.num_rows):
    for s in range(1, rows.data.segments[r].max() + 1):
      here = rows.data.segments[r] == s
      targets = here & (rows.data.weights[r] > 0)
      text = CHAR.decode(rows.data.targets[r, targets][:-1].tolist())
      question = CHAR.decode(rows.data.tokens[r, here].tolist()).split("S")[1].split("=")[0]
      np.testing.assert_allclose(got.data.reference[r, targets], _log_probs(REFERENCE, question, text), rtol=1e-4)


def test_the_reference_goes_with_its_rows_and_leaves_the_name_of_the_data():
  rows = _rows()
  assert rows.digest == packing.pack(_examples(), WIDTH).digest
  got = rows.take(np.array([1, -1, 0]))
  np.testing.assert_array_equal(got.reference, rows.data.reference[[1, 0, 0]] * [[1], [0], [1]])
  assert isinstance(rows.take(rows.order(0, 0, 2)), PairBatch)


def test_rows_without_a_reference_have_no_loss():
  loss_fn = verifiers.make_loss(DPO, CONFIG, PROMPTER, 8, 0.0, BETA)
  with pytest.raises(AssertionError, match="without a reference"):
    loss_fn(_params(POLICY), packing.pack(_examples(), WIDTH).take(np.array([0])))


# --- the loss


def _loss(rows, params, beta=BETA, max_targets=None):
  loss_fn = verifiers.make_loss(DPO, CONFIG, PROMPTER, max_targets or rows.max_targets, 0.0, beta)
  loss, sums = jax.jit(loss_fn)(params, rows.take(np.arange(rows.num_rows)))
  assert float(sums["loss"][0]) == float(loss) and float(sums["loss"][1]) == 1
  return float(loss), {name: (float(total), float(count)) for name, (total, count) in sums.items()}


def test_loss_is_worked_out_by_hand():
  margin, reference = (np.array([_margin(key, pair) for pair in PAIRS]) for key in (POLICY, REFERENCE))
  gain = margin - reference
  want = np.log1p(np.exp(-BETA * gain))
  loss, sums = _loss(_rows(), _params(POLICY))
  np.testing.assert_allclose(loss, want.mean(), rtol=1e-4)
  np.testing.assert_allclose(sums["loss_verify"], (want.sum(), len(PAIRS)), rtol=1e-4)
  assert sums["accuracy"] == ((gain > 0).sum(), len(PAIRS))
  assert sums["accuracy_likelihood"] == ((margin > 0).sum(), len(PAIRS))
  ordered = (gain > 0).sum(), (margin > 0).sum()
  assert all(0 < number < len(PAIRS) for number in ordered) and ordered[0] != ordered[1], "not all, nor the same"


def test_loss_is_log_2_at_the_reference():
  for beta in (0.1, 5.0):
    assert _loss(_rows(), _params(REFERENCE), beta)[0] == pytest.approx(np.log(2), abs=1e-5)


def test_packing_and_spare_places_change_nothing():
  want, sums = _loss(_rows(), _params(POLICY))
  for other in (_loss(_rows(50), _params(POLICY)), _loss(_rows(), _params(POLICY), max_targets=WIDTH)):
    assert other[0] == pytest.approx(want, rel=1e-5)
    assert other[1]["loss_verify"] == pytest.approx(sums["loss_verify"], rel=1e-5)
  assert _rows(50).num_rows == len(PAIRS) > _rows().num_rows


def test_a_step_raises_the_chosen_and_lowers_the_rejected():
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 2, 2, 2, 3, 4, 0], [1, 2, 0, 0, 0, 0, 0, 0], [0] * 8], np.int32)
  zeros, weights = np.zeros_like(segments), (segments > 0).astype(np.float32)
  logp, reference = rng.normal(size=(2, 3, 8)).astype(np.float32)
  batch = PairBatch(zeros, zeros, weights, zeros, segments, zeros, reference)
  (loss, sums), got = jax.value_and_grad(losses.dpo, has_aux=True)(jnp.asarray(logp), batch, BETA)
  want, each = np.zeros_like(logp), []
  for r, chosen in ((0, 1), (0, 3), (1, 1)):
    up, down = segments[r] == chosen, segments[r] == chosen + 1
    gain = (logp - reference)[r] @ up - (logp - reference)[r] @ down
    each.append(np.log1p(np.exp(-BETA * gain)))
    want[r] -= (up * 1.0 - down) * BETA / (1 + np.exp(BETA * gain)) / 3
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert float(loss) == pytest.approx(np.mean(each)) and float(sums["loss_verify"][1]) == 3
  counts = {name: count for name, (_, count) in sums.items()}
  parts = [
    losses.dpo(logp[r : r + 1], jax.tree.map(lambda a, r=r: a[r : r + 1], batch), BETA, counts)[0] for r in range(3)
  ]
  assert float(sum(parts)) == pytest.approx(float(loss)) and min(parts[:2]) > 0


def test_no_pairs_are_no_loss():
  loss, sums = losses.dpo(jnp.zeros((2, 4)), PairBatch(*[np.zeros((2, 4), np.float32)] * 7), BETA)
  assert float(loss) == 0 and {float(sums[n][1]) for n in ("loss_verify", "accuracy", "accuracy_likelihood")} == {0}


@pytest.mark.parametrize(
  ("solve_weight", "beta", "message"),
  [
    (0.25, 0.1, r"dpo learns from pairs: solve_weight must be 0, not 0\.25"),
    (0.0, 0.0, r"dpo: beta must be more than 0, not 0\.0"),
    (0.0, float("nan"), "dpo: beta must be more than 0, not nan"),
  ],
)
def test_settings_that_dpo_cannot_have(solve_weight, beta, message):
  with pytest.raises(UserError, match=message):
    verifiers.make_loss(DPO, CONFIG, PROMPTER, 8, solve_weight, beta)


# --- training


@functools.cache
def _trained(num_devices=1, rank=0, num_steps=30):
  """Parameters after so many of 30 steps, the loss of each, and the means over all rows before and after."""
  mesh, rows = _mesh(num_devices), packing.pack(_examples(), 50)
  specs, params = gemma.param_specs(CONFIG), jax.tree.map(jnp.copy, _params(REFERENCE))
  if rank:
    adapters = lora.LoraConfig(rank, 16.0, ("q", "v", "attn_out"))
    specs |= lora.param_specs(CONFIG, adapters)
    params |= lora.init(CONFIG, adapters, jax.random.key(0))
  shardings = sharding.param_shardings(specs, mesh, CONFIG.rules)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, shardings)
    rows = verifiers.with_reference(rows, rows.max_targets, params, CONFIG, mesh, 8)
    loss_fn = verifiers.make_loss(DPO, CONFIG, PROMPTER, rows.max_targets, 0.0, BETA)
    eval_step = step.make_eval_step(loss_fn, mesh, shardings)
    optimizer = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-2, num_steps=30))
    trained, frozen = lora.split(params)
    state = step.init_state(trained, optimizer, frozen)
    train_step = step.make_train_step(loss_fn, optimizer, mesh, step.state_shardings(state, shardings, mesh))
    before = loop.evaluate(eval_step, params, rows, 8, mesh)
    steps = []
    for i in range(num_steps):
      state, sums = train_step(
        state, sharding.read_to_global(rows.take, rows.order(0, i, 8), sharding.batch_sharding(mesh))
      )
      steps.append(float(sums["loss"][0]))
    after = loop.evaluate(eval_step, state.all_params, rows, 8, mesh)
  return jax.device_get(state.all_params), steps, before, after


@pytest.mark.parametrize("rank", [0, 4], ids=["all parameters", "adapters"])
def test_training_lowers_the_loss(rank):
  _, _, before, after = _trained(rank=rank)
  assert before["loss_verify"] == pytest.approx(np.log(2), abs=1e-5)
  assert after["loss_verify"] < 0.3 * before["loss_verify"]
  assert after["accuracy"] == 1


def test_eight_devices_are_one():
  _, steps, *_ = _trained(8, num_steps=3)
  assert steps == pytest.approx(_trained()[1][:3], rel=1e-4) and steps[2] < 0.9 * steps[0]


# --- the gate


def _gate(rows, asked=ASKED):
  verifiers.check_verdict_tokens(DPO, PROMPTER, rows, asked)


def test_the_gate_opens_for_what_was_packed():
  rows = packing.pack(_examples(), WIDTH)
  assert rows.data.segments.max() > 2
  _gate(rows)


def test_the_gate_shows_both_sequences_where_the_prompt_differs():
  other = Prompter(CHAR, dataclasses.replace(PROMPTER.format, solve="S{question}=="))
  scored, trained = ([*p.solve(PROBLEMS[0].question), *p.solution("BbCd;")] for p in (PROMPTER, other))
  with pytest.raises(UserError, match="candidate 0 of p0: the solution is not scored where it was trained") as e:
    _gate(packing.pack(_examples(other), WIDTH))
  half = "chosen for its last 6 tokens"
  assert str(e.value).endswith(f"\n  scored:  {scored} -> {half}\n  trained: {trained} -> {half}")


def test_the_gate_shows_a_flipped_label_and_a_solution_without_its_end():
  flipped = [(p, dataclasses.replace(c, correct=not c.correct), r) for p, c, r in ASKED]
  with pytest.raises(UserError, match=r"(?s)scored: .* -> rejected for .*trained: .* -> chosen for "):
    _gate(packing.pack(_examples(), WIDTH), flipped)
  rows = packing.pack(_examples(), WIDTH)
  weights = rows.data.weights * (rows.data.targets != CHAR.eos_id)
  with pytest.raises(UserError, match="chosen for its last 5 tokens"):
    _gate(dataclasses.replace(rows, data=rows.data.replace(weights=weights)))


def test_the_gate_stays_shut_for_one_that_is_missing():
  with pytest.raises(UserError, match="candidate 2 of p2"):
    _gate(packing.pack(_examples()[:-1], WIDTH))


# --- scores


def _score(params, candidates, rows_per_batch=8):
  engine = Engine(params, CONFIG, _mesh(), CHAR.eos_id, rows_per_batch, max_tokens=WIDTH)
  return verifiers.score_candidates(
    DPO, engine, PROMPTER, PROBLEMS, candidates, step=40, seed=0, num_votes=3, settings=SampleConfig(8)
  )


def test_a_score_is_the_likelihood_of_the_solution_with_its_end():
  pool = [c for _, c, _ in ASKED]
  scores = _score(_params(POLICY), pool)
  assert [(s.problem_id, s.candidate_index, s.verifier) for s in scores] == [
    (c.problem_id, c.index, "dpo") for c in pool
  ]
  want = [np.exp(_log_probs(POLICY, p.question, c.text).sum()) for p, c, _ in ASKED]
  np.testing.assert_allclose([s.value for s in scores], want, rtol=1e-3)
  for s in scores:
    (vote,) = s.votes
    assert (vote.state, vote.p_yes, vote.p_no, vote.num_tokens, vote.text) == ("ok", s.value, None, 0, "")
  np.testing.assert_allclose([s.value for s in _score(_params(POLICY), pool[::-1], 2)][::-1], want, rtol=1e-3)


def test_what_was_trained_ranks_the_correct_solution_first():
  params, *_, after = _trained()
  value = {(s.problem_id, s.candidate_index): s.value for s in _score(params, [c for _, c, _ in ASKED])}
  right = [value[p.id, c.index] > value[p.id, r.index] for p, c, r in PAIRS]
  assert np.mean(right) == after["accuracy_likelihood"] == 1


def test_the_other_verifiers_do_not_take_pairs():
  with pytest.raises(AssertionError):
    verifiers.verify_example(DPO, PROMPTER, PROBLEMS[0], PAIRS[0][1])
  assert not GENRM.learns_pairs and isinstance(packing.pack(_examples(), WIDTH).data, TokenBatch)
