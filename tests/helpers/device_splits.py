"""Runs models on every data x fsdp x tensor split of 1, 2, 4 and 8 devices and compares them with one device.

python tests/helpers/device_splits.py      prints the table of docs/pods.md
"""

import functools
import os
import sys

import quick_compiles

if __name__ == "__main__":
  sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
  flags = f"{quick_compiles.XLA_FLAGS} --xla_force_host_platform_device_count=8"
  os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.data.packing import pack, sft_example
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig, sample_keys
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig, get_config
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.runtime import sharding
from genrm_jax.training import optim, step
from genrm_jax.verifiers.base import sft_loss

SPLITS = [
  (data, fsdp, n // data // fsdp)
  for n in (1, 2, 4, 8)
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  if n % (data * fsdp) == 0
]
SHAPE = dict(vocab_size=64, num_layers=2, embed_dim=32, ffw_dim=64, num_heads=8, head_dim=8, query_scale=8**-0.5)
MODELS: dict[str, ModelConfig] = {
  "one kv head": get_config("tiny_gemma1", **SHAPE, num_kv_heads=1),
  "grouped heads": get_config("tiny_gemma2", **SHAPE, num_kv_heads=8, window=6),
}
LIMITS = {  # on differences, which are due to rounding
  "losses and gradient norms": 1e-4,
  "logits after prefill": 1e-4,
  "scores": 1e-5,
  "log p of continuations": 1e-3,
  "sampled tokens": 0,
  "p tracked while decoding": 1e-5,
}
TRACKED = (1, 2)
NUM_STEPS = 3


@functools.cache
def _params(model: str):
  """NumPy arrays, in which the layers outweigh the embedding, so that sampled tokens vary."""
  rng = np.random.default_rng(0)

  def fill(path, spec):
    name = path[-1].key
    std = 0.3 if spec.is_norm else 1.5 * spec.shape[-1 if name == "input_embedding" else 1] ** -0.5
    return rng.normal(4.0 if name.startswith("post") else 0.0, std, spec.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, gemma.param_specs(MODELS[model]))


@functools.cache
def _rows():
  rng = np.random.default_rng(1)
  ids = [rng.integers(3, 64, int(rng.integers(5, 16))) for _ in range(24)]
  kinds = [KIND_SOLVE if i % 3 == 0 else KIND_VERIFY for i in range(len(ids))]
  return pack([sft_example(str(i), x[:3], x[3:], kind) for i, (x, kind) in enumerate(zip(ids, kinds, strict=True))], 16)


@functools.cache
def numbers(model: str, split: tuple[int, int, int]) -> dict[str, np.ndarray]:
  """Losses and gradient norms of training; logits after prefill, scores, sampled ids and tracked probabilities."""
  config = MODELS[model]
  mesh = sharding.make_mesh(*split, devices=jax.devices()[: int(np.prod(split))])
  param_shardings = sharding.param_shardings(gemma.param_specs(config), mesh, config.rules)
  rows, optimizer = _rows(), optim.make_optimizer(optim.OptimConfig(1e-2, 50))
  loss_fn = sft_loss(config, rows.max_targets, 0.5, "dots")
  with jax.set_mesh(mesh):
    state = step.init_state(jax.tree.map(jnp.asarray, _params(model)), optimizer)
    shardings = step.state_shardings(state, param_shardings, mesh)
    state = jax.device_put(state, shardings)
    train_step = step.make_train_step(loss_fn, optimizer, sharding.batch_sharding(mesh), shardings)
    trained = []
    for i in range(NUM_STEPS):
      state, sums = train_step(
        state, sharding.read_to_global(rows.take, rows.order(0, i, 8), sharding.batch_sharding(mesh))
      )
      trained.append([float(total) / float(count) for total, count in jax.device_get(sums).values()])
    params = jax.device_put(_params(model), param_shardings)
  engine = Engine(params, config, mesh, end_id=2, rows_per_batch=8, max_tokens=64)
  prompts = [np.random.default_rng(i).integers(3, 64, n).tolist() for i, n in enumerate((5, 12, 9, 30, 7))]
  keys = sample_keys(0, "vote", [str(i) for i in range(5)], 3)
  rollouts = [r for rs in engine.generate(prompts, keys, SampleConfig(12), TRACKED, "generate") for r in rs]
  return {
    "losses and gradient norms": np.asarray(trained),
    "logits after prefill": engine.next_token_logits(prompts, TRACKED, "logits"),
    "scores": engine.next_token_probs(prompts, TRACKED, "probs"),
    "log p of continuations": engine.log_likelihood(prompts[:4], prompts[1:], "read"),
    "sampled tokens": np.concatenate([rollout.ids for rollout in rollouts]),
    "p tracked while decoding": np.concatenate([rollout.tracked_probs for rollout in rollouts]),
  }


def differences(model: str, split: tuple[int, int, int]) -> dict[str, float]:
  """Largest difference from one device, per kind of number; for sampled tokens, how many differ."""
  want, got = numbers(model, (1, 1, 1)), numbers(model, split)
  if want["sampled tokens"].shape != got["sampled tokens"].shape:
    return {name: float("inf") for name in want}
  return {
    name: float((got[name] != want[name]).sum() if name == "sampled tokens" else np.abs(got[name] - want[name]).max())
    for name in want
  }


def too_far(found: dict[str, float]) -> dict[str, float]:
  return {name: d for name, d in found.items() if not d <= LIMITS[name]}


def table() -> str:
  """A Markdown table with the larger difference of the two models."""
  names = list(LIMITS)
  lines = [f"| data x fsdp x tensor | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
  for split in SPLITS[1:]:
    found = {model: differences(model, split) for model in MODELS}
    beyond = {model: too_far(differing) for model, differing in found.items() if too_far(differing)}
    if beyond:
      sys.exit(f"{split} differs from one device: {beyond}")
    largest = [max(differing[name] for differing in found.values()) for name in names]
    cells = [
      f"{d:.0f} differ" if name == "sampled tokens" else f"{d:.0e}" for name, d in zip(names, largest, strict=True)
    ]
    lines.append(f"| {' x '.join(map(str, split))} | {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())
