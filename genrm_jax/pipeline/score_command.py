"""Scores one solution, or a file of candidates, with a trained verifier.

genrm-jax score QUESTION SOLUTION
genrm-jax score --checkpoint=WORKDIR/checkpoints/genrm_cot QUESTION SOLUTION [--num_votes=8] [--rationales]
genrm-jax score --checkpoint=... --candidates=FILE --out=FILE [--format=NAME] [--inputs=FILE] [--shard=0/4]
"""

import functools
import json
import os

from absl import app, flags, logging

from genrm_jax.pipeline import score_file, shipped, trained
from genrm_jax.runtime.errors import UserError, one_message

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  shipped.GSM8K,
  "A run (WORKDIR/checkpoints/RUN), one of its steps, or a verifier of the package by name.",
)
_BASE = flags.DEFINE_string("base", None, "For adapters that were saved alone: what they were trained on.")
_NUM_VOTES = flags.DEFINE_integer("num_votes", None, "Rationales to sample; as the checkpoint says if not given.", 1)
_RATIONALES = flags.DEFINE_bool("rationales", False, "Print each vote after the score; in a file, keep their texts.")
_CANDIDATES = flags.DEFINE_string("candidates", None, "A file or folder of candidates to score: docs/candidates.md.")
_OUT = flags.DEFINE_string("out", None, "Where to write the rows of --candidates with their scores.")
_FORMAT = flags.DEFINE_string("format", "", "The format of --candidates; recognised by the keys of its rows if empty.")
_INPUTS = flags.DEFINE_string("inputs", None, "The requests that a batch of --candidates answers.")
_SHARD = flags.DEFINE_string("shard", "", "I/N: score part I, from 0, of N parts of --candidates.")


def main(argv: list[str]) -> None:
  """Scores one solution or a file; without a result, one message and exit code 1."""
  logging.set_verbosity(logging.WARNING)  # Orbax logs each internal step
  load = functools.partial(trained.load, _CHECKPOINT.value, base=_BASE.value)
  with one_message():
    if _CANDIDATES.value is None:
      _score_one(argv[1:], load)
    else:
      _score_file(argv[1:], load)


def _score_one(texts: list[str], load: functools.partial[trained.TrainedVerifier]) -> None:
  """Prints the score, then the votes if asked for."""
  if given := [f.name for f in (_OUT, _FORMAT, _INPUTS, _SHARD) if f.value]:
    raise UserError(f"--{given[0]} goes with --candidates=FILE")
  if len(texts) != 2:
    raise UserError(f"give a question and a solution, each in quotes; got {len(texts)} texts")
  verifier = load()
  votes = verifier.votes(*texts, num_votes=_NUM_VOTES.value)
  value = verifier.verifier.value(votes)
  if value is None:
    states = ", ".join(sorted({vote.state for vote in votes}))
    raise UserError(f"no score: no vote could be read ({states}); shorten the texts or raise --num_votes")
  print(f"{value:.6f}")
  for vote in votes if _RATIONALES.value else ():
    print(json.dumps({"state": vote.state, "p_yes": vote.p_yes, "text": vote.text}, ensure_ascii=False))


def _score_file(texts: list[str], load: functools.partial[trained.TrainedVerifier]) -> None:
  if texts:
    raise UserError(f"{texts[0]!r}: with --candidates=FILE there are no other texts")
  if not _OUT.value:
    raise UserError("--candidates needs --out=FILE, where the rows are written with their scores")
  job = score_file.Job(
    candidates=os.path.expanduser(_CANDIDATES.value or ""),
    out=os.path.expanduser(_OUT.value),
    format=_FORMAT.value,
    inputs=os.path.expanduser(_INPUTS.value or ""),
    num_votes=_NUM_VOTES.value,
    rationales=_RATIONALES.value,
    shard=score_file.Shard.parse(_SHARD.value),
  )
  score_file.score_file(job, load)


if __name__ == "__main__":
  app.run(main)
