"""The protocols of the server: parses JSON requests and formats replies.

/score                 this library: {"question", "solution"}, each a text or a list of texts
/get_reward            OpenRLHF: {"query": [...], "prompts": [...]}; slime: {"prompt", "response"}
/v1/chat/completions   OpenAI: the user asks the question, the assistant gives the solution

docs/serving.md describes them for users.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Vote
from genrm_jax.serve.batches import Ask
from genrm_jax.serve.scorer import Result

# What ends a response that was decoded with its special tokens, as OpenRLHF sends it.
_END_MARKS = re.compile(r"(?:</s>|<eos>|<end_of_turn>|<\|(?:im_end|endoftext|end_of_text|eot_id)\|>)\s*\Z")
_BOS = re.compile(r"(?:<s>|<bos>|<\|begin_of_text\|>)?\s*")
_LEAST_LOGPROB = -9999.0  # as OpenAI writes log 0
_CHAT_FIELDS = ("model", "messages", "n", "logprobs", "top_logprobs", "seed", "max_tokens", "max_completion_tokens")
# Accepted, since clients send them by themselves: they change nothing, or must have the one value that changes nothing.
_CHAT_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier")
_CHAT_DEFAULTS = {"stream": False, "presence_penalty": 0, "frequency_penalty": 0}


class Refused(Exception):
  """A request that is not served: HTTP status, message, and further entries of the error in the reply."""

  def __init__(self, status: int, message: str, **details: Any):
    super().__init__(message)
    self.status, self.message, self.details = status, message, details


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for at most.

  Attributes:
    max_body_bytes: of the JSON.
    max_text_chars: of a question or a solution.
    max_votes: votes per solution.
    max_waiting: solutions in the queue, and so in one request.
    timeout_s: seconds until a request is answered, with an error if need be. Below those of the frameworks that ask.
  """

  max_body_bytes: int = 16 * 2**20
  max_text_chars: int = 100_000
  max_votes: int = 256
  max_waiting: int = 4096
  timeout_s: float = 110.0


@dataclasses.dataclass(frozen=True)
class Served:
  """What is served. `trained.how` holds the default votes.

  `question_pattern` finds the question, its group 1, in a prompt of `/get_reward` that has a chat template in it.
  """

  trained: TrainedVerifier
  limits: Limits = Limits()
  question_pattern: re.Pattern[str] | None = None

  @property
  def name(self) -> str:
    return self.trained.verifier.name


@dataclasses.dataclass(frozen=True)
class Request:
  """Solutions to score, and the reply, in the client's protocol, to their results."""

  asks: list[Ask]
  reply: Callable[[Sequence[Result]], Any]


def parse_json(body: bytes) -> dict[str, Any]:
  """The JSON object of a body; Refused if it is none."""
  try:
    value = json.loads(body)
  except (ValueError, RecursionError) as e:
    raise Refused(400, f"the body is not JSON: {e!s:.200}") from e
  if not isinstance(value, dict):
    raise Refused(400, f"the body is JSON, but {_kind(value)}; send an object")
  return value


def score(served: Served, body: Mapping[str, Any]) -> Request:
  """`/score`: one text each, or one question and many solutions, or lists of equal length."""
  _check_fields(body, ("question", "solution", "num_votes", "seed", "rationales"))
  question, solution = body.get("question"), body.get("solution")
  is_list = isinstance(solution, list)
  solutions = _texts("solution", solution) if is_list else [_text("solution", solution)]
  if isinstance(question, list):
    questions = _texts("question", question)
    if not is_list or len(questions) != len(solutions):
      raise Refused(
        400, f"question has {len(questions)} texts, solution {len(solutions) if is_list else 'is one text'}"
      )
  else:
    questions = [_text("question", question)] * len(solutions)
  with_text = body.get("rationales", False)
  if not isinstance(with_text, bool):
    raise Refused(400, f"rationales is {_kind(with_text)}; expected true or false")
  num_votes, seed = (_integer(body, "num_votes", 1, served.limits.max_votes), _integer(body, "seed", 0, 2**31 - 1))
  asks = _asks(served, zip(questions, solutions, strict=True), num_votes, seed)

  def reply(results: Sequence[Result]) -> dict[str, Any]:
    scores, votes = [r.value for r in results], [[_vote(v, with_text) for v in r.votes] for r in results]
    told = {"scores": scores, "votes": votes} if is_list else {"score": scores[0], "votes": votes[0]}
    return {**told, "verifier": served.name, "step": served.trained.step}

  return Request(asks, reply)


def get_reward(served: Served, body: Mapping[str, Any]) -> Request:
  """`/get_reward`: the lists of OpenRLHF or the single object of slime; reference labels are not used."""
  if "query" in body:
    queries, prompts = _texts("query", body["query"]), _texts("prompts", body.get("prompts"))
    if len(queries) != len(prompts):
      raise Refused(400, f"query has {len(queries)} texts, prompts {len(prompts)}")
    solutions = [_response(i, query, prompt) for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))]
    asks = _asks(served, zip([_question(served, p) for p in prompts], solutions, strict=True))
    return Request(asks, _openrlhf_reply)
  if "response" in body:
    prompt, response = _content(body.get("prompt"), "prompt"), _text("response", body["response"])
    return Request(_asks(served, [(_question(served, prompt), _END_MARKS.sub("", response))]), lambda r: r[0].value)
  raise Refused(400, 'expected {"query": [...], "prompts": [...]} (OpenRLHF) or {"prompt", "response"} (slime)')


def chat_completions(served: Served, body: Mapping[str, Any]) -> Request:
  """`/v1/chat/completions`: one choice per vote: its message is the rationale, its logprobs are the verdict's."""
  _check_chat_fields(served, body)
  if body.get("model") != served.name:
    raise Refused(404, f"no model {str(body.get('model'))!r:.60} here; the model is {served.name!r}")
  question, solution = _conversation(body.get("messages"))
  num_votes = _integer(body, "n", 1, served.limits.max_votes) or 1
  if num_votes != served.trained.verifier.num_votes(num_votes):
    raise Refused(400, f"n must be 1: {served.name} has one vote per solution")
  num_tops = _integer(body, "top_logprobs", 0, 20) or 0
  with_logprobs = body.get("logprobs") or False
  if not isinstance(with_logprobs, bool) or (num_tops and not with_logprobs):
    raise Refused(400, "logprobs must be true or false, and true for top_logprobs")
  limits = [_integer(body, name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")]
  asks = _asks(
    served,
    [(question, solution)],
    num_votes,
    _integer(body, "seed", 0, 2**31 - 1),
    min((n for n in limits if n), default=None),
  )

  def reply(results: Sequence[Result]) -> dict[str, Any]:
    (result,) = results
    num_sampled = sum(vote.num_tokens for vote in result.votes)
    return {
      "object": "chat.completion",
      "model": served.name,
      "choices": [
        _choice(served, index, vote, num_tops if with_logprobs else None) for index, vote in enumerate(result.votes)
      ],
      "usage": {
        "prompt_tokens": result.num_prompt_tokens,
        "completion_tokens": num_sampled,
        "total_tokens": result.num_prompt_tokens + num_sampled,
      },
      "score": result.value,
    }

  return Request(asks, reply)


def _asks(
  served: Served,
  pairs: Any,
  num_votes: int | None = None,
  seed: int | None = None,
  max_new_tokens: int | None = None,
) -> list[Ask]:
  how, limits = served.trained.how, served.limits
  num_votes = served.trained.verifier.num_votes(how.num_votes if num_votes is None else num_votes)
  seed = how.seed if seed is None else seed
  max_new = how.sample.max_new_tokens if max_new_tokens is None else min(max_new_tokens, how.sample.max_new_tokens)
  asks = [Ask(question, solution, num_votes, seed, max_new) for question, solution in pairs]
  if len(asks) > limits.max_waiting:
    raise Refused(413, f"{len(asks)} solutions in one request; send at most {limits.max_waiting}")
  for i, ask in enumerate(asks):
    for what, text in (("question", ask.question), ("solution", ask.solution)):
      if len(text) > limits.max_text_chars:
        raise Refused(413, f"{what} {i} has {len(text)} characters; at most {limits.max_text_chars} are read")
  return asks


def _vote(vote: Vote, with_text: bool) -> dict[str, Any]:
  told = {"state": vote.state, "p_yes": vote.p_yes, "p_no": vote.p_no, "num_tokens": vote.num_tokens}
  return {**told, "text": vote.text} if with_text else told


def _openrlhf_reply(results: Sequence[Result]) -> dict[str, Any]:
  values = [r.value for r in results]
  readable = [sum(v.p_yes is not None for v in r.votes) / len(r.votes) for r in results]
  return {"rewards": values, "scores": values, "extra_logs": {"readable_votes": readable}}


def _response(index: int, query: str, prompt: str) -> str:
  """What follows the prompt in a query; special tokens before the prompt and after the response are left out."""
  start = query.find(prompt)
  if start < 0 or not _BOS.fullmatch(query[:start]):
    raise Refused(400, f"query {index} does not begin with its prompt")
  return _END_MARKS.sub("", query[start + len(prompt) :])


def _question(served: Served, prompt: str) -> str:
  if served.question_pattern is None:
    return prompt
  found = served.question_pattern.search(prompt)
  if not found:
    raise Refused(400, f"no question in the prompt {prompt!r:.60}, by --question_pattern")
  return found[1]


def _conversation(messages: Any) -> tuple[str, str]:
  """The question and the solution: turns of the user and the assistant. A last turn of the user may follow, unread."""
  expected = "expected a user turn (the question), an assistant turn (the solution), and at most one more user turn"
  if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
    raise Refused(400, f"messages is {_kind(messages)}; {expected}")
  roles = [m.get("role") for m in messages]
  if roles not in (["user", "assistant"], ["user", "assistant", "user"]):
    raise Refused(400, f"messages have the roles {roles!s:.100}; {expected}. The verifier formats its prompt itself")
  return tuple(_content([m], "messages") for m in messages[:2])  # type: ignore[return-value]


def _content(value: Any, name: str) -> str:
  """The text of a string, or of the last user's turn (the only turn) in a list of messages."""
  if isinstance(value, str):
    return value
  if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
    turns = [m for m in value if m.get("role") == "user"] or value
    content = turns[-1].get("content")
    if isinstance(content, str):
      return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    if all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
      return "".join(p["text"] for p in parts)
    raise Refused(400, f"{name}: the content of a turn is {_kind(content)}; expected a text or parts of type text")
  raise Refused(400, f"{name} is {_kind(value)}; expected a text or a list of messages")


def _check_chat_fields(served: Served, body: Mapping[str, Any]) -> None:
  sample = served.trained.how.sample
  allowed: dict[str, Any] = {**_CHAT_DEFAULTS, "temperature": sample.temperature, "top_p": sample.top_p}
  if not served.trained.verifier.samples_rationales:
    allowed |= {name: body.get(name) for name in ("temperature", "top_p")}  # nothing is sampled
  for name, value in body.items():
    if value is None or name in _CHAT_FIELDS or name in _CHAT_NO_EFFECT:
      continue
    if name not in allowed:
      raise Refused(400, f"{name!r:.60} is not supported; leave it out")
    if isinstance(value, bool) != isinstance(allowed[name], bool) or value != allowed[name]:
      raise Refused(400, f"{name!r} must be {json.dumps(allowed[name])} or left out, not {value!r:.60}")


def _choice(served: Served, index: int, vote: Vote, num_tops: int | None) -> dict[str, Any]:
  form, verifier = served.trained.verifier.prompter.format, served.trained.verifier
  probs = {} if vote.p_yes is None or vote.p_no is None else {form.yes: vote.p_yes, form.no: vote.p_no}
  verdicts = sorted((_logprob(token, p) for token, p in probs.items()), key=lambda entry: -entry["logprob"])
  text = vote.text if verifier.samples_rationales else verdicts[0]["token"].strip() if verdicts else ""
  logprobs = None
  if num_tops is not None and verdicts:
    logprobs = {"content": [{**verdicts[0], "top_logprobs": verdicts[:num_tops]}], "refusal": None}
  return {
    "index": index,
    "message": {"role": "assistant", "content": text},
    "logprobs": logprobs,
    "finish_reason": "length" if vote.state in ("forced", "truncated") else "stop",
    "vote": _vote(vote, with_text=False),
  }


def _logprob(token: str, p: float) -> dict[str, Any]:
  logprob = max(math.log(p), _LEAST_LOGPROB) if p > 0 else _LEAST_LOGPROB
  return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _check_fields(body: Mapping[str, Any], names: Sequence[str]) -> None:
  if unknown := [name for name in body if name not in names]:
    raise Refused(400, f"unknown field {unknown[0]!r:.60}; the fields are {', '.join(names)}")


def _text(name: str, value: Any) -> str:
  if not isinstance(value, str):
    raise Refused(400, f"{name} is {_kind(value)}; expected a text")
  return value


def _texts(name: str, value: Any) -> list[str]:
  if not isinstance(value, list):
    raise Refused(400, f"{name} is {_kind(value)}; expected a list of texts")
  return [_text(f"{name} {i}", item) for i, item in enumerate(value)]


def _integer(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
  """An integer in a range; None if it is left out."""
  value = body.get(name)
  if value is None:
    return None
  if type(value) is not int or not least <= value <= most:
    raise Refused(400, f"{name} is {value!r:.60}; expected an integer from {least} to {most}")
  return value


def _kind(value: Any) -> str:
  kinds = {type(None): "missing or null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
  return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
