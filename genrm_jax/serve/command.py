"""Serves the scores of a trained verifier over HTTP.

genrm-jax serve --checkpoint=WORKDIR/checkpoints/genrm_cot [--num_votes=8] [--port=8000]

Clients: curl, OpenAI's, OpenRLHF, slime (docs/serving.md). Addresses beyond this machine need a token of at least 16
letters, digits, '-', '.', '_' or '~' in the environment variable GENRM_JAX_TOKEN. SIGTERM ends the server once all
requests are answered.
"""

import dataclasses
import ipaddress
import os
import re
import signal
import socket

from absl import app, flags, logging

from genrm_jax.pipeline import shipped, trained
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say
from genrm_jax.serve.dialects import Limits, Served, score
from genrm_jax.serve.scorer import Scorer

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  shipped.GSM8K,
  "A run (WORKDIR/checkpoints/RUN), one of its steps, or a verifier of the package by name.",
)
_BASE = flags.DEFINE_string("base", None, "For adapters that were saved alone: what they were trained on.")
_NUM_VOTES = flags.DEFINE_integer("num_votes", None, "Rationales per solution; as the checkpoint says if not given.", 1)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; any but loopback needs a token.")
_PORT = flags.DEFINE_integer("port", 8000, "0 chooses a free one.", 0, 65535)
_ROWS = flags.DEFINE_integer("rows_per_batch", 32, "Sequences in the model at a time; each vote is one.", 1)
_MAX_WAITING = flags.DEFINE_integer("max_waiting", Limits.max_waiting, "Solutions in the queue at most.", 1)
_TIMEOUT = flags.DEFINE_float("timeout_s", Limits.timeout_s, "Seconds until a request is answered by 504.", 0.0)
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
    token = check_token(os.environ.get("GENRM_JAX_TOKEN", ""), _HOST.value)
    pattern = check_pattern(_PATTERN.value)
    try:
      import uvicorn

      from genrm_jax.serve.app import build_app
    except ImportError as e:
      raise UserError(f"the server needs optional packages ({e.name}): pip install 'genrm-jax[serve]'") from e
    with bound(_HOST.value, _PORT.value) as listener:
      limits = Limits(max_waiting=_MAX_WAITING.value, timeout_s=_TIMEOUT.value)
      verifier = trained.load(_CHECKPOINT.value, base=_BASE.value, rows_per_batch=_ROWS.value)
      if _NUM_VOTES.value is not None:
        verifier = dataclasses.replace(verifier, how=dataclasses.replace(verifier.how, num_votes=_NUM_VOTES.value))
      served = Served(verifier, limits, pattern)
      scorer = Scorer(verifier, limits.max_waiting)
      warm_up(served, scorer)
      config = uvicorn.Config(
        build_app(served, scorer, token), lifespan="off", log_level="warning", access_log=False, server_header=False
      )
      server = uvicorn.Server(config)
      # uvicorn finishes what runs, and then raises the signal again.
      signal.signal(signal.SIGTERM, lambda *_: None)
      listener.listen(2048)
      host, port = listener.getsockname()[:2]
      say(f"{served.name}, step {verifier.step}: http://{f'[{host}]' if ':' in host else host}:{port}")
      server.run(sockets=[listener])
      scorer.close()


def check_token(token: str, host: str) -> str:
  """UserError if an address needs a token and has none, or for a token that is short or cannot stand in a URL."""
  if token and not re.fullmatch(r"[A-Za-z0-9._~-]{16,}", token):
    raise UserError("GENRM_JAX_TOKEN must be 16 or more letters, digits, '-', '.', '_' or '~'; choose another token")
  if not token and not _is_loopback(host):
    raise UserError(
      f"--host={host} can be reached from other machines: set GENRM_JAX_TOKEN to a secret of 16 or more letters and "
      "digits, which clients must send, or leave --host out"
    )
  return token


def check_pattern(pattern: str | None) -> re.Pattern[str] | None:
  """The compiled pattern; UserError if it is none, or has no group."""
  try:
    compiled = re.compile(pattern, re.DOTALL) if pattern else None
  except re.error as e:
    raise UserError(f"--question_pattern={pattern}: no regular expression: {e}") from e
  if compiled is not None and compiled.groups != 1:
    raise UserError(f"--question_pattern={pattern}: has {compiled.groups} groups; mark the question by one, (...)")
  return compiled


def bound(host: str, port: int) -> socket.socket:
  """A socket of an address, which does not listen yet; UserError if it cannot be had."""
  listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as e:
    listener.close()
    raise UserError(f"cannot listen on {host}, port {port}: {e.strerror or e}; give another --host or --port") from e
  return listener


def warm_up(served: Served, scorer: Scorer) -> None:
  """Scores a text, so that a verifier that cannot is found before clients come, and the first has less to wait."""
  text = served.trained.verifier.prompter.format.verdict_question
  (job,) = scorer.submit(score(served, {"question": text, "solution": text}).asks)
  job.future.result()
  scorer.release([job])


def _is_loopback(host: str) -> bool:
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


if __name__ == "__main__":
  app.run(main)
