"""Servers inside the test's process, and requests to them."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import uvicorn

from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.serve import batches
from genrm_jax.serve import server as starting
from genrm_jax.serve.app import build_app
from genrm_jax.serve.dialects import Limits, Served
from genrm_jax.serve.scorer import Scorer

_LIMITS = Limits()


@contextlib.contextmanager
def server(
  trained: TrainedVerifier, limits: Limits = _LIMITS, pattern: str = "", token: str = "", make=batches.make_batches
) -> Iterator[tuple[str, Scorer]]:
  """The URL of a server, and its scorer."""
  scorer = Scorer(trained, limits.max_waiting, make)
  app = build_app(Served(trained, limits, starting.check_pattern(pattern)), scorer, token)
  running = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
  with starting.bound("127.0.0.1", 0) as listener:
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
      while not running.started:
        time.sleep(0.01)
      yield f"http://127.0.0.1:{listener.getsockname()[1]}", scorer
    finally:
      running.should_exit = True
      thread.join()
      scorer.close()


def post(url: str, body: Any, **headers: str) -> tuple[int, Any]:
  """Status and JSON of the reply; a body of bytes is sent as it is."""
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  try:
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=300) as reply:
      return reply.status, json.load(reply)
  except urllib.error.HTTPError as e:
    return e.code, json.loads(e.read())


def get(url: str) -> str:
  with urllib.request.urlopen(url, timeout=60) as reply:
    return reply.read().decode()
