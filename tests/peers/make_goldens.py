"""Makes the goldens of all installed peers, and prints the largest difference between our logits and each golden.

    python tests/peers/make_goldens.py [name of a case ...]

A golden is a folder of goldens/ with a tiny `checkpoint` of a peer and `logits.npz`: tokens [B, T], where 0 is padding,
and the peer's logits [B, T, V]. A peer is a module in this folder with CASES and make(case, folder).
"""

import functools
import importlib.util
import pathlib
import shutil
import sys

import gemma_package
import hugging_face
import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.checkpoints import pretrained
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# The package that each peer needs.
PEERS = {hugging_face: "transformers", gemma_package: "gemma"}


@functools.partial(jax.jit, static_argnums=1)
def _forward(params, config, tokens_BT, positions_BT):
  x_BTD, _ = gemma.forward(params, config, tokens_BT, positions_BT, (tokens_BT > 0).astype(jnp.int32))
  return gemma.unembed(params, config, x_BTD)


def our_logits(params, config: ModelConfig, tokens_BT, mesh=None) -> np.ndarray:
  """Our logits, f32[B, T, V], of rows padded with token 0; on one device without a mesh."""
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  positions_BT = np.maximum(np.cumsum(tokens_BT > 0, axis=1, dtype=np.int32) - 1, 0)
  with jax.set_mesh(mesh):
    rows = sharding.host_to_global((tokens_BT, positions_BT), sharding.batch_sharding(mesh))
    return np.asarray(_forward(params, config, *rows))


def open_golden(case: str, config: ModelConfig | None = None, mesh=None):
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  params, config = pretrained.load(GOLDENS / case / "checkpoint", mesh, config=config)
  return np.load(GOLDENS / case / "logits.npz"), params, config


def main(chosen: list[str]) -> None:
  for peer, package in PEERS.items():
    for case in peer.CASES:
      if importlib.util.find_spec(package) and (not chosen or case in chosen):
        shutil.rmtree(GOLDENS / case, ignore_errors=True)
        (GOLDENS / case).mkdir(parents=True)
        peer.make(case, GOLDENS / case)
  print(f"{'case':20}{'peer':16}largest difference")
  for peer, package in PEERS.items():
    for case, made_as in peer.CASES.items():
      if (GOLDENS / case).exists():
        golden, params, config = open_golden(case, getattr(made_as, "config", None))
        difference = np.abs(our_logits(params, config, golden["tokens"]) - golden["logits"])
        print(f"{case:20}{package:16}{difference[golden['tokens'] > 0].max():.1e}")


if __name__ == "__main__":
  main(sys.argv[1:])
