"""Rollouts that enter and leave the batch: a row that has ended makes room for what waits.

    read    prompts c, d                           their keys and values, computed once
    start   rows   a b .  .    ->   a b c d
    decode  rows   a b c d     ->   . b . d        until enough have ended

A row writes one text. All rollouts of its prompt go with it while they draw the tokens that it writes, each with its
own key; of one that draws another, place and token are recorded, and that it can go on from, with all that the row has
read and written before:

    row             3mike:mm+ai<
    rollout 1       3mike:mm+ai<      goes with it to the end
    rollout 2       3mike:mm-         leaves it at place 8, with "-"
    resume          3mike:mm-         the row keeps 8 places, and writes what rollout 2 draws
    copy            3mike:mm          or another row, that is free, does, after a copy of the row

So what rollouts have in common is computed once, and each is what it would be by itself. Rows know nothing of each
other: each has its own prompt, keys and count of tokens. Shapes never depend on which rows are taken, so each function
compiles once for a width.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from genrm_jax.infer.sampling import SampleConfig, sample
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime.sharding import DEFAULT_RULES, constrain


@flax.struct.dataclass
class Prompts:
  """Prompts that have been read."""

  cache: KVCache  # B rows
  x_BD: jax.Array  # the hidden state after each


@flax.struct.dataclass
class Rollouts:
  """What was sampled: `ids[r, :length[r]]`, with the end mark where there is one; `watched` holds p(watched token) over
  the full vocabulary, untempered, in the distribution from which the token at that place was sampled. Of a row that was
  resumed, only what comes after the token that it was given is here."""

  ids: jax.Array  # i32[R, T]
  watched: jax.Array  # f32[R, T, W]
  length: jax.Array  # i32[R]
  live: jax.Array  # bool[R], more is to come
  left_at: jax.Array  # i32[R, F], the place where a rollout has left the row; -1 where it has not
  left_with: jax.Array  # i32[R, F], the token that it drew there


@flax.struct.dataclass
class Rows:
  """The batch: what its rows have read and sampled so far. A row that is not live is free."""

  cache: KVCache  # R rows
  x_RD: jax.Array  # the hidden state from which the next token is sampled
  given_R: jax.Array  # i32, the next token, where it is not to be sampled; else -1
  sampled: Rollouts


# Pinned, so that each function takes the rows as the one before has left them: no second compilation, and no copy. The
# cache sees to its keys and values itself.
_BATCH: Any = PartitionSpec(DEFAULT_RULES["activation_batch"])
_AS_IT_IS: Any = None
_ROWS = Rows(KVCache(_AS_IT_IS, _AS_IT_IS, _BATCH, _BATCH), _BATCH, _BATCH, Rollouts(*[_BATCH] * 6))


def last_hidden(x_BTD: jax.Array, length_B: jax.Array) -> jax.Array:
  """The hidden state at each row's last token, [B, D]."""
  return jnp.take_along_axis(x_BTD, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]


def layout(tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Positions and segments of rows that are padded on the right."""
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
  return positions, (positions < length_B[:, None]).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="config")
def read(params, tokens_BT, length_B, *, config: ModelConfig) -> Prompts:
  """Reads prompts that are padded on the right."""
  empty = kv_cache.init(config, *tokens_BT.shape)
  x_BTD, cache = gemma.forward(params, config, tokens_BT, *layout(tokens_BT, length_B), cache=empty)
  assert cache is not None
  return Prompts(cache, last_hidden(x_BTD, length_B))


@functools.partial(
  jax.jit,
  static_argnames=("num_rows", "num_rollouts", "max_len", "max_new_tokens", "num_watched", "config"),
  out_shardings=_ROWS,
)
def free_rows(
  *, num_rows: int, num_rollouts: int, max_len: int, max_new_tokens: int, num_watched: int, config: ModelConfig
) -> Rows:
  """A batch of free rows for up to so many rollouts each, with room for `max_len` tokens, prompt and sampled ones."""
  return Rows(
    kv_cache.init(config, num_rows, max_len),
    jnp.zeros((num_rows, config.embed_dim), config.dtype),
    jnp.full(num_rows, -1, jnp.int32),
    Rollouts(
      ids=jnp.zeros((num_rows, max_new_tokens), jnp.int32),
      watched=jnp.zeros((num_rows, max_new_tokens, num_watched), jnp.float32),
      length=jnp.zeros(num_rows, jnp.int32),
      live=jnp.zeros(num_rows, bool),
      left_at=jnp.zeros((num_rows, num_rollouts), jnp.int32),
      left_with=jnp.zeros((num_rows, num_rollouts), jnp.int32),
    ),
  )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="rows", out_shardings=_ROWS)
def start(rows: Rows, prompts: Prompts, source_R: jax.Array, *, config: ModelConfig) -> Rows:
  """Starts row r after prompt `source_R[r]`; -1 leaves it."""
  new_R = source_R >= 0
  cache = kv_cache.replace_rows(rows.cache, prompts.cache, source_R, config.rules)
  # Every shard may need every prompt. They are few, and they are all that the devices exchange here.
  x_BD = constrain(prompts.x_BD, (None, None), config.rules)
  x_RD = jnp.where(new_R[:, None], x_BD[source_R], rows.x_RD)
  # Nothing follows an empty prompt.
  sampled = _begin(rows.sampled, new_R, jnp.zeros_like(source_R), live_R=cache.length > 0)
  return Rows(cache, x_RD, rows.given_R, sampled)


@functools.partial(jax.jit, static_argnames=("num_shards", "config"), donate_argnames="rows", out_shardings=_ROWS)
def copy(rows: Rows, source_R: jax.Array, *, num_shards: int, config: ModelConfig) -> Rows:
  """Gives row r what row `source_R[r]`, of the same batch shard, has read and written, so that it can be resumed."""
  return dataclasses.replace(rows, cache=kv_cache.copy_rows(rows.cache, source_R, num_shards, config.rules))


@functools.partial(jax.jit, donate_argnames="rows", out_shardings=_ROWS)
def resume(rows: Rows, kept_R: jax.Array, place_R: jax.Array, token_R: jax.Array) -> Rows:
  """Row r goes on after its first `kept_R[r]` tokens, `place_R[r]` of them sampled, with `token_R[r]`; -1 leaves it."""
  new_R = token_R >= 0
  cache = dataclasses.replace(rows.cache, length=jnp.where(new_R, kept_R, rows.cache.length))
  sampled = _begin(rows.sampled, new_R, place_R, live_R=new_R)
  return Rows(cache, rows.x_RD, jnp.where(new_R, token_R, rows.given_R), sampled)


def _begin(sampled: Rollouts, new_R: jax.Array, place_R: jax.Array, live_R: jax.Array) -> Rollouts:
  return dataclasses.replace(
    sampled,
    length=jnp.where(new_R, place_R, sampled.length),
    live=jnp.where(new_R, live_R, sampled.live),
    left_at=jnp.where(new_R[:, None], -1, sampled.left_at),
  )


@functools.partial(
  jax.jit,
  static_argnames=("config", "settings", "eos_id", "watch"),
  donate_argnames="rows",
  out_shardings=(_ROWS, PartitionSpec()),
)
def decode(
  params,
  rows: Rows,
  keys_RF: jax.Array,
  num_free: jax.Array,
  num_left: jax.Array,
  *,
  config: ModelConfig,
  settings: SampleConfig,
  eos_id: int,
  watch: tuple[int, ...],
) -> tuple[Rows, Rollouts]:
  """Samples in all live rows until at least `num_free` rows are free, or `num_left` rollouts have left theirs.

  Args:
    params: of the model.
    rows: the batch.
    keys_RF: keys of the rollouts of each row, which writes what the first of them draws; token t of a rollout is
      sampled with fold_in(key, t).
    num_free: at most the number of rows.
    num_left: counted from now on.
    config: the model.
    settings: temperature and its kin.
    eos_id: the token that ends a rollout.
    watch: token ids whose probability is recorded at every step.

  Returns:
    The batch, and a copy of what it has sampled, whole on every device.
  """
  ids_W = jnp.asarray(watch, jnp.int32)
  index_R = jnp.arange(keys_RF.shape[0])

  def go_on(carry):
    rows, left = carry
    return (jnp.sum(~rows.sampled.live) < num_free) & (left < num_left)

  def step(carry):
    rows, left = carry
    out = rows.sampled
    logits_RV = gemma.unembed(params, config, rows.x_RD)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))(keys_RF, out.length)
    token_RF = sample(logits_RV, keys, settings)
    is_given_R = rows.given_R >= 0
    token_R = jnp.where(is_given_R, rows.given_R, token_RF[:, 0])
    stays_RF = (token_RF == token_R[:, None]) | (is_given_R | ~out.live)[:, None]
    leaves_RF = ~stays_RF & (out.left_at < 0)
    watched_RW = jax.nn.softmax(logits_RV, axis=-1)[:, ids_W]
    # A free row writes beyond the end, that is nowhere.
    place_R = jnp.where(out.live, out.length, settings.max_new_tokens)
    length_R = out.length + out.live
    live_R = out.live & (token_R != eos_id) & (length_R < settings.max_new_tokens)
    position_R1 = rows.cache.length[:, None]
    x_R1D, cache = gemma.forward(
      params, config, token_R[:, None], position_R1, live_R.astype(jnp.int32)[:, None], cache=rows.cache
    )
    assert cache is not None
    rows = Rows(
      cache,
      x_R1D[:, 0],
      jnp.full_like(rows.given_R, -1),
      Rollouts(
        ids=out.ids.at[index_R, place_R].set(token_R, mode="drop"),
        watched=out.watched.at[index_R, place_R].set(watched_RW, mode="drop"),
        length=length_R,
        live=live_R,
        left_at=jnp.where(leaves_RF, out.length[:, None], out.left_at),
        left_with=jnp.where(leaves_RF, token_RF, out.left_with),
      ),
    )
    return rows, left + jnp.sum(leaves_RF)

  rows, _ = jax.lax.while_loop(go_on, step, (rows, jnp.zeros((), jnp.int32)))
  return rows, rows.sampled
