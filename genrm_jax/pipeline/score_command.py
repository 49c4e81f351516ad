"""Scores one solution with a trained verifier.

genrm-jax score QUESTION SOLUTION
genrm-jax score --checkpoint=WORKDIR/checkpoints/genrm_cot QUESTION SOLUTION [--num_votes=8] [--rationales]
"""

import json

from absl import app, flags, logging

from genrm_jax.pipeline import shipped, trained
from genrm_jax.runtime.errors import UserError, one_message

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  shipped.GSM8K,
  "A run (WORKDIR/checkpoints/RUN), one of its steps, or a verifier of the package by name.",
)
_BASE = flags.DEFINE_string("base", None, "For adapters that were saved alone: what they were trained on.")
_NUM_VOTES = flags.DEFINE_integer("num_votes", None, "Rationales to sample; as the checkpoint says if not given.", 1)
_RATIONALES = flags.DEFINE_bool("rationales", False, "Print each vote as a line of JSON after the score.")


def main(argv: list[str]) -> None:
  """Prints the score; without a readable vote, one message and exit code 1."""
  logging.set_verbosity(logging.WARNING)  # Orbax logs each internal step
  with one_message():
    if len(argv) != 3:
      raise UserError(f"give a question and a solution, each in quotes; got {len(argv) - 1} texts")
    verifier = trained.load(_CHECKPOINT.value, base=_BASE.value)
    votes = verifier.votes(*argv[1:], num_votes=_NUM_VOTES.value)
    value = verifier.verifier.value(votes)
    if value is None:
      states = ", ".join(sorted({vote.state for vote in votes}))
      raise UserError(f"no score: no vote could be read ({states}); shorten the texts or raise --num_votes")
    print(f"{value:.6f}")
    for vote in votes if _RATIONALES.value else ():
      print(json.dumps({"state": vote.state, "p_yes": vote.p_yes, "text": vote.text}, ensure_ascii=False))


if __name__ == "__main__":
  app.run(main)
