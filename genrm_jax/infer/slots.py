"""The decoding batch: prompts are inserted into free slots, decoded, and leave their slots when they are finished.

    prefill  prompts c, d                        keys and values, computed once per prompt
    insert   slots   a b . .    ->   a b c d
    decode   slots   a b c d    ->   . b . d     until enough slots are free

A slot decodes one sequence. All rollouts of its prompt share the slot as long as they sample the same tokens, each with
its own key. Where a rollout samples a different token it diverges: the slot records the place and the token, and the
rollout is resumed later from the keys and values that the slot already holds:

    slot           3mike:mm+ai<
    rollout 1      3mike:mm+ai<      follows the slot to the end
    rollout 2      3mike:mm-         diverges at place 8 with "-"
    resume         3mike:mm-         the slot, once finished, keeps 8 places and continues rollout 2
    fork           3mike:mm          or a free slot does, with a copy of those keys and values

Common prefixes are thus computed once, and each rollout is what it would be alone. Slots are independent: each has its
own prompt, keys and length. Shapes do not depend on which slots are in use, so each function compiles once per width.

Axes: B slots, P prompts that are prefilled together, R rollouts per prompt, T tokens, W tracked tokens, D model.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from genrm_jax.infer.sampling import SampleConfig, probs_of, sample
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime.sharding import constrain


@flax.struct.dataclass
class Prefilled:
  """Prompts whose keys and values are computed."""

  cache: KVCache
  x_PD: jax.Array  # the hidden state at the last token of each


@flax.struct.dataclass
class Sampled:
  """What the slots have sampled: `ids[b, :length[b]]`.

  `tracked_probs` are probabilities over the full vocabulary, at temperature 1, in the distribution that the token of
  the same place was sampled from. After `resume` only the places beyond the given token are valid.
  """

  ids: jax.Array  # i32[B, T]
  tracked_probs: jax.Array  # f32[B, T, W]
  length: jax.Array  # i32[B]
  live: jax.Array  # bool[B], not finished
  diverged_at: jax.Array  # i32[B, R], the place where a rollout diverged from the slot; -1 if it did not
  diverged_token: jax.Array  # i32[B, R], the token that it sampled there


@flax.struct.dataclass
class Slots:
  """The state of the decoding batch. A slot that is not live is free."""

  cache: KVCache
  x_BD: jax.Array  # the hidden state from which the next token is sampled
  given_B: jax.Array  # i32, the next token if it is given and not sampled, else -1
  sampled: Sampled


def _pinned(slots: Slots, config: ModelConfig) -> Slots:
  """The slots with the sharding in which the next function expects them: nothing is compiled twice or moved.

  The cache constrains its keys and values itself.
  """

  def pin(x: jax.Array) -> jax.Array:
    return constrain(x, ("activation_batch", *[None] * (x.ndim - 1)), config.rules)

  cache = dataclasses.replace(slots.cache, positions=pin(slots.cache.positions), length=pin(slots.cache.length))
  return Slots(cache, pin(slots.x_BD), pin(slots.given_B), jax.tree.map(pin, slots.sampled))


def last_hidden(x_BTD: jax.Array, length_B: jax.Array) -> jax.Array:
  """The hidden state at the last token of each row, [B, D]."""
  return jnp.take_along_axis(x_BTD, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]


def positions_and_segments(tokens_BT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Positions and segments of rows that are padded on the right."""
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
  return positions_BT, (positions_BT < length_B[:, None]).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="config")
def prefill(params, tokens_PT, length_P, *, config: ModelConfig) -> Prefilled:
  """Computes the keys and values of prompts that are padded on the right."""
  cache = kv_cache.init(config, *tokens_PT.shape)
  x_PTD, filled = gemma.forward(params, config, tokens_PT, *positions_and_segments(tokens_PT, length_P), cache=cache)
  assert filled is not None
  return Prefilled(filled, last_hidden(x_PTD, length_P))


@functools.partial(
  jax.jit,
  static_argnames=("num_slots", "num_rollouts", "max_len", "max_new_tokens", "num_tracked", "config"),
)
def init(
  *, num_slots: int, num_rollouts: int, max_len: int, max_new_tokens: int, num_tracked: int, config: ModelConfig
) -> Slots:
  """Free slots for up to `num_rollouts` rollouts each; `max_len` counts the prompt and the sampled tokens."""
  slots = Slots(
    kv_cache.init(config, num_slots, max_len),
    jnp.zeros((num_slots, config.embed_dim), config.dtype),
    jnp.full(num_slots, -1, jnp.int32),
    Sampled(
      ids=jnp.zeros((num_slots, max_new_tokens), jnp.int32),
      tracked_probs=jnp.zeros((num_slots, max_new_tokens, num_tracked), jnp.float32),
      length=jnp.zeros(num_slots, jnp.int32),
      live=jnp.zeros(num_slots, bool),
      diverged_at=jnp.zeros((num_slots, num_rollouts), jnp.int32),
      diverged_token=jnp.zeros((num_slots, num_rollouts), jnp.int32),
    ),
  )
  return _pinned(slots, config)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def insert(slots: Slots, prefilled: Prefilled, source_B: jax.Array, *, config: ModelConfig) -> Slots:
  """Inserts prompt `source_B[b]` into slot b; -1 keeps the slot. Donates `slots`."""
  new_B = source_B >= 0
  cache = kv_cache.replace_rows(slots.cache, prefilled.cache, source_B, config.rules)
  # Any batch shard may need any prompt. They are few, and nothing else is exchanged between devices here.
  x_PD = constrain(prefilled.x_PD, (None, None), config.rules)
  x_BD = jnp.where(new_B[:, None], x_PD[source_B], slots.x_BD)
  sampled = _restarted(slots.sampled, new_B, jnp.zeros_like(source_B))
  return _pinned(Slots(cache, x_BD, slots.given_B, sampled), config)


@functools.partial(jax.jit, static_argnames=("num_shards", "config"), donate_argnames="slots")
def fork(slots: Slots, source_B: jax.Array, *, num_shards: int, config: ModelConfig) -> Slots:
  """Copies the keys and values of slot `source_B[b]`, of the same batch shard, to slot b, which must then be resumed.

  Donates `slots`.
  """
  cache = kv_cache.copy_rows(slots.cache, source_B, num_shards, config.rules)
  return _pinned(dataclasses.replace(slots, cache=cache), config)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def resume(slots: Slots, kept_B: jax.Array, place_B: jax.Array, token_B: jax.Array, *, config: ModelConfig) -> Slots:
  """Continues slot b after its first `kept_B[b]` tokens, `place_B[b]` of them sampled, with the token `token_B[b]`.

  A token of -1 keeps the slot. Donates `slots`.
  """
  new_B = token_B >= 0
  cache = dataclasses.replace(slots.cache, length=jnp.where(new_B, kept_B, slots.cache.length))
  given_B = jnp.where(new_B, token_B, slots.given_B)
  sampled = _restarted(slots.sampled, new_B, place_B)
  return _pinned(Slots(cache, slots.x_BD, given_B, sampled), config)


def _restarted(sampled: Sampled, new_B: jax.Array, place_B: jax.Array) -> Sampled:
  return dataclasses.replace(
    sampled,
    length=jnp.where(new_B, place_B, sampled.length),
    live=sampled.live | new_B,
    diverged_at=jnp.where(new_B[:, None], -1, sampled.diverged_at),
  )


@functools.partial(
  jax.jit,
  static_argnames=("config", "key_impl", "settings", "end_id", "tracked"),
  donate_argnames="slots",
)
def decode(
  params,
  slots: Slots,
  raw_keys_BR: jax.Array,
  min_free: jax.Array,
  min_diverged: jax.Array,
  max_steps: jax.Array,
  *,
  config: ModelConfig,
  key_impl: Any,
  settings: SampleConfig,
  end_id: int,
  tracked: tuple[int, ...],
) -> tuple[Slots, Sampled]:
  """Samples in all live slots until `min_free` are free, `min_diverged` rollouts have diverged, or `max_steps` tokens.

  Args:
    params: of the model.
    slots: donated.
    raw_keys_BR: u32[B, R, ...], keys of the rollouts; the slot follows the first. Token t of a rollout is sampled with
      fold_in(key, t).
    min_free: at most the number of slots.
    min_diverged: counted from the start of this call.
    max_steps: tokens per slot in this call.
    config: the model.
    key_impl: of the keys, as `jax.random.key_impl` returns it.
    settings: temperature, top-k, top-p and the most new tokens.
    end_id: the token that ends a rollout.
    tracked: token ids whose probability is recorded at every place.

  Returns:
    The slots, and a copy of what they have sampled, replicated on every device.
  """
  tracked_W = jnp.asarray(tracked, jnp.int32)
  keys_BR = jax.random.wrap_key_data(raw_keys_BR, impl=key_impl)
  index_B = jnp.arange(keys_BR.shape[0])

  def is_unfinished(carry):
    slots, num_diverged, num_steps = carry
    return (jnp.sum(~slots.sampled.live) < min_free) & (num_diverged < min_diverged) & (num_steps < max_steps)

  def step(carry):
    slots, num_diverged, num_steps = carry
    old = slots.sampled
    logits_BV = gemma.unembed(params, config, slots.x_BD)
    step_keys_BR = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))(keys_BR, old.length)
    token_BR = sample(logits_BV, step_keys_BR, settings)
    is_given_B = slots.given_B >= 0
    token_B = jnp.where(is_given_B, slots.given_B, token_BR[:, 0])
    follows_BR = (token_BR == token_B[:, None]) | (is_given_B | ~old.live)[:, None]
    diverges_BR = ~follows_BR & (old.diverged_at < 0)
    probs_BW = probs_of(logits_BV, tracked_W)
    # Free slots write beyond the end, where the write is dropped.
    place_B = jnp.where(old.live, old.length, settings.max_new_tokens)
    length_B = old.length + old.live
    live_B = old.live & (token_B != end_id) & (length_B < settings.max_new_tokens)
    x_B1D, cache = gemma.forward(
      params,
      config,
      token_B[:, None],
      slots.cache.length[:, None],
      live_B.astype(jnp.int32)[:, None],
      cache=slots.cache,
    )
    assert cache is not None
    sampled = Sampled(
      ids=old.ids.at[index_B, place_B].set(token_B, mode="drop"),
      tracked_probs=old.tracked_probs.at[index_B, place_B].set(probs_BW, mode="drop"),
      length=length_B,
      live=live_B,
      diverged_at=jnp.where(diverges_BR, old.length[:, None], old.diverged_at),
      diverged_token=jnp.where(diverges_BR, token_BR, old.diverged_token),
    )
    slots = Slots(cache, x_B1D[:, 0], jnp.full_like(slots.given_B, -1), sampled)
    return slots, num_diverged + jnp.sum(diverges_BR), num_steps + 1

  none = jnp.zeros((), jnp.int32)
  slots, *_ = jax.lax.while_loop(is_unfinished, step, (slots, none, none))
  replicated = jax.tree.map(lambda x: constrain(x, [None] * x.ndim, config.rules), slots.sampled)
  return _pinned(slots, config), replicated
