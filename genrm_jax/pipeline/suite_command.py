"""Measures a verifier on a public suite: docs/suites.md.

genrm-jax suite NAME --data=FILE [--checkpoint=WORKDIR/checkpoints/genrm_cot] [--out=DIR] [--num_votes=8]
"""

import os

from absl import app, flags, logging

from genrm_jax.data.suites.suites import SUITES
from genrm_jax.pipeline import suite_run, verifier_flags
from genrm_jax.runtime.errors import UserError, one_message

_DATA = flags.DEFINE_list("data", [], "Files or folders with the suite's rows, as its authors publish them.")
_OUT = flags.DEFINE_string("out", None, "Folder for results.json, report.md and scores.jsonl; else nothing is kept.")


def main(argv: list[str]) -> None:
  """Prints the report; without one, one message and exit code 1."""
  logging.set_verbosity(logging.WARNING)  # Orbax logs each internal step
  with one_message():
    if len(argv) != 2:
      raise UserError(f"give the name of one suite: {', '.join(SUITES)}")
    if not _DATA.value:
      raise UserError("give --data=FILE, the rows of the suite as its authors publish them")
    results = suite_run.run(
      argv[1],
      [os.path.expanduser(path) for path in _DATA.value],
      verifier_flags.load,
      verifier_flags.CHECKPOINT.value,
      os.path.expanduser(_OUT.value) if _OUT.value else None,
      verifier_flags.NUM_VOTES.value,
    )
    print(suite_run.markdown(results))


if __name__ == "__main__":
  app.run(main)
