"""Generative verifiers: reward modelling as next-token prediction (arXiv 2408.15240), in JAX.

`genrm_jax.load(path)` opens a trained verifier, `genrm_jax.load_params(path)` its parameters; see pipeline/trained.py.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from genrm_jax.pipeline.trained import load, load_params

__version__ = "0.1.0"

# Where TensorFlow is installed, etils would read and write remote paths through it; its files are not like Python's.
os.environ.setdefault("EPATH_USE_TF", "false")
__all__ = ["load", "load_params"]


def __getattr__(name: str) -> Any:
  """Imports what opens a checkpoint, and with it JAX, when it is first asked for."""
  if name in __all__:
    from genrm_jax.pipeline import trained

    return getattr(trained, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
