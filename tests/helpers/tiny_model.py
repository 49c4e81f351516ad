"""A two-layer model (one local, one global layer) with random weights, and its plain forward pass as a reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.infer.engine import Engine
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig, get_config
from genrm_jax.runtime import sharding

WIDTH = 160  # of the reference, which is compiled once for all lengths up to it


@functools.cache
def config(vocab_size: int = 32) -> ModelConfig:
  sizes = dict(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffw_dim=64)
  return get_config("tiny_gemma2", vocab_size=vocab_size, **sizes)


@functools.cache
def params(vocab_size: int = 32):
  """Random weights; the layers outweigh the embedding, so that greedy decoding does not repeat one token."""
  rng = np.random.default_rng(0)

  def fill(path, spec):
    name = path[-1].key
    mean = 4.0 if name.startswith("post") else 0.0
    std = 0.3 if name.endswith("norm") else 1.5 * spec.shape[-1 if name == "input_embedding" else 1] ** -0.5
    return jnp.asarray(rng.normal(mean, std, spec.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, gemma.param_specs(config(vocab_size)))


@functools.cache
def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def engine(vocab_size: int = 32, *, end_id: int = -1, rows_per_batch: int = 8, max_tokens: int = WIDTH) -> Engine:
  return Engine(params(vocab_size), config(vocab_size), mesh(), end_id, rows_per_batch, max_tokens)


@functools.partial(jax.jit, static_argnums=1)
def forward(weights, model, tokens):
  ones = jnp.ones_like(tokens)
  x, _ = gemma.forward(weights, model, tokens, jnp.cumsum(ones, 1) - 1, ones)
  return gemma.unembed(weights, model, x)


def logits(ids, vocab_size: int = 32) -> np.ndarray:
  """Logits after every token of one sequence, f32[len(ids), V], without a cache."""
  tokens = np.zeros((1, max(WIDTH, len(ids))), np.int32)
  tokens[0, : len(ids)] = ids
  return np.asarray(forward(params(vocab_size), config(vocab_size), tokens))[0, : len(ids)]


def softmax(z: np.ndarray) -> np.ndarray:
  e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def prompts(lengths, vocab_size: int = 32) -> list[list[int]]:
  return [np.random.default_rng([i, n]).integers(vocab_size, size=n).tolist() for i, n in enumerate(lengths)]
