"""The engine against a plain forward pass and a naive decoding loop; what is computed and compiled only once."""

import dataclasses
import functools

import jax
import jaxprs
import numpy as np
import pytest
import tiny_model as tiny
from jaxprs import compilations
from refusals import refused

from genrm_jax.infer import engine as engines
from genrm_jax.infer import slots
from genrm_jax.infer.sampling import SampleConfig, restrict, sample_keys
from genrm_jax.model import gemma
from genrm_jax.runtime import sharding

TRACKED = (5, 11)
LENGTHS = (7, 40, 1, 32, 20)  # 40 is padded to 64, the others to 32
SHORT = (0, 2, 3, 4)
NEW = 12
END = 3
SAMPLED = SampleConfig(NEW, temperature=0.8, top_k=20, top_p=0.95)


def _keys(n, num_rollouts=4):
  return sample_keys(10, "vote", [f"p/{i}" for i in range(n)], num_rollouts)


@functools.cache
def _sampled():
  prompts, keys = tiny.prompts(LENGTHS), _keys(len(LENGTHS))
  return prompts, keys, tiny.engine(end_id=END).generate(prompts, keys, SAMPLED, TRACKED, "generate")


def _ids(rollouts):
  return [[r.ids for r in of_prompt] for of_prompt in rollouts]


@functools.partial(jax.jit, static_argnums=3)
def _next(z, key, t, settings):
  """Probabilities of the next token, and the uniform number that chooses it."""
  return jax.nn.softmax(restrict(z, settings)[0]), jax.random.uniform(jax.random.fold_in(key, t))


def _naive(prompt, key, settings, end_id):
  """The loop that reads the whole text again for each token."""
  ids = list(prompt)
  for t in range(settings.max_new_tokens):
    z = tiny.logits(ids)[-1:]
    if settings.temperature == 0:
      ids.append(int(z.argmax()))
    else:
      p, number = _next(z, key, t, settings)
      ids.append(int((np.cumsum(np.asarray(p, np.float64)) <= number).sum()))
    if ids[-1] == end_id:
      break
  return ids[len(prompt) :]


def _assert_same(got, want):
  assert _ids(got) == _ids(want)
  for some, others in zip(got, want, strict=True):
    for a, b in zip(some, others, strict=True):
      np.testing.assert_allclose(a.tracked_probs, b.tracked_probs, atol=1e-4)


def _assert_tracked(prompt, rollout):
  """The tracked probabilities are those of the full forward pass, at temperature 1."""
  want = tiny.softmax(tiny.logits([*prompt, *rollout.ids]))[len(prompt) - 1 : -1, TRACKED]
  np.testing.assert_allclose(rollout.tracked_probs, want, atol=2e-5)
  assert rollout.tracked_probs.dtype == np.float32


def test_decoding_matches_the_naive_loop_and_tracks_probabilities():
  prompts, settings = [p[:32] for p in tiny.prompts(LENGTHS)], SampleConfig(NEW, temperature=0)
  got = _ids(tiny.engine().generate(prompts, _keys(len(prompts), 1), settings, TRACKED, "greedy"))
  assert got == [[_naive(p, None, settings, -1)] for p in prompts]
  assert min(len(set(ids)) for (ids,) in got) >= 3
  prompts, keys, rollouts = _sampled()
  assert _ids(rollouts) == [[_naive(p, key, SAMPLED, END) for key in keys[i]] for i, p in enumerate(prompts)]
  for prompt, of_prompt in zip(prompts, rollouts, strict=True):
    for r in of_prompt:
      _assert_tracked(prompt, r)
  everything = [r for of_prompt in rollouts for r in of_prompt]
  lengths = {len(r.ids) for r in everything}
  assert len(lengths) > 3 and max(lengths) == NEW and len({tuple(r.ids) for r in everything}) > 15
  assert np.concatenate([r.tracked_probs for r in everything]).std(0).min() > 0.01


def test_a_rollout_depends_neither_on_its_batch_nor_on_the_number_of_rollouts():
  prompts, keys, want = _sampled()
  one, eight, many = (tiny.engine(end_id=END, rows_per_batch=rows) for rows in (1, 8, 32))
  for i in (0, 3):
    _assert_same(one.generate(prompts[i : i + 1], keys[i : i + 1], SAMPLED, TRACKED, "alone"), want[i : i + 1])
  _assert_same(many.generate(prompts[::-1], keys[::-1], SAMPLED, TRACKED, "reversed")[::-1], want)
  _assert_same(eight.generate(prompts[2::-2], keys[2::-2], SAMPLED, TRACKED, "two")[::-1], want[:3:2])
  picked = [[prompts[i] for i in SHORT], keys[np.array(SHORT), 2:0:-1]]
  _assert_same(eight.generate(*picked, SAMPLED, TRACKED, "two of four"), [want[i][2:0:-1] for i in SHORT])


def test_common_prefixes_are_computed_once(monkeypatch):
  settings = SampleConfig(NEW, temperature=0.1)
  prompts, keys = tiny.prompts(LENGTHS), _keys(len(LENGTHS), 12)
  inserted, resumed, free = [], [], np.ones(8, bool)

  def spy(name, observe):
    function = getattr(slots, name)
    monkeypatch.setattr(slots, name, lambda *args, **kwargs: observe(function(*args, **kwargs), args))

  def occupy(result, new, counts):
    assert new.any() and free[new].all(), "a slot in use is overwritten"
    counts.append(new.sum())
    free[new] = False
    return result

  def decode(result, args):
    free[:] = ~np.asarray(result[1].live)
    return result

  spy("insert", lambda result, args: occupy(result, np.asarray(args[2]) >= 0, inserted))
  spy("resume", lambda result, args: occupy(result, np.asarray(args[3]) >= 0, resumed))
  spy("decode", decode)
  rollouts = tiny.engine(end_id=END).generate(prompts, keys, settings, TRACKED, "generate")
  assert _ids(rollouts) == [[_naive(p, k, settings, END) for k in keys[i]] for i, p in enumerate(prompts)]
  for prompt, of_prompt in zip(prompts, rollouts, strict=True):
    for r in of_prompt:
      _assert_tracked(prompt, r)
  assert sum(inserted) == len(prompts), "each prompt is prefilled once"
  # At most one slot per further text; a text that differs in its last token only needs none.
  num_texts = sum(len({tuple(r.ids) for r in of_prompt}) for of_prompt in rollouts)
  assert 0 < sum(resumed) <= num_texts - len(prompts) < 50


def _steps_of_decode(monkeypatch):
  """A list that gets the most tokens that any slot samples in each call of `slots.decode`."""
  function, num_steps = slots.decode, []

  def decode(params, state, *args, **kwargs):
    before = np.asarray(state.sampled.length)
    state, sampled = function(params, state, *args, **kwargs)
    num_steps.append(int((np.asarray(sampled.length) - before).max()))
    return state, sampled

  monkeypatch.setattr(slots, "decode", decode)
  return num_steps


def test_diverged_rollouts_move_into_free_slots(monkeypatch):
  """A few prompts with many rollouts keep the whole batch busy."""
  prompts, keys = tiny.prompts((20, 20)), _keys(2, 32)
  num_steps = _steps_of_decode(monkeypatch)
  settings = SampleConfig(24, temperature=2.0)
  rollouts = tiny.engine(rows_per_batch=16).generate(prompts, keys, settings, TRACKED, "generate")
  ids = [tuple(r.ids) for of_prompt in rollouts for r in of_prompt]
  assert len(set(ids)) == 64 and {len(x) for x in ids} == {24}
  # 16 busy slots need 96 steps for all tokens.
  assert sum(num_steps) < 1.2 * 64 * 24 / 16


def test_prompts_enter_while_others_are_decoded(monkeypatch):
  prompts, keys, want = _sampled()
  function, live = slots.insert, []

  def insert(state, *args, **kwargs):
    live.append(int(state.sampled.live.sum()))
    return function(state, *args, **kwargs)

  monkeypatch.setattr(slots, "insert", insert)
  _assert_same(tiny.engine(end_id=END, rows_per_batch=2).generate(prompts, keys, SAMPLED, TRACKED, "generate"), want)
  assert len(live) == len(prompts) and sum(n > 0 for n in live) >= 3


def test_results_do_not_depend_on_the_mesh():
  prompts, keys, rollouts = _sampled()
  model = tiny.config()
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.param_shardings(gemma.param_specs(model), mesh, model.rules)
  engine = dataclasses.replace(tiny.engine(end_id=END), mesh=mesh, params=jax.device_put(tiny.params(), shardings))
  # Three prompts on four shards leave one row empty; twelve rollouts share eight slots.
  texts, index = [prompts[i] for i in SHORT[:3]], list(SHORT[:3])
  with compilations() as counts:
    _assert_same(engine.generate(texts, keys[np.array(index)], SAMPLED, TRACKED, "mesh"), [rollouts[i] for i in index])
  assert (counts["insert"], counts["decode"]) == (1, 1), "the state keeps its layout"


def test_only_the_given_logits_are_computed():
  model, vocab = tiny.config(500), 500
  args = tiny.params(vocab), np.ones((2, 32), np.int32), np.full(2, 9, np.int32)

  def products_over_the_vocabulary(function):
    traced = jax.make_jaxpr(functools.partial(function, config=model, token_ids=TRACKED))(*args)
    return [p for p in jaxprs.products(traced.jaxpr) if vocab in p.outvars[0].aval.shape]

  assert products_over_the_vocabulary(engines.next_token_probs)
  assert not products_over_the_vocabulary(engines.next_token_logits)


@pytest.mark.parametrize(("rows_per_batch", "order"), [(4, range(7)), (3, [6, 0, 5, 1]), (1, [1, 2])])
def test_log_likelihood_sums_over_the_continuation(rows_per_batch, order):
  lengths = ((33, 5), (5, 70), (64, 1), (1, 32), (32, 33), (20, 12), (40, 64))
  texts = [(ids[:n], ids[n:]) for ids, (n, _) in zip(tiny.prompts([n + m for n, m in lengths]), lengths, strict=True)]
  prompts, continuations = zip(*(texts[i] for i in order), strict=True)
  got = tiny.engine(rows_per_batch=rows_per_batch).log_likelihood(prompts, continuations, "score")
  want = []
  for prompt, continuation in zip(prompts, continuations, strict=True):
    p = tiny.softmax(tiny.logits([*prompt, *continuation]))[len(prompt) - 1 : -1]
    want.append(np.log(p[range(len(continuation)), continuation]).sum())
  assert got.dtype == np.float64 and len(set(np.rint(want).tolist())) == len(want) and max(want) < -0.1
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_buckets_are_geometric():
  widths = [32, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1504]
  for max_tokens, want in ((33, widths[:2]), (160, widths[:5]), (1024, [*widths[:4], *widths[5:11]])):
    assert engines.buckets(max_tokens) == want
    for n in range(1, max_tokens + 1):
      assert engines.bucket(n, max_tokens) == min(width for width in want if width >= n)
  assert engines.buckets(1500) == [*widths[:4], *widths[5:]]


def test_many_lengths_share_few_compilations():
  """Prompts of 60 lengths, all prefixes of one text, against one forward pass over it without padding."""
  lengths = [3, 5, 31, 32, 33, 63, 64, *range(70, 176, 2)]
  (text,) = tiny.prompts([lengths[-1]])
  z = tiny.logits(text)
  p, at = tiny.softmax(z), np.array(lengths) - 1
  prompts, engine = [text[:n] for n in lengths], tiny.engine(rows_per_batch=4, max_tokens=200)
  with compilations() as counts:
    probs = engine.next_token_probs(prompts, TRACKED, "probs")
    logits = engine.next_token_logits(prompts, TRACKED, "logits")
    logp = engine.log_likelihood([x[: len(x) // 3] for x in prompts], [x[len(x) // 3 :] for x in prompts], "score")
    rollouts = engine.generate(prompts, _keys(60, 1), SampleConfig(1, temperature=0), TRACKED, "generate")
  np.testing.assert_allclose(probs, p[at][:, TRACKED], atol=1e-5)
  np.testing.assert_allclose(logits, z[at][:, TRACKED], atol=1e-4)
  sums = np.concatenate([[0, 0], np.cumsum(np.log(p[np.arange(len(text) - 1), text[1:]]))])  # of the tokens before
  np.testing.assert_allclose(logp, [sums[n] - sums[n // 3] for n in lengths], rtol=1e-5, atol=1e-4)
  assert [r.ids for (r,) in rollouts] == z[at].argmax(1)[:, None].tolist()
  for name in ("next_token_probs", "next_token_logits", "log_probs_from", "prefill", "insert"):
    assert 0 < counts[name] <= len(engines.buckets(200)), name
  assert (counts["init"], counts["decode"]) == (1, 1)


def test_prompts_that_do_not_fit_are_named_and_none_is_no_error():
  engine = tiny.engine(end_id=END, rows_per_batch=4, max_tokens=32)
  fits, too_long = tiny.prompts((32 - NEW, 32 - NEW + 1))
  given = SAMPLED, TRACKED, "generate"
  refused(
    (r"prompt 1 has 21 tokens and 12 new .* leaves 20", engine.generate, [fits, too_long], _keys(2), *given),
    ("prompt 0 has 33 tokens", engine.next_token_probs, [[1] * 33], TRACKED, "probs"),
    (r"prompt 1 has 30 tokens and 3 new .* leaves 29", engine.log_likelihood, [[1] * 30] * 2, [[2] * 2, [2] * 3], "ll"),
    ("prompt 1 is empty", engine.next_token_logits, [[1], []], TRACKED, "logits"),
  )
  assert len(engine.generate([fits], _keys(1), *given)[0]) == 4
  assert engine.next_token_probs([[1] * 32], TRACKED, "probs").shape == (1, 2)
  assert engine.generate([], _keys(0), *given) == [] and engine.log_likelihood([], [], "ll").shape == (0,)
  assert engine.next_token_probs([], TRACKED, "probs").shape == (0, 2)


def test_prompts_may_join_a_session_at_any_time(monkeypatch):
  prompts, keys, want = _sampled()
  engine, raw_keys = tiny.engine(end_id=END), np.asarray(jax.random.key_data(keys))
  num_steps = _steps_of_decode(monkeypatch)
  with jax.set_mesh(engine.mesh):
    session = engine.session(SAMPLED, TRACKED, 6, 64, jax.random.key_impl(keys))  # room for more rollouts than come
    assert session.advance(3) == [] and not session.is_busy
    got, arrivals = {}, [1, 0, 4, 2, 3]
    while arrivals or session.is_busy:
      if arrivals:
        i = arrivals.pop()
        session.add(i, prompts[i], raw_keys[i] if i else raw_keys[i][:2])
      got |= dict(session.advance(max_steps=3))
  _assert_same([got[i] for i in range(5)], [want[0][:2], *want[1:]])
  num_steps.clear()
  engine = tiny.engine()
  with jax.set_mesh(engine.mesh):
    session = engine.session(SAMPLED, TRACKED, 4, 64, jax.random.key_impl(keys))
    session.add("alone", prompts[0], raw_keys[0][:1])
    (alone,) = [done for _ in range(4) for done in session.advance(max_steps=3)]
  assert num_steps == [3] * 4 and alone[0] == "alone", "it looks for new prompts after three tokens"
