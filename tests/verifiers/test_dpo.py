"""The DPO verifier: its pairs, its loss against one worked out by hand, its gate, and its scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_steps
from char_model import CANDIDATES, CHAR, CONFIG, DATA, PROBLEMS, PROMPTER, WIDTH, engine, log_probs, verifier
from char_model import mesh as mesh_of
from char_model import params as params_of

from genrm_jax.data import packing, row_file
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import lora
from genrm_jax.pytrees import PairBatch
from genrm_jax.records import Score, Vote
from genrm_jax.runtime import sharding
from genrm_jax.training import loop, losses, optim, step
from genrm_jax.verifiers import scoring
from genrm_jax.verifiers.base import TargetCounts, VoteConfig

DPO, BETA = verifier("dpo"), 0.3
REFERENCE, POLICY = 4, 2  # keys of parameters
PAIRS = DPO.select(DATA)
QUESTION = {p.id: p.question for p in PROBLEMS}


def _rows(row_length=WIDTH):
  return packing.pack([DPO.example(pair) for pair in PAIRS], row_length)


def _counts(rows):
  return TargetCounts(rows.max_targets, rows.max_pairs)


def _with_reference(rows, key=REFERENCE, batch_size=2):
  return DPO.with_reference(rows, _counts(rows), params_of(key), CONFIG, mesh_of(), batch_size)


def _solution(key, candidate):
  return log_probs(PROMPTER.solve(QUESTION[candidate.problem_id]), PROMPTER.solution(candidate.text), key)


def _margin(key, pair):
  return _solution(key, pair.chosen).sum() - _solution(key, pair.rejected).sum()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("in_file", [False, True])
def test_the_reference_is_log_p_of_every_target(batch_size, in_file, tmp_path):
  rows = _rows()
  assert len(PAIRS) == 6 and all(p.chosen.correct and not p.rejected.correct for p in PAIRS)
  assert rows.num_rows % 4, "the last batch is not full"
  source = rows
  if in_file:
    row_file.write(tmp_path / "rows.npy", rows.num_rows, rows.take)
    source = row_file.RowFile(tmp_path / "rows.npy")
  added = DPO.with_reference(source, _counts(rows), params_of(REFERENCE), CONFIG, mesh_of(), batch_size)
  got = added.take(np.arange(rows.num_rows))
  assert isinstance(got, PairBatch) and not got.reference[rows.data.weights == 0].any()
  want = {c.text: _solution(REFERENCE, c) for c in CANDIDATES}
  for r in range(rows.num_rows):
    for s in range(1, rows.data.segments[r].max() + 1):
      at = (rows.data.segments[r] == s) & (rows.data.weights[r] > 0)
      text = CHAR.decode(rows.data.targets[r, at][:-1].tolist())
      np.testing.assert_allclose(got.reference[r, at], want[text], rtol=1e-4)
  if not in_file:
    assert added.digest == rows.digest, "the reference is no part of the data's identity"


def test_a_score_is_the_likelihood_of_a_solution_with_its_end():
  scores = scoring.score_candidates(DPO, engine(), PROBLEMS, CANDIDATES, VoteConfig(1, 0, SampleConfig(8)), step=0)
  want = [np.exp(_solution(1, candidate).sum()) for candidate in CANDIDATES]
  np.testing.assert_allclose([score.value for score in scores], want, rtol=1e-3)


def test_the_score_with_the_reference_is_the_implicit_reward():
  """Of recorded likelihoods, in any order; exact where the two are far apart, and bounded where they underflow."""
  likelihoods = [(0.2, 0.1), (1e-40, 1e-30), (1e-300, 1e-3), (0.0, 1e-3), (0.0, 0.0), (None, 0.5), (0.5, None)]

  def scores(step, name, column):
    values = [pair[column] for pair in likelihoods]
    return [Score("p0", i, name, step, p, (Vote("ok", p, None, 0),)) for i, p in enumerate(values)]

  policy, reference = scores(40, "dpo", 0), scores(0, "dpo_reference", 1)
  relative = verifier("dpo_reference", of="dpo", beta=BETA)
  assert relative.scores_needed(relative.settings) == ("dpo",)
  got = relative.combine(reference, {"dpo": policy[::-1]})
  logs = [[-744.44007 if p == 0 else np.log(p) for p in pair] for pair in likelihoods[:5]]
  want = [1 / (1 + np.exp(-BETA * (ours - theirs))) for ours, theirs in logs]
  np.testing.assert_allclose([s.value for s in got[:5]], want, rtol=1e-6)
  assert got[0].value == pytest.approx(2**BETA / (1 + 2**BETA)) and got[3].value > 0
  assert [(s.value, s.votes[0].state) for s in got[5:]] == [(None, "truncated")] * 2
  assert {(s.verifier, s.step, s.votes[0].p_yes == s.value) for s in got} == {("dpo_reference", 40, True)}


def _loss(rows, params, beta=BETA, counts=None):
  loss_fn = verifier("dpo", beta=beta).loss(CONFIG, counts or _counts(rows), "none")
  loss, sums = jax.jit(loss_fn)(params, rows.take(np.arange(rows.num_rows)))
  return float(loss), {name: (float(total), float(count)) for name, (total, count) in sums.items()}


def test_loss_is_that_worked_out_by_hand():
  margin, reference = (np.array([_margin(key, pair) for pair in PAIRS]) for key in (POLICY, REFERENCE))
  gain = margin - reference
  want = np.log1p(np.exp(-BETA * gain))
  rows = _with_reference(_rows())
  loss, sums = _loss(rows, params_of(POLICY))
  np.testing.assert_allclose(loss, want.mean(), rtol=1e-4)
  np.testing.assert_allclose(sums["loss_verify"], (want.sum(), len(PAIRS)), rtol=1e-4)
  assert sums["accuracy"] == ((gain > 0).sum(), len(PAIRS))
  assert sums["accuracy_likelihood"] == ((margin > 0).sum(), len(PAIRS))
  for beta in (0.1, 5.0):
    assert _loss(rows, params_of(REFERENCE), beta)[0] == pytest.approx(np.log(2), abs=1e-5), "at the reference"
  one_per_row = _with_reference(_rows(50))
  spare = TargetCounts(WIDTH, rows.max_pairs + 2)
  for other in (_loss(one_per_row, params_of(POLICY)), _loss(rows, params_of(POLICY), counts=spare)):
    assert other[0] == pytest.approx(loss, rel=1e-5), "packing and spare places change nothing"
  with pytest.raises(TypeError, match="log p under the reference"):
    _loss(_rows(), params_of(POLICY))


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected():
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 2, 2, 2, 3, 4, 0], [1, 2, 0, 0, 0, 0, 0, 0], [0] * 8], np.int32)
  zeros, weights = np.zeros_like(segments), (segments > 0).astype(np.float32)
  logp, reference = rng.normal(size=(2, 3, 8)).astype(np.float32)
  batch = PairBatch(zeros, zeros, weights, zeros, segments, zeros, reference)
  (loss, sums), got = jax.value_and_grad(losses.dpo, has_aux=True)(jnp.asarray(logp), batch, BETA, 2)
  want, each = np.zeros_like(logp), []
  for r, chosen in ((0, 1), (0, 3), (1, 1)):
    up, down = segments[r] == chosen, segments[r] == chosen + 1
    gain = (logp - reference)[r] @ up - (logp - reference)[r] @ down
    each.append(np.log1p(np.exp(-BETA * gain)))
    want[r] -= (up * 1.0 - down) * BETA / (1 + np.exp(BETA * gain)) / 3
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert float(loss) == pytest.approx(np.mean(each)) and float(sums["loss_verify"][1]) == 3
  counts = {name: count for name, (_, count) in sums.items()}
  rows = [jax.tree.map(lambda a, r=r: a[r : r + 1], batch) for r in range(3)]
  parts = [losses.dpo(logp[r : r + 1], rows[r], BETA, 2, counts)[0] for r in range(3)]
  assert float(sum(parts)) == pytest.approx(float(loss)) and min(parts[:2]) > 0 == parts[2]
  long = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, 4096), a.dtype), batch)
  jaxpr = jax.make_jaxpr(lambda logp, batch: losses.margins(logp, batch, 2))(long.weights, long)
  assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) <= 2 * 4096, "memory grows with the pairs"


@functools.cache
def _trained(rank):
  """Parameters after 30 steps, and the means over all rows before and after."""
  mesh, params = mesh_of(), jax.tree.map(jnp.copy, params_of(REFERENCE))
  adapters = lora.LoraConfig(rank, 16.0, ("q", "v", "attn_out")) if rank else None
  params |= lora.init(CONFIG, adapters, jax.random.key(0)) if rank else {}
  rows = _rows(50)
  loss_fn, optimizer = DPO.loss(CONFIG, _counts(rows), "none"), optim.OptimConfig(learning_rate=1e-2, num_steps=30)
  train_step, state, shardings, on = train_steps.prepare(CONFIG, params, loss_fn, mesh, optimizer, adapters)
  with jax.set_mesh(mesh):
    rows = DPO.with_reference(rows, _counts(rows), state.all_params, CONFIG, mesh, 8)
    eval_step = step.make_eval_step(loss_fn, on, shardings.all_params)
    before = loop.evaluate(eval_step, state.all_params, rows, 8, on)
    for i in range(30):
      state, _ = train_step(state, sharding.read_to_global(rows.take, rows.order(0, i, 8), on))
    after = loop.evaluate(eval_step, state.all_params, rows, 8, on)
  return jax.device_get(state.all_params), before, after


@pytest.mark.parametrize("rank", [0, 4], ids=["all parameters", "adapters"])
def test_training_lowers_the_loss(rank):
  params, before, after = _trained(rank)
  assert before["loss_verify"] == pytest.approx(np.log(2), abs=1e-5)
  assert after["loss_verify"] < 0.3 * before["loss_verify"] and after["accuracy"] == 1
  if not rank:
    scored = engine(jax.tree.map(jnp.asarray, params)), PROBLEMS, CANDIDATES, VoteConfig(1, 0, SampleConfig(8))
    scores = {(s.problem_id, s.candidate_index): s.value for s in scoring.score_candidates(DPO, *scored, step=40)}
    assert all(scores[p.problem.id, 0] > scores[p.problem.id, p.rejected.index] for p in PAIRS)
