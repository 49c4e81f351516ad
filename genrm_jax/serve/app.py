"""The HTTP side: routes, tokens, limits, deadlines and status codes. Needs Starlette (the extra `serve`).

    400  a bad body, or a text that the tokenizer cannot express     429  the queue is full
    401  no token, or a wrong one                                    499  the client hung up (only in the metrics)
    404  no such path or model                                       503  a solution has no score: no vote could be read
    413  too many bytes, characters or solutions                     504  the deadline passed

The body of every error is {"error": {"message", "type", "code", ...}}, as OpenAI's clients expect. That of a 503 has
the states of all votes, and whatever scores there are.
"""

import asyncio
import contextlib
import hmac
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from genrm_jax.runtime.errors import UserError
from genrm_jax.serve import dialects
from genrm_jax.serve.dialects import Limits, Refused, Request, Served
from genrm_jax.serve.metrics import Metrics
from genrm_jax.serve.scorer import Full, Job, Result, Scorer

_READ_BEYOND = 4  # times the size limit

Dialect = Callable[[Served, Mapping[str, Any]], Request]


def build_app(served: Served, scorer: Scorer, token: str = "") -> ASGIApp:
  """The application. A `token`, if not "", is needed for every path but /healthz: in a header, or as the first part."""
  metrics, started = Metrics(), int(time.time())

  async def healthz(_: HttpRequest) -> Response:
    about = {"verifier": served.name, "step": served.trained.step}
    return JSONResponse({"status": "ok", **about}) if scorer.is_alive else _error(503, "the worker has ended")

  async def metrics_text(_: HttpRequest) -> Response:
    return PlainTextResponse(metrics.text(scorer), media_type="text/plain; version=0.0.4")

  async def models(_: HttpRequest) -> Response:
    model = {"id": served.name, "object": "model", "created": started, "owned_by": "genrm-jax"}
    return JSONResponse({"object": "list", "data": [model]})

  def endpoint(path: str, dialect: Dialect) -> Route:
    async def answer(request: HttpRequest) -> Response:
      start = time.monotonic()
      response = await _answer(request, dialect, served, scorer)
      metrics.add(path, response.status_code, time.monotonic() - start)
      return response

    return Route(path, answer, methods=["POST"])

  def chat(served: Served, body: Mapping[str, Any]) -> Request:
    request = dialects.chat_completions(served, body)
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    return Request(request.asks, lambda results: about | request.reply(results))

  async def not_served(_: HttpRequest, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    return _error(e.status_code, e.detail, headers=e.headers)

  routes = [
    Route("/healthz", healthz),
    Route("/metrics", metrics_text),
    Route("/v1/models", models),
    endpoint("/score", dialects.score),
    endpoint("/get_reward", dialects.get_reward),
    endpoint("/v1/chat/completions", chat),
  ]
  app = Starlette(routes=routes, exception_handlers={HTTPException: not_served})
  return _with_token(app, token) if token else app


def _with_token(app: ASGIApp, token: str) -> ASGIApp:
  """Lets only requests with the token pass. In a path, it is cut off."""

  async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and scope["path"] != "/healthz":
      first, _, rest = scope["path"].removeprefix("/").partition("/")
      scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
      if _equal(first, token):
        scope = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}
      elif scheme.lower() != "bearer" or not _equal(given, token):
        message = "a token is needed: the header 'Authorization: Bearer TOKEN', or /TOKEN before the path"
        await _error(401, message, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)
        return
    await app(scope, receive, send)

  return guarded


def _equal(a: str, b: str) -> bool:
  return hmac.compare_digest(a.encode("utf-8", "surrogatepass"), b.encode())


async def _answer(request: HttpRequest, dialect: Dialect, served: Served, scorer: Scorer) -> Response:
  limits = served.limits
  try:
    async with asyncio.timeout(limits.timeout_s):
      wanted = dialect(served, dialects.parse_json(await _body(request, limits)))
      return _reply(wanted, await _results(request, wanted, scorer))
  except Refused as e:
    return _error(e.status, e.message, **e.details)
  except UserError as e:
    return _error(400, str(e))
  except Full:
    message = f"the queue is full ({limits.max_waiting} solutions at most); ask again later"
    return _error(429, message, headers={"Retry-After": "1"})
  except TimeoutError:
    return _error(504, f"not finished in {limits.timeout_s:g} s; ask again: what has begun goes on, and is kept")
  except ClientDisconnect:
    return Response(status_code=499)
  except Exception:
    traceback.print_exc(file=sys.stderr)
    return _error(500, "the server failed; its log says why")


async def _body(request: HttpRequest, limits: Limits) -> bytes:
  """The body. One that is too large is read all the same, within reason: few clients read a reply while they write."""
  chunks, size = [], 0
  async for chunk in request.stream():
    size += len(chunk)
    if size <= limits.max_body_bytes:
      chunks.append(chunk)
    elif size > _READ_BEYOND * limits.max_body_bytes:
      break
  if size > limits.max_body_bytes:
    raise Refused(413, f"the body is larger than {limits.max_body_bytes} bytes; send fewer or shorter texts")
  return b"".join(chunks)


async def _results(request: HttpRequest, wanted: Request, scorer: Scorer) -> list[Result]:
  """Waits for the results. ClientDisconnect if the client hangs up: the queue then drops what nobody waits for."""
  jobs = scorer.submit(wanted.asks)
  work = asyncio.ensure_future(_all(jobs))
  hang_up = asyncio.ensure_future(request.receive())
  try:
    done, _ = await asyncio.wait({work, hang_up}, return_when=asyncio.FIRST_COMPLETED)
    if work not in done:
      raise ClientDisconnect
    return work.result()
  finally:
    for task in (work, hang_up):
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
    scorer.release(jobs)


async def _all(jobs: Sequence[Job]) -> list[Result]:
  results = []
  for i, job in enumerate(jobs):
    try:
      results.append(await asyncio.wrap_future(job.future))
    except UserError as e:
      raise Refused(400, f"solution {i}: {e}") from e
  return results


def _reply(wanted: Request, results: Sequence[Result]) -> Response:
  reply = wanted.reply(results)
  if all(result.value is not None for result in results):
    return JSONResponse(reply)
  states = [[vote.state for vote in result.votes] for result in results]
  failed = [i for i, result in enumerate(results) if result.value is None]
  seen = ", ".join(sorted({state for i in failed for state in states[i]}))
  message = (
    f"no score for {len(failed)} of {len(results)} solutions, the first {failed[0]}: no vote could be read ({seen})"
  )
  scores = reply if isinstance(reply, dict) else {}
  return _error(503, message, content=scores, type="no_score", states=states)


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def _error(
  status: int,
  message: str,
  headers: Mapping[str, str] | None = None,
  content: Mapping[str, Any] | None = None,
  **details: Any,
) -> Response:
  kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
  error = {"message": message, "type": kind, "code": status, **details}
  return JSONResponse({**(content or {}), "error": error}, status_code=status, headers=headers)
