"""Decoding speed of `Engine.generate`, in tokens per second, against static batches.

    taskset -c 1 python benchmarks/decode.py

A static batch is decoded until all of its rollouts have ended before the next one starts. Both sample the same tokens.
The model is tiny (0.6M parameters) and random; its end token is likely enough that most rollouts end early.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.infer import slots
from genrm_jax.infer.engine import Engine, Rollout, bucket
from genrm_jax.infer.sampling import SampleConfig, sample
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.runtime import sharding

END, TRACKED = 1, (2, 3)


@functools.partial(jax.jit, static_argnames=("config", "settings", "num_rollouts"))
def decode_batch(params, tokens_BT, length_B, keys_R, *, config, settings, num_rollouts):
  """Decodes `num_rollouts` rollouts of each prompt until the last has ended: ids, tracked probabilities, lengths."""
  max_new = settings.max_new_tokens
  cache = kv_cache.init(config, len(tokens_BT), tokens_BT.shape[1] + max_new)
  x_BTD, cache = gemma.forward(
    params, config, tokens_BT, *slots.positions_and_segments(tokens_BT, length_B), cache=cache
  )
  x_RD = jnp.repeat(slots.last_hidden(x_BTD, length_B), num_rollouts, axis=0)
  source_R = jnp.repeat(jnp.arange(len(tokens_BT)), num_rollouts)
  cache = kv_cache.replace_rows(kv_cache.init(config, len(source_R), cache.k.shape[3]), cache, source_R, config.rules)

  def step(carry):
    t, live_R, x_RD, cache, ids, probs, length_R = carry
    logits_RV = gemma.unembed(params, config, x_RD)
    token_R = sample(logits_RV, jax.vmap(jax.random.fold_in, (0, None))(keys_R, t)[:, None], settings)[:, 0]
    ids = ids.at[:, t].set(token_R)
    probs = probs.at[:, t].set(jax.nn.softmax(logits_RV, axis=-1)[:, jnp.asarray(TRACKED)])
    length_R = jnp.where(live_R, t + 1, length_R)
    live_R = live_R & (token_R != END)
    segment_R1 = live_R.astype(jnp.int32)[:, None]
    x_R1D, cache = gemma.forward(params, config, token_R[:, None], cache.length[:, None], segment_R1, cache)
    return t + 1, live_R, x_R1D[:, 0], cache, ids, probs, length_R

  R = len(source_R)
  empty = jnp.zeros((R, max_new), jnp.int32), jnp.zeros((R, max_new, len(TRACKED))), jnp.zeros(R, jnp.int32)
  carry = jnp.zeros((), jnp.int32), jnp.repeat(length_B > 0, num_rollouts), x_RD, cache, *empty
  return jax.lax.while_loop(lambda carry: (carry[0] < max_new) & jnp.any(carry[1]), step, carry)[-3:]


def generate_in_static_batches(engine, prompts, keys, settings):
  """Like `Engine.generate`, for prompts that fill the batches."""
  num_rollouts = keys.shape[1]
  size = engine.rows_per_batch // num_rollouts
  out = []
  for first in range(0, len(prompts), size):
    length = np.array([len(p) for p in prompts[first : first + size]])
    tokens = np.zeros((size, bucket(max(length), engine.max_tokens)), np.int32)
    for row, prompt in enumerate(prompts[first : first + size]):
      tokens[row, : len(prompt)] = prompt
    decoded = decode_batch(
      engine.params,
      tokens,
      length.astype(np.int32),
      keys[first : first + size].reshape(-1),
      config=engine.config,
      settings=settings,
      num_rollouts=num_rollouts,
    )
    ids, probs, length = jax.device_get(decoded)
    rows = [Rollout(ids[row, :n].tolist(), probs[row, :n]) for row, n in enumerate(length)]
    out += [rows[i : i + num_rollouts] for i in range(0, len(rows), num_rollouts)]
  return out


def build_engine(rows: int, leaning: float) -> Engine:
  """All embeddings share a direction with the hidden state; a larger share of it makes the end token more likely."""
  config = get_config(
    "tiny_gemma1",
    vocab_size=102,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    ffw_dim=256,
  )
  params = gemma.init(config, jax.random.key(0))
  shared_D = jnp.full(config.embed_dim, config.embed_dim**-0.5)
  table_VD = params["embedder"]["input_embedding"] + shared_D
  params["embedder"]["input_embedding"] = table_VD.at[END].add(leaning * shared_D)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Engine(params, config, mesh, END, rows, 384)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--prompts", type=int, default=40)
  parser.add_argument("--votes", type=int, default=32)
  parser.add_argument("--rows", type=int, default=256)
  parser.add_argument("--new-tokens", type=int, default=75)
  parser.add_argument(
    "--leaning", type=float, default=0.5, help="how likely the end token is (share of the common direction)"
  )
  parser.add_argument("--repeats", type=int, default=4, help="the first includes compilation")
  args = parser.parse_args()
  engine, settings = build_engine(args.rows, args.leaning), SampleConfig(args.new_tokens)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(4, 102, size=n).tolist() for n in sorted(rng.integers(60, 71, size=args.prompts))]
  keys = jax.random.split(jax.random.key(1), (args.prompts, args.votes))
  methods = {
    "static batches": lambda: generate_in_static_batches(engine, prompts, keys, settings),
    "Engine.generate": lambda: engine.generate(prompts, keys, settings, TRACKED, "generate"),
  }
  seconds: dict[str, list[float]] = {name: [] for name in methods}
  ids = {}
  for _ in range(args.repeats):
    for name, method in methods.items():
      start = time.monotonic()
      rollouts = method()
      seconds[name].append(time.monotonic() - start)
      ids[name] = [r.ids for of_prompt in rollouts for r in of_prompt]
  lengths = [len(x) for x in ids["Engine.generate"]]
  same = np.mean([a == b for a, b in zip(*ids.values(), strict=True)])
  quantiles = ", ".join(f"{q:.0f}" for q in np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1)))
  print(f"{len(lengths)} rollouts, mean length {np.mean(lengths):.1f}, quartiles {quantiles}; {same:.2%} identical")
  best = {name: sum(lengths) / min(times[1:]) for name, times in seconds.items()}
  for name, speed in best.items():
    print(f"{name:15}{speed:8.0f} tokens/s, best of {args.repeats - 1}; the first run took {seconds[name][0]:.1f} s")
  print(f"ratio {best['Engine.generate'] / best['static batches']:.2f}")


if __name__ == "__main__":
  main()
