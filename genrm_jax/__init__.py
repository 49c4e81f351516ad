"""Generative verifiers in JAX: reward modeling as next-token prediction (arXiv 2408.15240).

    verifiers = genrm_jax.train("last_letter:smoke", "runs/smoke")
    scores = genrm_jax.score("last_letter:smoke", "runs/smoke")
    results = genrm_jax.evaluate("last_letter:smoke", "runs/smoke")
    verifier = genrm_jax.load("runs/smoke/checkpoints/genrm_cot")

`read_candidates(path)` reads solutions in other tools' formats. `load_params(path)` gives parameters for analysis,
`pretrained(name)` a Gemma and its tokenizer, `get_config(name)` a config to change. See data/interchange/reading.py,
pipeline/api.py, pipeline/trained.py and checkpoints/pretrained.py.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from genrm_jax.checkpoints.pretrained import pretrained
  from genrm_jax.data.interchange.reading import read_candidates
  from genrm_jax.pipeline.api import evaluate, get_config, score, train
  from genrm_jax.pipeline.trained import load, load_params

__version__ = "0.2.0"

# With TensorFlow installed, etils would read and write remote paths through it; its files are not like Python's.
os.environ.setdefault("EPATH_USE_TF", "false")
__all__ = ["evaluate", "get_config", "load", "load_params", "pretrained", "read_candidates", "score", "train"]


def __getattr__(name: str) -> Any:
  """Imports a function, and with it JAX, when it is first used."""
  if name in __all__:
    home = {
      "load": "pipeline.trained",
      "load_params": "pipeline.trained",
      "pretrained": "checkpoints.pretrained",
      "read_candidates": "data.interchange.reading",
    }
    return getattr(importlib.import_module(f"genrm_jax.{home.get(name, 'pipeline.api')}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
