"""Decoding with a cache is the naive loop without one; a rollout is its own and ends where it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from genrm_jax.infer import slots
from genrm_jax.infer.engine import read_next, read_places
from genrm_jax.infer.sampling import SampleConfig, restrict, rollout_keys
from genrm_jax.model import gemma
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

WATCH = (5, 11)
LENGTHS = (7, 40, 1, 32, 20)  # 40 is padded to 64, the others to 32
SHORT = (0, 2, 3, 4)
NEW = 12
END = 3
NEVER = np.int32(2**31 - 1)
SAMPLED = SampleConfig(NEW, temperature=0.8, top_k=20, top_p=0.95)


def _keys(n, num_rollouts=4):
  """key[n, R] of candidates 0 .. n - 1."""
  candidates, votes = np.repeat(np.arange(n), num_rollouts), np.tile(np.arange(num_rollouts), n)
  return rollout_keys(3, ["p"] * n * num_rollouts, candidates, votes).reshape(n, num_rollouts)


@functools.cache
def _rolled():
  """Four rollouts of each prompt, two prompts at a time, with what they are made of."""
  prompts, keys = tiny.prompts(LENGTHS), _keys(len(LENGTHS))
  return prompts, keys, tiny.engine(eos_id=END).write(prompts, keys, SAMPLED, WATCH, "write")


def _naive(prompt, key, settings, eos_id):
  """The loop that reads everything anew for each token."""
  ids = list(prompt)
  for t in range(settings.max_new_tokens):
    z = jnp.asarray(tiny.logits(ids)[-1:])
    if settings.temperature == 0:
      ids.append(int(jnp.argmax(z)))
    else:
      upto = np.cumsum(np.asarray(jax.nn.softmax(restrict(z, settings)[0]), np.float64))
      ids.append(int((upto <= jax.random.uniform(jax.random.fold_in(key, t))).sum()))
    if ids[-1] == eos_id:
      break
  return ids[len(prompt) :]


def _assert_same(got, want):
  """Same ids, and nearly the same probabilities, for every rollout of every prompt."""
  assert [[ids for ids, _ in rolled] for rolled in got] == [[ids for ids, _ in rolled] for rolled in want]
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_greedy_is_the_naive_loop():
  prompts, settings = [p[:32] for p in tiny.prompts(LENGTHS)], SampleConfig(NEW, temperature=0)
  rolled = tiny.engine().write(prompts, _keys(len(prompts), 1), settings, WATCH, "write")
  got = [ids for ((ids, _),) in rolled]
  assert got == [_naive(p, None, settings, -1) for p in prompts]
  assert min(len(set(ids)) for ids in got) >= 3


def test_sampling_is_the_naive_loop_with_the_same_keys():
  prompts, keys, rolled = _rolled()
  for i, mine in enumerate(rolled):
    assert [ids for ids, _ in mine] == [_naive(prompts[i], key, SAMPLED, END) for key in keys[i]]


def test_a_rollout_ends_at_its_end_mark_or_at_the_budget():
  _, _, rolled = _rolled()
  lengths = []
  for ids, watched in (pair for mine in rolled for pair in mine):
    assert END not in ids[:-1] and (ids[-1] == END or len(ids) == NEW) and len(watched) == len(ids)
    lengths.append(len(ids))
  assert len(set(lengths)) > 3 and max(lengths) == NEW, lengths
  assert len({tuple(ids) for mine in rolled for ids, _ in mine}) > 15


def test_watched_is_the_full_forward_untempered():
  prompts, _, rolled = _rolled()
  for prompt, mine in zip(prompts, rolled, strict=True):
    for ids, watched in mine:
      want = tiny.softmax(tiny.logits([*prompt, *ids]))[len(prompt) - 1 : -1, WATCH]
      np.testing.assert_allclose(watched, want, atol=2e-5)
  assert np.concatenate([watched for mine in rolled for _, watched in mine]).std(0).min() > 0.01


def test_a_rollout_does_not_depend_on_the_batch_that_it_is_in():
  prompts, keys, want = _rolled()
  alone = tiny.engine(eos_id=END, rows_per_batch=1)
  for i in (0, 3):
    _assert_same(alone.write(prompts[i : i + 1], keys[i : i + 1], SAMPLED, WATCH, "alone"), want[i : i + 1])
  together = tiny.engine(eos_id=END, rows_per_batch=32)
  _assert_same(together.write(prompts[::-1], keys[::-1], SAMPLED, WATCH, "all, backwards")[::-1], want)
  swapped = tiny.engine(eos_id=END).write(prompts[2::-2], keys[2::-2], SAMPLED, WATCH, "two, swapped")
  _assert_same(swapped, want[2::-2])


def test_a_rollout_does_not_depend_on_how_many_are_asked_for():
  prompts, keys, want = _rolled()
  picked = [[prompts[i] for i in SHORT], keys[np.array(SHORT), 2:0:-1]]
  got = tiny.engine(eos_id=END).write(*picked, SAMPLED, WATCH, "two of four")
  _assert_same(got, [want[i][2:0:-1] for i in SHORT])


def test_decoding_stops_when_enough_rows_are_free():
  prompts, keys, rolled = _rolled()
  tokens, length = np.zeros((2, 64), np.int32), np.array([len(p) for p in prompts[:2]], np.int32)
  for row, n in enumerate(length):
    tokens[row, :n] = prompts[row]
  # Of each row the prompt and the rollout, which is alone in it. Row 1 is never used.
  source, vote = np.array([0, -1, 0, 1, -1, 1, 0, 1], np.int32), np.array([0, 0, 2, 3, 0, 0, 1, 1])
  want = [rolled[p][r][0] if p >= 0 else [] for p, r in zip(source, vote, strict=True)]
  engine = tiny.engine()
  with jax.set_mesh(engine.mesh):
    put = functools.partial(sharding.host_to_global, sharding=sharding.batch_sharding(engine.mesh))
    sample = functools.partial(
      slots.decode, engine.params, config=engine.config, settings=SAMPLED, eos_id=END, watch=WATCH
    )
    rows = slots.free_rows(
      num_rows=8, num_rollouts=1, max_len=76, max_new_tokens=NEW, num_watched=2, config=engine.config
    )
    read = slots.read(engine.params, *put((tokens, length)), config=engine.config)
    rows = slots.start(rows, read, *put((source,)), config=engine.config)
    for num_free in (4, 8):
      rows, sampled = sample(rows, keys[source, vote][:, None], np.int32(num_free), NEVER)
      done = sorted(map(len, want))[num_free - 1]
      assert done < NEW if num_free == 4 else done == NEW
      np.testing.assert_array_equal(sampled.length, [min(len(ids), done) for ids in want])
      np.testing.assert_array_equal(sampled.live, [len(ids) > done for ids in want])
      for row, ids in enumerate(want):
        assert np.asarray(sampled.ids)[row, : sampled.length[row]].tolist() == ids[:done]
    assert not np.asarray(sampled.ids)[[1, 4]].any(), "a free row samples nothing"
    # What a rollout has left in its row is not seen by the next.
    source, vote = np.array([-1, -1, 1, 0, 0, -1, -1, -1], np.int32), np.array([0, 0, 2, 3, 1, 0, 0, 0])
    rows = slots.start(rows, read, *put((source,)), config=engine.config)
    _, sampled = sample(rows, keys[source, vote][:, None], np.int32(8), NEVER)
  for row in (2, 3, 4):
    ids = np.asarray(sampled.ids)[row, : sampled.length[row]].tolist()
    assert ids == rolled[source[row]][vote[row]][0]


def test_rollouts_leave_a_row_where_they_draw_another_token_and_go_on_from_there():
  prompts, keys, rolled = _rolled()
  i, engine, order = 4, tiny.engine(eos_id=END), np.array([2, 0, 3, 2, 1, 2])
  texts = [rolled[i][r][0] for r in order]
  places = [next((t for t, (a, b) in enumerate(zip(mine, texts[0], strict=False)) if a != b), -1) for mine in texts]
  put = functools.partial(sharding.host_to_global, sharding=sharding.batch_sharding(engine.mesh))
  decode = functools.partial(
    slots.decode, engine.params, config=engine.config, settings=SAMPLED, eos_id=END, watch=WATCH
  )
  with jax.set_mesh(engine.mesh):
    rows = slots.free_rows(
      num_rows=3, num_rollouts=6, max_len=64, max_new_tokens=NEW, num_watched=2, config=engine.config
    )
    tokens, length = np.asarray([prompts[i]], np.int32), np.asarray([len(prompts[i])], np.int32)
    read = slots.read(engine.params, *put((tokens, length)), config=engine.config)
    rows = slots.start(rows, read, *put((np.array([0, -1, -1], np.int32),)), config=engine.config)
    # It stops where the first leaves, and goes on from there as if it had not.
    row_keys = jnp.broadcast_to(keys[i][order], (3, 6))
    rows, sampled = decode(rows, row_keys, np.int32(3), np.int32(1))
    first = min(place for place in places if place >= 0)
    assert sampled.live[0] and sampled.length[0] == first + 1 < len(texts[0])
    rows, sampled = decode(rows, row_keys, np.int32(3), NEVER)
    sampled = jax.device_get(sampled)
    assert sampled.ids[0, : sampled.length[0]].tolist() == texts[0]
    assert sampled.left_at[0].tolist() == places and max(places) > first
    assert [sampled.left_with[0, f] for f in range(6) if places[f] >= 0] == [
      mine[place] for mine, place in zip(texts, places, strict=True) if place >= 0
    ]
    # In rows of their own, two of them write what they would have written.
    gone = [f for f in range(6) if places[f] >= 0 and len(texts[f]) > places[f] + 1][:2]
    place = np.array([places[gone[0]], 0, places[gone[1]]], np.int32)
    token = np.array([texts[gone[0]][place[0]], -1, texts[gone[1]][place[2]]], np.int32)
    rows = slots.copy(rows, *put((np.array([0, 1, 0], np.int32),)), num_shards=1, config=engine.config)
    rows = slots.resume(rows, *put((place + len(prompts[i]), place, token)))
    alone = np.array([gone[0], 0, gone[1]])
    _, sampled = decode(rows, jnp.broadcast_to(keys[i][order[alone]][:, None], (3, 6)), np.int32(3), NEVER)
    sampled = jax.device_get(sampled)
  for row, f in zip((0, 2), gone, strict=True):
    assert sampled.ids[row, places[f] : sampled.length[row]].tolist() == texts[f][places[f] :]


def test_what_rollouts_have_in_common_is_computed_once(monkeypatch):
  settings = SampleConfig(NEW, temperature=0.2)
  prompts, keys = tiny.prompts(LENGTHS), _keys(len(LENGTHS), 12)
  started, resumed, free = [], [], np.ones(8, bool)

  def watch_calls(name, watcher):
    function = getattr(slots, name)
    monkeypatch.setattr(slots, name, lambda *args, **kwargs: watcher(function(*args, **kwargs), args))

  def begin(result, new, begun):
    assert new.any() and free[new].all(), "a row that is not free is overwritten"
    begun.append(new.sum())
    free[new] = False
    return result

  def decode(result, args):
    free[:] = ~np.asarray(result[1].live)
    return result

  watch_calls("start", lambda result, args: begin(result, np.asarray(args[2]) >= 0, started))
  watch_calls("resume", lambda result, args: begin(result, np.asarray(args[3]) >= 0, resumed))
  watch_calls("decode", decode)
  engine = tiny.engine(eos_id=END)
  rolled = engine.write(prompts, keys, settings, WATCH, "write")
  for prompt, mine, their_keys in zip(prompts, rolled, keys, strict=True):
    assert [ids for ids, _ in mine] == [_naive(prompt, key, settings, END) for key in their_keys]
    for ids, watched in mine:
      want = tiny.softmax(tiny.logits([*prompt, *ids]))[len(prompt) - 1 : -1, WATCH]
      np.testing.assert_allclose(watched, want, atol=2e-5)
  texts = [{tuple(ids) for ids, _ in mine} for mine in rolled]
  assert sum(started) == len(prompts), "a prompt is read once"
  # A row for each further text, less those of which only the last token is their own: they end where they leave.
  assert 0 < sum(resumed) <= sum(map(len, texts)) - len(prompts) < 50


def test_rollouts_that_differ_at_once_fill_the_rows(monkeypatch):
  """Free rows take over what leaves a row that still writes: a few prompts with many rollouts keep a batch busy."""
  prompts, keys = tiny.prompts((20, 20)), _keys(2, 32)
  function, busy = slots.decode, []

  def decode(params, rows, *args, **kwargs):
    busy.append((int(rows.sampled.live.sum()), np.asarray(rows.sampled.length)))
    rows, sampled = function(params, rows, *args, **kwargs)
    busy[-1] = busy[-1][0], int((np.asarray(sampled.length) - busy[-1][1]).max())
    return rows, sampled

  monkeypatch.setattr(slots, "decode", decode)
  settings = SampleConfig(24, temperature=2.0)
  rolled = tiny.engine(rows_per_batch=16).write(prompts, keys, settings, WATCH, "write")
  num_tokens = sum(len(ids) for mine in rolled for ids, _ in mine)
  num_steps = sum(n for _, n in busy)
  assert num_tokens == 64 * 24 and len({tuple(ids) for mine in rolled for ids, _ in mine}) == 64
  # Each step writes a token in each busy row; 16 rows can do it in 96 steps.
  assert num_steps < 1.5 * num_tokens / 16


def test_texts_enter_while_others_go_on(monkeypatch):
  prompts, keys, want = _rolled()
  function, live = slots.start, []
  monkeypatch.setattr(
    slots, "start", lambda rows, *args, **kw: live.append(int(rows.sampled.live.sum())) or function(rows, *args, **kw)
  )
  _assert_same(tiny.engine(eos_id=END, rows_per_batch=2).write(prompts, keys, SAMPLED, WATCH, "write"), want)
  assert len(live) == len(prompts) and sum(n > 0 for n in live) >= 3


def test_a_mesh_changes_nothing():
  prompts, keys, rolled = _rolled()
  model = tiny.config()
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.param_shardings(gemma.param_specs(model), mesh, model.rules)
  engine = dataclasses.replace(tiny.engine(eos_id=END), mesh=mesh, params=jax.device_put(tiny.params(), shardings))
  # Three prompts over four shards, so that one row is empty, and twelve rollouts in eight rows.
  picked = [[prompts[i] for i in SHORT[:3]], keys[np.array(SHORT[:3])]]
  before = slots.start._cache_size() + slots.decode._cache_size()
  _assert_same(engine.write(*picked, SAMPLED, WATCH, "on a mesh"), [rolled[i] for i in SHORT[:3]])
  compiled = slots.start._cache_size() + slots.decode._cache_size() - before
  assert compiled == 2, "rows come back as they were laid out"
  logits, probs = engine.read(picked[0], WATCH, "read")
  want = np.stack([tiny.logits(p)[-1] for p in picked[0]])
  np.testing.assert_allclose(logits, want[:, WATCH], atol=1e-4)
  np.testing.assert_allclose(probs, tiny.softmax(want)[:, WATCH], atol=1e-5)
  texts = picked[0]
  got = engine.log_likelihood([t[:1] for t in texts], [t[1:] for t in texts], "read")
  alone = tiny.engine().log_likelihood([t[:1] for t in texts], [t[1:] for t in texts], "read")
  np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-4)


def test_read_is_the_full_forward_after_the_last_token():
  prompts = tiny.prompts((33, 5, 64, 1, 32, 63, 31, 2, 40))
  logits, probs = tiny.engine(rows_per_batch=4).read(prompts, WATCH, "read")
  want = np.stack([tiny.logits(p)[-1] for p in prompts])
  np.testing.assert_allclose(logits, want[:, WATCH], atol=1e-4)
  np.testing.assert_allclose(probs, tiny.softmax(want)[:, WATCH], atol=1e-5)
  assert want[:, WATCH].std(0).min() > 0.1


@functools.cache
def _continued():
  """Prompts, continuations of all lengths up to more than two blocks of places, and their log p by the full forward."""
  lengths = ((33, 5), (5, 70), (64, 1), (1, 32), (32, 33), (20, 12), (40, 64))
  both = tiny.prompts([n + m for n, m in lengths])
  whole = [tiny.softmax(tiny.logits(ids)) for ids in both]
  want = [
    np.log(p[range(n - 1, n + m - 1), ids[n:]]).sum() for p, ids, (n, m) in zip(whole, both, lengths, strict=True)
  ]
  return (
    [ids[:n] for ids, (n, _) in zip(both, lengths, strict=True)],
    [ids[n:] for ids, (n, _) in zip(both, lengths, strict=True)],
    np.array(want),
  )


def test_log_likelihood_is_the_sum_over_the_continuation():
  prompts, continuations, want = _continued()
  got = tiny.engine(rows_per_batch=4).log_likelihood(prompts, continuations, "read")
  assert got.dtype == np.float64 and got.shape == (7,)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  assert len(set(np.rint(want).tolist())) == 7 and want.max() < -0.1


def test_log_likelihood_does_not_depend_on_the_batch():
  prompts, continuations, want = _continued()
  for rows_per_batch, order in ((3, [6, 0, 5, 1]), (1, [1, 2])):
    engine = tiny.engine(rows_per_batch=rows_per_batch)
    got = engine.log_likelihood([prompts[i] for i in order], [continuations[i] for i in order], "read")
    np.testing.assert_allclose(got, want[order], rtol=1e-5, atol=1e-4)


def test_log_likelihood_of_a_long_text_in_few_compilations():
  engine = tiny.engine(rows_per_batch=2)
  before = read_places._cache_size()
  for lengths in ((3, 9), (20, 31), (32, 4)):
    texts = tiny.prompts(lengths)
    engine.log_likelihood([t[:2] for t in texts], [t[2:] for t in texts], "read")
  assert read_places._cache_size() - before == 1


def test_a_prompt_that_leaves_no_room_is_named():
  engine = tiny.engine(eos_id=END, rows_per_batch=4, max_tokens=32)
  fits, too_long = tiny.prompts((32 - NEW, 32 - NEW + 1))
  with pytest.raises(UserError, match=r"prompt 1 has 21 tokens and 12 new ones .* context is 32, .* leaves 20 "):
    engine.write([fits, too_long], _keys(2), SAMPLED, WATCH, "write")
  assert len(engine.write([fits], _keys(1), SAMPLED, WATCH, "write")[0]) == 4
  with pytest.raises(UserError, match=r"prompt 0 has 33 tokens"):
    engine.read([[1] * 33], WATCH, "read")
  assert engine.read([[1] * 32], WATCH, "read")[0].shape == (1, 2)
  with pytest.raises(UserError, match=r"prompt 1 has 30 tokens and 3 new ones .* leaves 29 "):
    engine.log_likelihood([[1] * 30] * 2, [[2] * 2, [2] * 3], "read")


def test_nothing_to_do():
  engine = tiny.engine()
  assert engine.write([], _keys(1)[:0], SAMPLED, WATCH, "write") == []
  assert [a.shape for a in engine.read([], WATCH, "read")] == [(0, 2), (0, 2)]
  assert engine.log_likelihood([], [], "read").shape == (0,)


def test_one_compilation_a_width():
  engine = tiny.engine(rows_per_batch=2)
  watch = (1, 2, 3)  # no other test's
  reads = read_next._cache_size()
  # By length, two at a time: 1 7 | 40 50, then 2 33 | 64, then 1 7 | 20 31 | 32.
  for lengths in ((40, 1, 50, 7), (33, 64, 2), (1, 32, 7, 20, 31)):
    engine.read(tiny.prompts(lengths), watch, "read")
    assert read_next._cache_size() - reads == 2
  functions = (slots.read, slots.free_rows, slots.start, slots.decode)
  before = [f._cache_size() for f in functions]
  for lengths in ((1, 32, 7, 20, 31), (4,), (5, 6, 7)):
    engine.write(tiny.prompts(lengths), _keys(len(lengths), 2), SampleConfig(2), watch, "write")
    after = [f._cache_size() for f in functions]
    new = dict(zip(("read", "free_rows", "start", "decode"), np.subtract(after, before).tolist(), strict=True))
    assert (new["free_rows"], new["decode"]) == (1, 1) and new["read"] <= 2 and new["start"] <= 2, "32 and 64 tokens"
