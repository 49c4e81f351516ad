"""The flags of commands that open a trained verifier: --checkpoint, --base and --num_votes."""

from typing import Any

from absl import flags

from genrm_jax.pipeline import shipped, trained

CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  shipped.GSM8K,
  "A run (WORKDIR/checkpoints/RUN), one of its steps, or a verifier of the package by name.",
)
BASE = flags.DEFINE_string("base", None, "For adapters that were saved alone: what they were trained on.")
NUM_VOTES = flags.DEFINE_integer("num_votes", None, "Rationales to sample; as the checkpoint says if not given.", 1)


def load(**options: Any) -> trained.TrainedVerifier:
  """Opens the verifier of --checkpoint and --base; `options` and errors are those of `genrm_jax.load`."""
  return trained.load(CHECKPOINT.value, base=BASE.value, **options)
