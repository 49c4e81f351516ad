"""Reward functions, called as each framework calls them, over a loaded verifier and over a server."""

import inspect
import math
import pickle
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from refusals import refused

from genrm_jax import rewards

VALUES = {("2+2?", "4"): 0.75, ("2+2?", "5"): 0.25, ("long?", "..."): None}


class Loaded:
  """In place of what `genrm_jax.load` returns."""

  def score_many(self, pairs):
    return [VALUES[pair] for pair in pairs]


def _chat(role, text):
  return [{"role": "system", "content": "Solve."}, {"role": role, "content": text}]


QUESTIONS, SOLUTIONS = ["2+2?", "2+2?", "long?"], ["4", "5", "..."]
CHATS = [_chat("user", q) for q in QUESTIONS], [_chat("assistant", s) for s in SOLUTIONS]
TEMPLATED = [f"<user>{q}<model>" for q in QUESTIONS]


def test_each_framework_gets_scores_in_its_own_way():
  loaded = Loaded()
  trl, tunix = rewards.for_trl(loaded), rewards.for_tunix(loaded)
  # TRL: columns of the data set and its own arguments, all by name.
  others = {"completion_ids": [[1]] * 3, "trainer_state": None, "log_extra": print, "log_metric": print, "answer": "4"}
  assert trl(prompts=QUESTIONS, completions=SOLUTIONS, **others) == [0.75, 0.25, None]
  assert trl(prompts=CHATS[0], completions=CHATS[1], **others) == [0.75, 0.25, None]
  by_column = rewards.for_trl(loaded, question="problem")
  assert by_column(prompts=TEMPLATED, completions=SOLUTIONS, problem=QUESTIONS) == [0.75, 0.25, None]
  # Tunix looks at the signature and sums with NaN as 0.
  got = tunix(prompts=QUESTIONS, completions=SOLUTIONS, mode="train", question=QUESTIONS)
  assert got[:2] == [0.75, 0.25] and math.isnan(got[2])
  assert list(inspect.signature(tunix).parameters) == ["prompts", "completions", "columns"]
  # verl and AReaL: one at a time, by position or by name.
  verl = rewards.for_verl(loaded)
  assert verl("gsm8k", "4", "4", {"question": "2+2?", "index": 0}) == 0.75
  given = {"data_source": "gsm8k", "solution_str": "5", "ground_truth": "4", "extra_info": {"question": "2+2?"}}
  assert verl(**given, reward_router_address="host:1", reward_model_tokenizer=None) == 0.25
  areal = rewards.for_areal(loaded)
  assert areal("2+2?", "5", [1], [2], answer="4") == 0.25
  assert rewards.for_areal(loaded, question="q")(CHATS[0][0], "4", [1], [2], q="2+2?") == 0.75
  assert rewards.for_areal(loaded, if_none=-1)("long?", "...", [1], [2]) == -1.0
  assert rewards.for_verl(loaded, if_none=math.nan)("x", "...", "", {"question": "long?"}) != 0
  assert {f.__name__ for f in (trl, tunix, verl, areal)} == {"genrm"}, "by which they are logged"
  refused(
    ("no vote on the solution could be read; set if_none=", areal, "long?", "...", [1], [2]),
    ("no column 'question' among ", verl, "gsm8k", "4", "4", {}),
    ("messages with a turn of the user", areal, [{"role": "system", "content": "?"}], "4"),
  )


def test_over_a_server_missing_scores_and_refusals_are_told_apart(monkeypatch):
  replies, seen, pauses = [], [], []
  monkeypatch.setattr(rewards.time, "sleep", pauses.append)

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      seen.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
      status, body = replies.pop(0)
      self.send_response(status)
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  with HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    areal = pickle.loads(pickle.dumps(rewards.for_areal(f"http://{place}/secret/")))  # it goes to other processes
    busy, good = (429, b'{"error": {"message": "the queue is full"}}'), (200, b'{"scores": [0.5]}')
    replies[:] = [busy, (504, b"<html>"), good]
    assert areal("2+2?", "4") == 0.5 and pauses == [0.0, 1.0, 2.0]
    assert seen == [("/secret/score", b'{"question": ["2+2?"], "solution": ["4"]}')] * 3
    trl = rewards.for_trl(f"http://{place}")
    replies[:] = [(503, b'{"scores": [0.5, null], "error": {"message": "no score for 1 of 2"}}')]
    assert trl(prompts=QUESTIONS[:2], completions=SOLUTIONS[:2]) == [0.5, None]
    assert trl(prompts=[], completions=[]) == []
    for codes, message in (
      ([(400, b'{"error": {"message": "solution 0: no such character"}}')], f"{place}: HTTP 400: solution 0: no such"),
      ([(503, b"{}")], "HTTP 503: no scores in the reply"),
      ([busy] * 4, "HTTP 429: the queue is full"),
      ([(200, b"[]")], "HTTP 200: no scores in the reply"),
      ([(200, b'{"scores": [1, 2]}')], "no scores in the reply"),
    ):
      replies[:] = codes
      refused((message, areal, "2+2?", "4"))
      assert not replies
    server.shutdown()
  with pytest.raises(rewards.UserError, match=r"^no scores from the server 127[^/]*: .*refused") as failed:
    areal("2+2?", "4")
  assert "secret" not in str(failed.value)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    number, begin = len(pauses), time.monotonic()
    slow = rewards.for_areal(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)
    refused(("timed out", slow, "2+2?", "4"))
    assert time.monotonic() - begin < 5 and len(pauses) <= number + 1, "all tries together have that long"


def test_jax_is_not_imported():
  code = "import sys; from genrm_jax import rewards; rewards.for_trl('http://x'); assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
