"""Scores as rewards for RL frameworks, from a loaded verifier or from a server (`genrm-jax serve`).

    rewards.for_trl("http://127.0.0.1:8000")                  # GRPOTrainer(reward_funcs=...)
    rewards.for_tunix(genrm_jax.load(path))                   # GRPOLearner(reward_fns=...)
    compute_score = rewards.for_verl("http://127.0.0.1:8000") # custom_reward_function.path=THIS_FILE
    rewards.for_areal("http://127.0.0.1:8000")                # RLVRWorkflow(reward_fn=...)

A solution whose votes cannot be read has no score, and never the reward 0: TRL gets None and leaves it out, Tunix NaN,
which its sum over reward functions leaves out; verl and AReaL have no such value, so NoScore is raised unless
`if_none` says otherwise. A server that does not answer raises UserError.

With a URL only the standard library is used, JAX is not imported, and the functions can be pickled.
"""

import dataclasses
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from genrm_jax.runtime.errors import UserError

_TRIES = 4  # with pauses of 1, 2 and 4 s
_BUSY = (429, 502, 504)


class Scores(Protocol):
  """What `genrm_jax.load` returns."""

  def score_many(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """The scores of (question, solution) pairs; None where no vote could be read."""
    ...


class NoScore(UserError):
  """No vote on a solution could be read, and the framework has no value that says so."""


def for_trl(source: str | Scores, question: str = "", timeout_s: float = 120.0) -> "TRLReward":
  """A reward function of TRL's GRPOTrainer.

  Args:
    source: the URL of a server, with its token if it needs one (http://HOST:PORT/TOKEN), or a loaded verifier.
    question: the dataset's column with the bare question; if "", the prompt (its last user turn) is the question.
    timeout_s: seconds to wait for a server, tries included.
  """
  return TRLReward(source, question, timeout_s)


def for_tunix(source: str | Scores, question: str = "", timeout_s: float = 120.0) -> "TunixReward":
  """A reward function of Tunix; arguments as for `for_trl`."""
  return TunixReward(source, question, timeout_s)


def for_verl(
  source: str | Scores, question: str = "question", timeout_s: float = 120.0, if_none: float | None = None
) -> "VerlReward":
  """A `compute_score` of verl.

  Args:
    source: as for `for_trl`.
    question: the key of the bare question in `extra_info`.
    timeout_s: seconds to wait for a server, tries included.
    if_none: the reward of a solution without a score; if None, NoScore is raised.
  """
  return VerlReward(source, question, timeout_s, if_none)


def for_areal(
  source: str | Scores, question: str = "", timeout_s: float = 14.0, if_none: float | None = None
) -> "ARealReward":
  """A reward function of AReaL, which waits 15 s by default and then takes 0: give both more time if votes need it.

  Arguments as for `for_verl`; `question` is a column of the dataset as for `for_trl`.
  """
  return ARealReward(source, question, timeout_s, if_none)


@dataclasses.dataclass(frozen=True)
class _Reward:
  source: str | Scores
  question: str
  timeout_s: float
  __name__ = "genrm"  # the frameworks' logs call a reward function by it

  def _scores(
    self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
  ) -> list[float | None]:
    if self.question:
      if self.question not in columns:
        raise UserError(f"no column {self.question!r} among {', '.join(sorted(columns))}; set question= to one of them")
      prompts = columns[self.question]
    pairs = [(_text(p, "user"), _text(c, "assistant")) for p, c in zip(prompts, completions, strict=True)]
    return scores_of(self.source, pairs, self.timeout_s)


class TRLReward(_Reward):
  """See `for_trl`."""

  def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    return self._scores(prompts, completions, columns)


class TunixReward(_Reward):
  """See `for_tunix`."""

  def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    return [math.nan if score is None else score for score in self._scores(prompts, completions, columns)]


@dataclasses.dataclass(frozen=True)
class _SingleReward(_Reward):
  if_none: float | None

  def _score(self, prompt: Any, completion: Any, columns: Mapping[str, Any]) -> float:
    (score,) = self._scores([prompt], [completion], {name: [value] for name, value in columns.items()})
    if score is None and self.if_none is None:
      raise NoScore("no score: no vote on the solution could be read; set if_none= to use a number instead")
    return float(self.if_none if score is None else score)  # type: ignore[arg-type]


class VerlReward(_SingleReward):
  """See `for_verl`."""

  def __call__(
    self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
  ) -> float:
    return self._score(None, solution_str, extra_info or {})


class ARealReward(_SingleReward):
  """See `for_areal`."""

  def __call__(
    self, prompt: Any, completions: Any, prompt_ids: Any = None, completion_ids: Any = None, **kw: Any
  ) -> float:
    return self._score(prompt, completions, kw)


def scores_of(source: str | Scores, pairs: Sequence[tuple[str, str]], timeout_s: float) -> list[float | None]:
  """The scores of (question, solution) pairs; None where no vote could be read.

  Raises:
    UserError: the server cannot be reached, refuses a text, or is busy all the time.
  """
  if not isinstance(source, str):
    return source.score_many(pairs)
  if not pairs:
    return []
  body = json.dumps({"question": [q for q, _ in pairs], "solution": [s for _, s in pairs]}).encode()
  url = f"{source.rstrip('/')}/score"
  problem, deadline = "", time.monotonic() + timeout_s
  for attempt in range(_TRIES):
    pause = 2.0 ** (attempt - 1) if attempt else 0.0
    if deadline - time.monotonic() < pause:
      break
    time.sleep(pause)
    try:
      request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
      with urllib.request.urlopen(request, timeout=max(deadline - time.monotonic(), 0.01)) as reply:
        status, content = reply.status, _json_object(reply.read())
    except urllib.error.HTTPError as e:
      status, content = e.code, _json_object(e.read())
    except (OSError, http.client.HTTPException) as e:
      problem = str(e) or type(e).__name__
      continue
    scores, error = content.get("scores"), content.get("error")
    if status in (200, 503) and isinstance(scores, list) and len(scores) == len(pairs):
      return scores
    problem = f"HTTP {status}: {error['message'] if isinstance(error, dict) else 'no scores in the reply'}"
    if status not in _BUSY:
      break
  place = url.split("//", 1)[-1].split("/", 1)[0]  # without a token
  raise UserError(f"no scores from the server {place}: {problem}")


def _json_object(body: bytes) -> dict[str, Any]:
  try:
    value = json.loads(body)
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def _text(text: Any, role: str) -> str:
  """A text, or the content of the last turn of a role in a list of messages."""
  if isinstance(text, str):
    return text
  turns = [turn["content"] for turn in text if turn["role"] == role] if isinstance(text, list | tuple) else []
  if not turns or not isinstance(turns[-1], str):
    raise UserError(f"expected a text or messages with a turn of the {role}, not {text!r:.80}")
  return turns[-1]
