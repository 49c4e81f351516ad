"""Scores one solution, or a file of candidates, with a trained verifier.

genrm-jax score QUESTION SOLUTION
genrm-jax score --checkpoint=WORKDIR/checkpoints/genrm_cot QUESTION SOLUTION [--num_votes=8] [--rationales]
genrm-jax score --checkpoint=... --candidates=FILE --out=FILE [--format=NAME] [--inputs=FILE] [--shard=0/4]
"""

import json
import os

from absl import app, flags, logging

from genrm_jax.pipeline import score_file, verifier_flags
from genrm_jax.runtime.errors import UserError, one_message

_RATIONALES = flags.DEFINE_bool("rationales", False, "Print each vote after the score; in a file, keep their texts.")
_CANDIDATES = flags.DEFINE_string("candidates", None, "A file or folder of candidates to score: docs/candidates.md.")
_OUT = flags.DEFINE_string("out", None, "Where to write the rows of --candidates with their scores.")
_FORMAT = flags.DEFINE_string("format", "", "The format of --candidates; recognised by the keys of its rows if empty.")
_INPUTS = flags.DEFINE_string("inputs", None, "The requests that a batch of --candidates answers.")
_SHARD = flags.DEFINE_string("shard", "", "I/N: score part I, from 0, of N parts of --candidates.")


def main(argv: list[str]) -> None:
  """Scores one solution or a file; without a result, one message and exit code 1."""
  logging.set_verbosity(logging.WARNING)  # Orbax logs each internal step
  with one_message():
    if _CANDIDATES.value is None:
      _score_one(argv[1:])
    else:
      _score_file(argv[1:])


def _score_one(texts: list[str]) -> None:
  """Prints the score, then the votes if asked for."""
  if given := [f.name for f in (_OUT, _FORMAT, _INPUTS, _SHARD) if f.value]:
    raise UserError(f"--{given[0]} goes with --candidates=FILE")
  if len(texts) != 2:
    raise UserError(f"give a question and a solution, each in quotes; got {len(texts)} texts")
  verifier = verifier_flags.load()
  votes = verifier.votes(*texts, num_votes=verifier_flags.NUM_VOTES.value)
  value = verifier.verifier.value(votes)
  if value is None:
    states = ", ".join(sorted({vote.state for vote in votes}))
    raise UserError(f"no score: no vote could be read ({states}); shorten the texts or raise --num_votes")
  print(f"{value:.6f}")
  for vote in votes if _RATIONALES.value else ():
    print(json.dumps({"state": vote.state, "p_yes": vote.p_yes, "text": vote.text}, ensure_ascii=False))


def _score_file(texts: list[str]) -> None:
  if texts:
    raise UserError(f"{texts[0]!r}: with --candidates=FILE there are no other texts")
  if not _OUT.value:
    raise UserError("--candidates needs --out=FILE, where the rows are written with their scores")
  job = score_file.Job(
    candidates=os.path.expanduser(_CANDIDATES.value or ""),
    out=os.path.expanduser(_OUT.value),
    format=_FORMAT.value,
    inputs=os.path.expanduser(_INPUTS.value or ""),
    num_votes=verifier_flags.NUM_VOTES.value,
    rationales=_RATIONALES.value,
    shard=score_file.Shard.parse(_SHARD.value),
  )
  score_file.score_file(job, verifier_flags.load)


if __name__ == "__main__":
  app.run(main)
