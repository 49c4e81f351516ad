"""The engine against a plain forward pass and a naive decoding loop; what is computed and compiled only once."""

import collections
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tiny_model as tiny

from genrm_jax.infer import engine as engines
from genrm_jax.infer import slots
from genrm_jax.infer.sampling import SampleConfig, restrict, sample_keys
from genrm_jax.model import gemma
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

TRACKED = (5, 11)
LENGTHS = (7, 40, 1, 32, 20)  # 40 is padded to 64, the others to 32
SHORT = (0, 2, 3, 4)
NEW = 12
END = 3
NEVER = np.int32(2**31 - 1)
SAMPLED = SampleConfig(NEW, temperature=0.8, top_k=20, top_p=0.95)


def _keys(n, num_rollouts=4):
  return sample_keys(10, "vote", [f"p/{i}" for i in range(n)], num_rollouts)


@functools.cache
def _sampled():
  """Prompts, the keys of four rollouts of each, and these rollouts."""
  prompts, keys = tiny.prompts(LENGTHS), _keys(len(LENGTHS))
  return prompts, keys, tiny.engine(end_id=END).generate(prompts, keys, SAMPLED, TRACKED, "generate")


def _ids(rollouts):
  return [[r.ids for r in of_prompt] for of_prompt in rollouts]


def _naive(prompt, key, settings, end_id):
  """The loop that reads the whole text again for each token."""
  ids = list(prompt)
  for t in range(settings.max_new_tokens):
    z = jnp.asarray(tiny.logits(ids)[-1:])
    if settings.temperature == 0:
      ids.append(int(jnp.argmax(z)))
    else:
      cdf = np.cumsum(np.asarray(jax.nn.softmax(restrict(z, settings)[0]), np.float64))
      ids.append(int((cdf <= jax.random.uniform(jax.random.fold_in(key, t))).sum()))
    if ids[-1] == end_id:
      break
  return ids[len(prompt) :]


def _assert_same(got, want):
  """Equal ids, and nearly equal probabilities."""
  assert _ids(got) == _ids(want)
  for some, others in zip(got, want, strict=True):
    for a, b in zip(some, others, strict=True):
      np.testing.assert_allclose(a.tracked_probs, b.tracked_probs, atol=1e-4)


def _assert_tracked(prompt, rollout):
  """The tracked probabilities are those of the full forward pass, at temperature 1."""
  want = tiny.softmax(tiny.logits([*prompt, *rollout.ids]))[len(prompt) - 1 : -1, TRACKED]
  np.testing.assert_allclose(rollout.tracked_probs, want, atol=2e-5)
  assert rollout.tracked_probs.dtype == np.float32


@contextlib.contextmanager
def _compilations():
  """Yields how often each function has been lowered since."""
  counts = collections.Counter()

  def listen(event, seconds, **kwargs):
    if event.endswith("/jaxpr_to_mlir_module_duration"):
      counts[kwargs["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_greedy_decoding_matches_the_naive_loop():
  prompts, settings = [p[:32] for p in tiny.prompts(LENGTHS)], SampleConfig(NEW, temperature=0)
  rollouts = tiny.engine().generate(prompts, _keys(len(prompts), 1), settings, TRACKED, "generate")
  got = [r.ids for (r,) in rollouts]
  assert got == [_naive(p, None, settings, -1) for p in prompts]
  assert min(len(set(ids)) for ids in got) >= 3


def test_sampling_matches_the_naive_loop_with_the_same_keys():
  prompts, keys, rollouts = _sampled()
  assert _ids(rollouts) == [[_naive(p, key, SAMPLED, END) for key in keys[i]] for i, p in enumerate(prompts)]


def test_rollouts_end_with_the_end_token_or_at_the_limit():
  prompts, _, rollouts = _sampled()
  for prompt, of_prompt in zip(prompts, rollouts, strict=True):
    for r in of_prompt:
      assert END not in r.ids[:-1] and (r.ids[-1] == END or len(r.ids) == NEW)
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


def _slots(engine, num_slots, num_rollouts, prompts):
  """Free slots, the prefilled prompts, `decode` and what puts arrays on the mesh."""
  put = functools.partial(sharding.host_to_global, sharding=sharding.batch_sharding(engine.mesh))

  def decode(state, keys, *limits):
    how = {"key_impl": jax.random.key_impl(keys), "settings": SAMPLED, "end_id": END, "tracked": TRACKED}
    return slots.decode(engine.params, state, jax.random.key_data(keys), *limits, config=engine.config, **how)

  state = slots.init(
    num_slots=num_slots, num_rollouts=num_rollouts, max_len=76, max_new_tokens=NEW, num_tracked=2, config=engine.config
  )
  tokens, length = np.zeros((len(prompts), 64), np.int32), np.array([len(p) for p in prompts], np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return state, slots.prefill(engine.params, *put((tokens, length)), config=engine.config), decode, put


def test_decoding_stops_when_enough_slots_are_free():
  prompts, keys, rollouts = _sampled()
  # The prompt and the only rollout of each slot. Slot 1 is never used.
  source, vote = np.array([0, -1, 0, 1, -1, 1, 0, 1], np.int32), np.array([0, 0, 2, 3, 0, 0, 1, 1])
  want = [rollouts[p][r].ids if p >= 0 else [] for p, r in zip(source, vote, strict=True)]
  engine = tiny.engine()
  with jax.set_mesh(engine.mesh):
    state, prefilled, decode, put = _slots(engine, 8, 1, prompts[:2])
    state = slots.insert(state, prefilled, *put((source,)), config=engine.config)
    for min_free in (4, 8):
      state, sampled = decode(state, keys[source, vote][:, None], np.int32(min_free), NEVER)
      done = sorted(map(len, want))[min_free - 1]
      assert done < NEW if min_free == 4 else done == NEW
      np.testing.assert_array_equal(sampled.length, [min(len(ids), done) for ids in want])
      np.testing.assert_array_equal(sampled.live, [len(ids) > done for ids in want])
      for slot, ids in enumerate(want):
        assert np.asarray(sampled.ids)[slot, : sampled.length[slot]].tolist() == ids[:done]
    assert not np.asarray(sampled.ids)[[1, 4]].any(), "a free slot samples nothing"
    # The next rollout of a slot does not see the one before.
    source, vote = np.array([-1, -1, 1, 0, 0, -1, -1, -1], np.int32), np.array([0, 0, 2, 3, 1, 0, 0, 0])
    state = slots.insert(state, prefilled, *put((source,)), config=engine.config)
    _, sampled = decode(state, keys[source, vote][:, None], np.int32(8), NEVER)
  for slot in (2, 3, 4):
    ids = np.asarray(sampled.ids)[slot, : sampled.length[slot]].tolist()
    assert ids == rollouts[source[slot]][vote[slot]].ids


def test_diverged_rollouts_are_resumed_where_they_diverged():
  prompts, keys, rollouts = _sampled()
  i, engine, order = 4, tiny.engine(end_id=END), np.array([2, 0, 3, 2, 1, 2])
  texts = [rollouts[i][r].ids for r in order]
  places = [next((t for t, (a, b) in enumerate(zip(ids, texts[0], strict=False)) if a != b), -1) for ids in texts]
  with jax.set_mesh(engine.mesh):
    state, prefilled, decode, put = _slots(engine, 3, 6, prompts[i : i + 1])
    state = slots.insert(state, prefilled, *put((np.array([0, -1, -1], np.int32),)), config=engine.config)
    # Decoding stops after the first divergence, and continues from there as if it had not stopped.
    slot_keys = jnp.broadcast_to(keys[i][order], (3, 6))
    state, sampled = decode(state, slot_keys, np.int32(3), np.int32(1))
    first = min(place for place in places if place >= 0)
    assert sampled.live[0] and sampled.length[0] == first + 1 < len(texts[0])
    state, sampled = decode(state, slot_keys, np.int32(3), NEVER)
    sampled = jax.device_get(sampled)
    assert sampled.ids[0, : sampled.length[0]].tolist() == texts[0]
    assert sampled.diverged_at[0].tolist() == places and max(places) > first
    for r, place in enumerate(places):
      assert place < 0 or sampled.diverged_token[0, r] == texts[r][place]
    # Two of them continue in slots of their own.
    gone = [r for r in range(6) if places[r] >= 0 and len(texts[r]) > places[r] + 1][:2]
    place = np.array([places[gone[0]], 0, places[gone[1]]], np.int32)
    token = np.array([texts[gone[0]][place[0]], -1, texts[gone[1]][place[2]]], np.int32)
    state = slots.fork(state, *put((np.array([0, 1, 0], np.int32),)), num_shards=1, config=engine.config)
    state = slots.resume(state, *put((place + len(prompts[i]), place, token)), config=engine.config)
    alone = order[np.array([gone[0], 0, gone[1]])]
    _, sampled = decode(state, jnp.broadcast_to(keys[i][alone][:, None], (3, 6)), np.int32(3), NEVER)
    sampled = jax.device_get(sampled)
  for slot, r in zip((0, 2), gone, strict=True):
    assert sampled.ids[slot, places[r] : sampled.length[slot]].tolist() == texts[r][places[r] :]


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


def test_diverged_rollouts_move_into_free_slots(monkeypatch):
  """A few prompts with many rollouts keep the whole batch busy."""
  prompts, keys = tiny.prompts((20, 20)), _keys(2, 32)
  function, num_steps = slots.decode, []

  def decode(params, state, *args, **kwargs):
    before = np.asarray(state.sampled.length)
    state, sampled = function(params, state, *args, **kwargs)
    num_steps.append(int((np.asarray(sampled.length) - before).max()))
    return state, sampled

  monkeypatch.setattr(slots, "decode", decode)
  settings = SampleConfig(24, temperature=2.0)
  rollouts = tiny.engine(rows_per_batch=16).generate(prompts, keys, settings, TRACKED, "generate")
  ids = [tuple(r.ids) for of_prompt in rollouts for r in of_prompt]
  assert len(set(ids)) == 64 and {len(x) for x in ids} == {24}
  # 16 busy slots need 96 steps for all tokens.
  assert sum(num_steps) < 1.5 * 64 * 24 / 16


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
  with _compilations() as counts:
    _assert_same(engine.generate(texts, keys[np.array(index)], SAMPLED, TRACKED, "mesh"), [rollouts[i] for i in index])
  assert (counts["insert"], counts["decode"]) == (1, 1), "the state keeps its layout"
  want = np.stack([tiny.logits(p)[-1] for p in texts])
  np.testing.assert_allclose(engine.next_token_logits(texts, TRACKED, "logits"), want[:, TRACKED], atol=1e-4)
  np.testing.assert_allclose(engine.next_token_probs(texts, TRACKED, "p"), tiny.softmax(want)[:, TRACKED], atol=1e-5)
  halves = [t[:1] for t in texts], [t[1:] for t in texts]
  alone = tiny.engine().log_likelihood(*halves, "alone")
  np.testing.assert_allclose(engine.log_likelihood(*halves, "mesh"), alone, rtol=1e-5, atol=1e-4)


def test_next_token_values_match_the_full_forward_pass():
  prompts, engine = tiny.prompts((33, 5, 64, 1, 32, 63, 31, 2, 40)), tiny.engine(rows_per_batch=4)
  want = np.stack([tiny.logits(p)[-1] for p in prompts])
  logits = engine.next_token_logits(prompts, TRACKED, "logits")
  probs = engine.next_token_probs(prompts, TRACKED, "probs")
  np.testing.assert_allclose(logits, want[:, TRACKED], atol=1e-4)
  np.testing.assert_allclose(probs, tiny.softmax(want)[:, TRACKED], atol=1e-5)
  assert want[:, TRACKED].std(0).min() > 0.1 and logits.dtype == probs.dtype == np.float32


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


@pytest.mark.parametrize(
  ("max_tokens", "want"),
  [
    (33, [32, 64]),
    (160, [32, 64, 96, 128, 160]),
    (1024, [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]),
    (1500, [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1504]),
  ],
)
def test_buckets_are_geometric(max_tokens, want):
  assert engines.buckets(max_tokens) == want
  for n in range(1, max_tokens + 1):
    assert engines.bucket(n, max_tokens) == min(width for width in want if width >= n)


def test_many_lengths_share_few_compilations():
  """Prompts of 60 lengths, all prefixes of one text, against one forward pass over it without padding."""
  lengths = list(range(100, 400, 5))
  (text,) = tiny.prompts([lengths[-1]])
  z = tiny.logits(text)
  p, at = tiny.softmax(z), np.array(lengths) - 1
  prompts, engine = [text[:n] for n in lengths], tiny.engine(rows_per_batch=4, max_tokens=400)
  with _compilations() as counts:
    probs = engine.next_token_probs(prompts, TRACKED, "probs")
    logits = engine.next_token_logits(prompts, TRACKED, "logits")
    logp = engine.log_likelihood([x[: len(x) // 3] for x in prompts], [x[len(x) // 3 :] for x in prompts], "score")
    rollouts = engine.generate(prompts, _keys(60, 1), SampleConfig(1, temperature=0), TRACKED, "generate")
  np.testing.assert_allclose(probs, p[at][:, TRACKED], atol=1e-5)
  np.testing.assert_allclose(logits, z[at][:, TRACKED], atol=1e-4)
  sums = np.concatenate([[0, 0], np.cumsum(np.log(p[np.arange(len(text) - 1), text[1:]]))])  # of the tokens before
  np.testing.assert_allclose(logp, [sums[n] - sums[n // 3] for n in lengths], rtol=1e-5)
  assert [r.ids for (r,) in rollouts] == z[at].argmax(1)[:, None].tolist()
  for name in ("next_token_probs", "next_token_logits", "log_probs_from", "prefill", "insert"):
    assert 0 < counts[name] <= 5, name
  assert (counts["init"], counts["decode"]) == (1, 1)


def test_a_prompt_that_does_not_fit_is_named():
  engine = tiny.engine(end_id=END, rows_per_batch=4, max_tokens=32)
  fits, too_long = tiny.prompts((32 - NEW, 32 - NEW + 1))
  with pytest.raises(UserError, match=r"prompt 1 has 21 tokens and 12 new .* leaves 20"):
    engine.generate([fits, too_long], _keys(2), SAMPLED, TRACKED, "generate")
  assert len(engine.generate([fits], _keys(1), SAMPLED, TRACKED, "generate")[0]) == 4
  with pytest.raises(UserError, match="prompt 0 has 33 tokens"):
    engine.next_token_probs([[1] * 33], TRACKED, "probs")
  assert engine.next_token_probs([[1] * 32], TRACKED, "probs").shape == (1, 2)
  with pytest.raises(UserError, match=r"prompt 1 has 30 tokens and 3 new .* leaves 29"):
    engine.log_likelihood([[1] * 30] * 2, [[2] * 2, [2] * 3], "score")
  with pytest.raises(UserError, match="prompt 1 is empty"):
    engine.next_token_logits([[1], []], TRACKED, "logits")


def test_no_prompts():
  engine = tiny.engine()
  assert engine.generate([], _keys(0), SAMPLED, TRACKED, "generate") == []
  assert engine.next_token_probs([], TRACKED, "probs").shape == (0, 2)
  assert engine.log_likelihood([], [], "score").shape == (0,)
