"""Serves the scores of a trained verifier over HTTP.

genrm-jax serve --checkpoint=WORKDIR/checkpoints/genrm_cot [--num_votes=8] [--port=8000]

Clients: curl, OpenAI's, OpenRLHF, slime (docs/serving.md). Addresses beyond this machine need a token of at least 16
letters, digits, '-', '.', '_' or '~' in the environment variable GENRM_JAX_TOKEN. SIGTERM ends the server once all
requests are answered.
"""

import dataclasses
import os

from absl import app, flags, logging

from genrm_jax.pipeline import verifier_flags
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.serve import server
from genrm_jax.serve.dialects import Limits, Served

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; any but loopback needs a token.")
_PORT = flags.DEFINE_integer("port", 8000, "0 chooses a free one.", 0, 65535)
_ROWS = flags.DEFINE_integer("rows_per_batch", 32, "Sequences in the model at a time; each vote is one.", 1)
_MAX_WAITING = flags.DEFINE_integer("max_waiting", Limits.max_waiting, "Solutions in the queue at most.", 1)
_TIMEOUT = flags.DEFINE_float("timeout_s", Limits.timeout_s, "Seconds until a request is answered by 504.", 0.1)
_PATTERN = flags.DEFINE_string(
  "question_pattern",
  None,
  "Regular expression whose group 1 is the question in the prompts of /get_reward, if they hold a chat template.",
)


def main(argv: list[str]) -> None:
  """Serves until SIGTERM (exit code 0) or Ctrl-C; a wrong setting ends in one message and exit code 1."""
  logging.set_verbosity(logging.WARNING)  # Orbax logs each internal step
  with one_message():
    if len(argv) > 1:
      raise UserError(f"{argv[1]!r}: no such argument; settings are --NAME=VALUE, see --help")
    token = server.check_token(os.environ.get("GENRM_JAX_TOKEN", ""), _HOST.value)
    pattern = server.check_pattern(_PATTERN.value)
    server.check_packages()
    with server.bound(_HOST.value, _PORT.value) as listener:
      verifier = verifier_flags.load(rows_per_batch=_ROWS.value)
      if (num_votes := verifier_flags.NUM_VOTES.value) is not None:
        verifier = dataclasses.replace(verifier, how=dataclasses.replace(verifier.how, num_votes=num_votes))
      limits = Limits(max_waiting=_MAX_WAITING.value, timeout_s=_TIMEOUT.value)
      server.serve(Served(verifier, limits, pattern), listener, token)


if __name__ == "__main__":
  app.run(main)
