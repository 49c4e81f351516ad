"""A Gemma that compiles in no time, with the character tokenizer and its prompts, for the tests of verifiers."""

import functools
from typing import Any

import jax
import numpy as np
import tiny_model

from genrm_jax.infer.engine import Engine
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime import sharding
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer
from genrm_jax.verifiers.base import LabelledData, Verifier, make_verifier

CHAR = CharTokenizer()
PROMPTER = Prompter(CHAR, make_format("compact"))
_SIZES = dict(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, ffw_dim=64)
CONFIG = get_config("tiny_gemma1", vocab_size=CHAR.vocab_size, **_SIZES)
WIDTH = 64  # of a packed row, and of the reference
SETTINGS: dict[str, Any] = {
  **{"max_per_label": 16, "balanced": True, "max_rationales": 4, "solve_weight": 0.0},
  **{"max_pairs": 8, "beta": 0.3},
}
QUESTIONS = {"1ab2cd;": "BbCd;", "3xyz4uv;": "DzEv;", "0abc1d2efg;": "AcBdCg;"}
PROBLEMS = [Problem(f"p{i}", "last_letter", "train", q, a[1::2], a) for i, (q, a) in enumerate(QUESTIONS.items())]
CANDIDATES = [
  Candidate(p.id, index, text, text[1::2], index == 0, "hand")
  for p in PROBLEMS
  for index, text in enumerate((p.reference, p.reference[:-2] + "q;", p.reference[:-2] + "st7u;"))
]
RATIONALES = [
  Rationale(c.problem_id, c.index, 0, f"{c.text}{'+' if c.correct else '-'}", None, "hand", kept=True)
  for c in CANDIDATES
]
DATA = LabelledData(PROBLEMS, CANDIDATES, RATIONALES)


def verifier(name: str, prompter: Prompter = PROMPTER, **settings: Any) -> Verifier:
  return make_verifier(name, prompter, SETTINGS | settings)


@functools.cache
def params(key: int = 1):
  return jax.jit(gemma.init, static_argnums=0)(CONFIG, jax.random.key(key))


@functools.cache
def mesh(num_devices: int = 1) -> jax.sharding.Mesh:
  return sharding.make_mesh(data=-1, fsdp=min(2, num_devices), devices=jax.devices()[:num_devices])


def engine(weights=None, *, rows_per_batch: int = 8, max_tokens: int = WIDTH) -> Engine:
  weights = params() if weights is None else weights
  return Engine(weights, CONFIG, mesh(), CHAR.eos_id, rows_per_batch, max_tokens)


def logits(ids, key: int = 1) -> np.ndarray:
  """Logits after every token of one sequence by itself, f64[len(ids), V]."""
  tokens = np.zeros((1, 2 * WIDTH), np.int32)
  tokens[0, : len(ids)] = ids
  return np.asarray(tiny_model.forward(params(key), CONFIG, tokens), np.float64)[0, : len(ids)]


def log_probs(prompt, target, key: int = 1) -> np.ndarray:
  z = logits([*prompt, *target], key)[len(prompt) - 1 : -1]
  return z[np.arange(len(target)), target] - np.log(np.exp(z).sum(-1))
