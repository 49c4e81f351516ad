"""Makes the goldens of all installed peers, and prints the largest difference between our logits and each golden.

    python tests/peers/make_goldens.py [name of a case ...]

A golden is a folder of goldens/ with a tiny `checkpoint` of a peer and `logits.npz`: tokens [B, T], where 0 is padding,
and the peer's logits [B, T, V]. A peer is a module in this folder with CASES and make(case, folder).
"""

import importlib.util
import pathlib
import shutil
import sys

import gemma_package
import hugging_face
import jax
import numpy as np

from genrm_jax.checkpoints import pretrained
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# The package that each peer needs.
PEERS = {hugging_face: "transformers", gemma_package: "gemma"}


def largest_difference(folder: pathlib.Path, config: ModelConfig | None = None) -> float:
  """Largest difference between a golden and our logits outside padding, in float32 on one device."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params, config = pretrained.load(folder / "checkpoint", mesh, config=config)
  golden = np.load(folder / "logits.npz")
  real_BT = golden["tokens"] > 0
  positions_BT = np.maximum(np.cumsum(real_BT, axis=1) - 1, 0)
  x_BTD, _ = gemma.forward(params, config, golden["tokens"], positions_BT, real_BT.astype(np.int32))
  return float(np.abs(gemma.unembed(params, config, x_BTD) - golden["logits"])[real_BT].max())


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
        print(f"{case:20}{package:16}{largest_difference(GOLDENS / case, getattr(made_as, 'config', None)):.1e}")


if __name__ == "__main__":
  main(sys.argv[1:])
