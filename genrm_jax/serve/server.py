"""Starts and stops the server, on an address that is safe to use."""

import ipaddress
import re
import signal
import socket

from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.serve.dialects import Served, score
from genrm_jax.serve.scorer import Scorer


def serve(served: Served, listener: socket.socket, token: str) -> None:
  """Serves until SIGTERM or Ctrl-C, answers what has been asked, and returns; after Ctrl-C, KeyboardInterrupt."""
  import uvicorn

  from genrm_jax.serve.app import build_app

  scorer = Scorer(served.trained, served.limits.max_waiting)
  warm_up(served, scorer)
  config = uvicorn.Config(
    build_app(served, scorer, token), lifespan="off", log_level="warning", access_log=False, server_header=False
  )
  # uvicorn finishes what runs, and then raises the signal again.
  signal.signal(signal.SIGTERM, lambda *_: None)
  listener.listen(2048)
  host, port = listener.getsockname()[:2]
  say(f"{served.name}, step {served.trained.step}: http://{f'[{host}]' if ':' in host else host}:{port}")
  uvicorn.Server(config).run(sockets=[listener])
  scorer.close()


def check_packages() -> None:
  """UserError if the optional packages are missing."""
  try:
    import starlette.applications  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as e:
    raise UserError(f"the server needs optional packages ({e.name}): pip install 'genrm-jax[serve]'") from e


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
