"""The reward server: scores as `load` gives them, in every protocol; one message per mistake; nothing is lost."""

import concurrent.futures
import dataclasses
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time

import jax
import processes
import pytest
import saved_runs
from refusals import refused

import genrm_jax
from genrm_jax.infer import slots
from genrm_jax.runtime import sharding
from genrm_jax.serve import server
from genrm_jax.serve.batches import Ask, DirectBatches
from genrm_jax.serve.dialects import Limits
from genrm_jax.serve.scorer import Scorer
from genrm_jax.verifiers.base import Verifier
from genrm_jax.verifiers.genrm_cot import GreedyRationale

for _package in ("starlette", "uvicorn"):
  pytest.importorskip(_package)
serving = pytest.importorskip("serving")


KINDS = {"genrm_cot": "gsm8k", "genrm": "last_letter", "orm": "last_letter", "dpo": "last_letter"}
PAIRS = [("mike dan", "ee+n"), ("mike dan", "en"), ("a bc def", "xyz" * 9), ("mike dan", "ee+n")]
LONG = ("mike dan", "ee+n" * 600)  # exceeds the context
QUESTIONS, SOLUTIONS = (list(texts) for texts in zip(*PAIRS, strict=True))
TOKEN = "a-token.of_16~ch"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp("served")
  out = {}
  for name, task in KINDS.items():
    run = saved_runs.run_of(folder / name, task, **{f"verifiers__{name}__init_from": ""})
    out[name] = saved_runs.save(run, name)
  return out


@pytest.fixture(scope="module")
def verifiers(paths):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return {name: genrm_jax.load(path, mesh=mesh) for name, path in paths.items()}


@pytest.fixture(scope="module")
def cot(verifiers):
  with serving.server(verifiers["genrm_cot"]) as (url, _):
    yield url, verifiers["genrm_cot"]


@pytest.mark.parametrize("name", KINDS)
def test_scores_of_every_kind_and_protocol_equal_those_of_load(verifiers, name):
  verifier = verifiers[name]
  want = verifier.score_many(PAIRS)
  assert len(set(want)) == 3 and None not in want
  close = pytest.approx(want, rel=1e-5)
  with serving.server(verifier) as (url, scorer):
    status, reply = serving.post(f"{url}/score", {"question": QUESTIONS, "solution": SOLUTIONS, "rationales": True})
    assert status == 200 and reply["scores"] == close and (reply["verifier"], reply["step"]) == (name, 4)
    for pair, votes in zip(PAIRS, reply["votes"], strict=True):
      same = verifier.votes(*pair)
      assert [(v["state"], v["num_tokens"], v["text"]) for v in votes] == [
        (v.state, v.num_tokens, v.text) for v in same
      ]
      assert [v["p_yes"] for v in votes] == pytest.approx([v.p_yes for v in same], rel=1e-5)
    status, reply = serving.post(f"{url}/score", {"question": PAIRS[0][0], "solution": [PAIRS[0][1], PAIRS[1][1]]})
    assert status == 200 and reply["scores"] == pytest.approx(want[:2], rel=1e-5)
    # OpenRLHF decodes with special tokens; slime's prompt may be a chat.
    body = {"query": [f"<bos>{q}{s}<eos>" for q, s in PAIRS], "prompts": QUESTIONS, "labels": ["?"] * 4}
    status, reply = serving.post(f"{url}/get_reward", body)
    assert status == 200 and reply["rewards"] == reply["scores"] == close
    assert reply["extra_logs"] == {"readable_votes": [1.0] * 4}
    for prompt in (PAIRS[1][0], [{"role": "system", "content": "Solve."}, {"role": "user", "content": PAIRS[1][0]}]):
      slime = serving.post(f"{url}/get_reward", {"prompt": prompt, "response": PAIRS[1][1], "label": None})
      assert slime == (200, pytest.approx(want[1], rel=1e-5))
    votes = verifier.verifier.num_votes(2)
    messages = [{"role": "user", "content": PAIRS[0][0]}, {"role": "assistant", "content": PAIRS[0][1]}]
    status, reply = serving.post(f"{url}/v1/chat/completions", {"model": name, "messages": messages, "n": votes})
    assert status == 200 and reply["score"] == pytest.approx(want[0], rel=1e-5) and len(reply["choices"]) == votes
    assert scorer.num_scored == 3, "equal texts are scored once"
    metrics = serving.get(f"{url}/metrics")
    assert 'genrm_requests_total{path="/score",status="200"} 2' in metrics and "genrm_scored_total 3" in metrics
    assert json.loads(serving.get(f"{url}/healthz")) == {"status": "ok", "verifier": name, "step": 4}


def test_many_clients_share_one_batch_and_each_gets_its_own_scores(cot, monkeypatch):
  url, verifier = cot
  pairs = [(f"{i} apples and {i % 7} pears?", "Yes" * (i % 11) + str(i)) for i in range(40)]
  want = [verifier.score(*pair, num_votes=5, seed=3) for pair in pairs[:3]]
  want += verifier.score_many(pairs[3:], num_votes=5, seed=3)
  insert, live = slots.insert, []
  monkeypatch.setattr(slots, "insert", lambda s, *a, **k: live.append(int(s.sampled.live.sum())) or insert(s, *a, **k))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    bodies = [{"question": q, "solution": s, "num_votes": 5, "seed": 3} for q, s in pairs]
    replies = list(pool.map(lambda body: serving.post(f"{url}/score", body), bodies))
  assert [status for status, _ in replies] == [200] * 40
  assert sum(n > 0 for n in live) >= 3, "requests enter while others are decoded"
  assert [reply["score"] for _, reply in replies] == pytest.approx(want, rel=1e-5)


def test_one_greedy_rationale_and_a_users_own_verifier_are_batched_too(verifiers):
  class Shorter(Verifier):
    """Two direct votes per pair."""

    samples_rationales = True

    def prompt(self, question, solution):
      return self.prompter.direct(question, solution)

    def votes(self, engine, pairs, how, label):
      votes = verifiers["genrm"].verifier.votes(engine, pairs, how, label)
      return [of_pair * how.num_votes for of_pair in votes]

  for base, cls in (("genrm_cot", GreedyRationale), ("genrm", Shorter)):
    verifier = verifiers[base].verifier
    trained = dataclasses.replace(verifiers[base], verifier=cls("other", verifier.prompter, verifier.settings))
    num_votes = trained.verifier.num_votes(2)
    scorer = Scorer(trained, 10)
    jobs = scorer.submit([Ask(*pair, num_votes, trained.how.seed, 8) for pair in PAIRS])
    results = [job.future.result() for job in jobs]
    scorer.close()
    assert [r.value for r in results] == pytest.approx(trained.score_many(PAIRS), rel=1e-5)
    assert [len(r.votes) for r in results] == [num_votes] * 4


def test_openais_client_gets_rationales_and_the_verdicts_log_probabilities(cot):
  openai = pytest.importorskip("openai")
  url, verifier = cot
  client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
  assert [model.id for model in client.models.list()] == ["genrm_cot"]
  turns = [("user", PAIRS[0][0]), ("assistant", PAIRS[0][1]), ("user", "Is the answer correct?")]
  messages = [{"role": role, "content": content} for role, content in turns]
  about = {"model": "genrm_cot", "messages": messages, "logprobs": True, "top_logprobs": 2}
  for n, seed, max_tokens in ((1, None, None), (3, 7, None), (2, 7, 3)):
    given = {"n": n} | ({"seed": seed} if seed else {}) | ({"max_tokens": max_tokens} if max_tokens else {})
    done = client.chat.completions.create(**about, **given)
    limit = max_tokens or verifier.how.sample.max_new_tokens
    sample = dataclasses.replace(verifier.how.sample, max_new_tokens=limit)
    shorter = dataclasses.replace(verifier, how=dataclasses.replace(verifier.how, sample=sample))
    votes = shorter.rationales(*PAIRS[0], num_votes=n, seed=seed)
    assert [choice.message.content for choice in done.choices] == [vote.text for vote in votes]
    assert done.score == pytest.approx(shorter.score(*PAIRS[0], num_votes=n, seed=seed), rel=1e-5)
    for choice, vote in zip(done.choices, votes, strict=True):
      tops = {top.token: math.exp(top.logprob) for top in choice.logprobs.content[-1].top_logprobs}
      assert tops == pytest.approx({" Yes": vote.p_yes, " No": vote.p_no}, rel=1e-5)
      assert choice.vote["state"] == vote.state and choice.finish_reason == "length"  # 8 tokens: no verdict by itself
    assert done.usage.completion_tokens == sum(vote.num_tokens for vote in votes) <= n * limit
    assert done.usage.prompt_tokens == len(verifier.verifier.prompt(*PAIRS[0]))
  messages[1]["content"] = LONG[1]
  with pytest.raises(openai.InternalServerError) as failed:
    client.chat.completions.create(**about, n=2)
  assert failed.value.status_code == 503 and failed.value.body["states"] == [["truncated"] * 2]


def _chat(**changes):
  messages = [{"role": "user", "content": "mike"}, {"role": "assistant", "content": "e"}]
  return "/v1/chat/completions", {"model": "genrm_cot", "messages": messages, **changes}


def _score(**changes):
  return "/score", {"question": "mike", "solution": "e", **changes}


BAD = [
  ("/score", b"{", 400, "the body is not JSON"),
  ("/score", b"[" * 100_000, 400, "the body is not JSON"),
  ("/score", b"\xff", 400, "the body is not JSON"),
  ("/score", ["mike"], 400, "but a list; send an object"),
  (*_score(question=None), 400, "question is missing or null; expected a text"),
  (*_score(solution=3), 400, "solution is a number; expected a text"),
  (*_score(solution=["e", 3]), 400, "solution 1 is a number"),
  (*_score(question=["a", "b"]), 400, "question has 2 texts, solution is one text"),
  (*_score(question=["a", "b"], solution=["e"]), 400, "question has 2 texts, solution 1"),
  (*_score(question="half \ud800"), 400, "solution 0: the question has half of a surrogate pair"),
  (*_score(solution="y" * 10_000_000), 413, "solution 0 has 10000000 characters; at most 100000"),
  (*_score(solution="y" * 17_000_000), 413, "the body is larger than 16777216 bytes"),
  (*_score(solution=["e"] * 5000), 413, "5000 solutions in one request; send at most 4096"),
  (*_score(num_votes=0), 400, "num_votes is 0; expected an integer from 1 to 256"),
  (*_score(num_votes=True), 400, "num_votes is True"),
  (*_score(seed=2**31), 400, "seed is 2147483648"),
  (*_score(rationales=1), 400, "rationales is a number; expected true or false"),
  (*_score(votes=3), 400, "unknown field 'votes'; the fields are question, solution"),
  ("/score", {"question": LONG[0], "solution": [*SOLUTIONS[:1], LONG[1]]}, 503, r"1 of 2 .* first 1: .* \(truncated\)"),
  ("/get_reward", {"query": ["ab"], "prompts": ["b"]}, 400, "query 0 does not begin with its prompt"),
  ("/get_reward", {"query": ["ab"], "prompts": []}, 400, "query has 1 texts, prompts 0"),
  ("/get_reward", {"query": "ab", "prompts": ["a"]}, 400, "query is a text; expected a list"),
  ("/get_reward", {"prompt": 3, "response": "a"}, 400, "prompt is a number; expected a text or a list of messages"),
  ("/get_reward", {"prompt": "a"}, 400, "expected .*OpenRLHF.* or .*slime"),
  ("/get_reward", {"prompt": LONG[0], "response": LONG[1]}, 503, "no score for 1 of 1 .*truncated"),
  (*_chat(n=0), 400, "n is 0; expected an integer from 1 to 256"),
  (*_chat(n=10_000), 400, "n is 10000"),
  (*_chat(model="gpt"), 404, "no model 'gpt' here; the model is 'genrm_cot'"),
  (*_chat(messages=[{"role": "user", "content": "a"}]), 400, r"roles \['user'\]; expected a user turn"),
  (*_chat(messages="a"), 400, "messages is a text"),
  (*_chat(messages=[{"role": "user", "content": 3}, {"role": "assistant"}]), 400, "the content of a turn is a number"),
  (*_chat(top_logprobs=2), 400, "true for top_logprobs"),
  (*_chat(logprobs=True, top_logprobs=21), 400, "top_logprobs is 21"),
  (*_chat(stream=True), 400, "'stream' must be false or left out"),
  (*_chat(temperature=0.5), 400, "'temperature' must be 0.7 or left out, not 0.5"),
  (*_chat(tools=[]), 400, "'tools' is not supported"),
  ("/nowhere", {}, 404, "Not Found"),
]


def test_bad_bodies_get_one_status_and_one_message(cot):
  url, verifier = cot
  for path, body, status, message in BAD:
    code, reply = serving.post(url + path, body)
    assert code == status and re.search(message, reply["error"]["message"]), (path, code, reply)
    assert reply["error"]["code"] == status and len(reply["error"]["message"]) < 400
    if code == 503:
      scores = reply.get("scores", [None])
      assert scores[-1] is None and reply["error"]["states"][-1] == ["truncated"] * 2
      assert scores[:-1] == pytest.approx(verifier.score_many(PAIRS[:1])[: len(scores) - 1], rel=1e-5)
  assert serving.post(f"{url}/score", {"question": [], "solution": []})[1]["scores"] == []


def test_a_text_that_the_tokenizer_cannot_express_is_refused_and_others_are_not(verifiers):
  with serving.server(verifiers["genrm"]) as (url, _):
    status, reply = serving.post(f"{url}/score", {"question": "mike", "solution": ["e", "é"]})
    assert status == 400 and re.search("solution 1: the char tokenizer has no 'é'", reply["error"]["message"])
    status, reply = serving.post(f"{url}/score", {"question": "mike", "solution": ["e"]})
    assert (status, reply["scores"]) == (200, pytest.approx(verifiers["genrm"].score_many([("mike", "e")]), rel=1e-5))


class Held(DirectBatches):
  """Waits for `go` before it computes; `fails` are raised first."""

  def __init__(self, trained, go, fails):
    super().__init__(trained)
    self.go, self.fails = go, fails

  room = 1

  def advance(self):
    self.go.wait()
    if self.fails:
      raise self.fails.pop()
    return super().advance()


def test_full_queue_deadline_hang_up_and_a_failure_lose_nothing(verifiers, capsys):
  verifier, go, fails = verifiers["genrm"], threading.Event(), []
  limits = Limits(max_waiting=2, timeout_s=2.0)
  with serving.server(verifier, limits, make=lambda trained: Held(trained, go, fails)) as (url, scorer):

    def ask(solution):
      return serving.post(f"{url}/score", {"question": "mike", "solution": solution})

    assert ask("e")[0] == 504 and (scorer.num_running, scorer.num_waiting) == (1, 0), "what has begun goes on"
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
      body = json.dumps({"question": "mike", "solution": ["a", "b"]})
      client.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
      processes.wait_for(lambda: scorer.num_waiting == 2)
      status, reply = ask("c")
      assert status == 429 and reply["error"]["message"].startswith("the queue is full (2 solutions at most)")
    processes.wait_for(lambda: scorer.num_waiting == 0)  # the client has hung up
    go.set()
    processes.wait_for(lambda: scorer.num_running == 0)
    assert ask("e") == (200, {**ask("e")[1], "score": pytest.approx(verifier.score("mike", "e"), rel=1e-5)})
    assert scorer.num_scored == 1, "the result was kept"
    fails.append(RuntimeError("out of memory"))
    assert ask("d") == (
      500,
      {"error": {"message": "the server failed; its log says why", "type": "server_error", "code": 500}},
    )
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert ask("d")[1]["score"] == pytest.approx(verifier.score("mike", "d"), rel=1e-5)
    assert 'status="499"} 1' in serving.get(f"{url}/metrics")


def test_a_token_stands_in_a_header_or_in_the_path(verifiers):
  body = {"prompt": "mike", "response": "e"}
  with serving.server(verifiers["genrm"], pattern=r"Q: (.*?)\nA:", token=TOKEN) as (url, _):
    refused = [
      serving.post(f"{url}/get_reward", body),
      serving.post(f"{url}/{TOKEN[:-1]}/get_reward", body),
      serving.post(f"{url}/get_reward", body, Authorization=f"Bearer {TOKEN}x"),
      serving.post(f"{url}/get_reward", body, Authorization=TOKEN),
    ]
    assert [status for status, _ in refused] == [401] * 4 and TOKEN[:-1] not in json.dumps(refused)
    assert json.loads(serving.get(f"{url}/healthz"))["status"] == "ok"
    asked = {"prompt": "<user>Q: mike\nA:", "response": "e<end_of_turn>\n"}
    for status, reply in (
      serving.post(f"{url}/{TOKEN}/get_reward", asked),
      serving.post(f"{url}/get_reward", asked, Authorization=f"Bearer {TOKEN}"),
    ):
      assert (status, reply) == (200, pytest.approx(verifiers["genrm"].score("mike", "e"), rel=1e-5))
    status, reply = serving.post(f"{url}/{TOKEN}/get_reward", body)
    assert status == 400 and reply["error"]["message"] == "no question in the prompt 'mike', by --question_pattern"
  with serving.server(verifiers["genrm"]) as (url, _):
    assert serving.post(f"{url}/{TOKEN}/get_reward", body)[0] == 404


SERVE = ["-c", "from genrm_jax.pipeline.cli import console; console()", "serve"]
DOCS = processes.ROOT / "docs" / "serving.md"


def _wait_for_url(process):
  for line in process.stderr:
    if found := re.search(r"http://127\.0\.0\.1:\d+", line):
      return found[0]
  pytest.fail("the server ended early")


def test_the_command_serves_the_documented_examples_and_sigterm_finishes_what_runs(paths, verifiers):
  pytest.importorskip("openai")
  command = [*SERVE, f"--checkpoint={paths['genrm_cot']}", "--port=0", "--num_votes=3"]
  process, exposed = processes.start([command, [*command, "--host=0.0.0.0"]])
  try:
    url = _wait_for_url(process)
    examples = re.findall(r"```(bash|python)\n(.*?)```", DOCS.read_text().partition("## Start")[2], re.DOTALL)
    outputs = []
    for language, code in examples:
      code = code.replace("http://127.0.0.1:8000", url)
      words = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
      done = processes.subprocess.run(words, capture_output=True, text=True, timeout=120)
      assert done.returncode == 0, (code, done.stdout, done.stderr)
      outputs.append(done.stdout)
    question, solution = re.search(r'"question": "(.*?)", "solution": "(.*?)"', DOCS.read_text()).groups()
    want = pytest.approx(verifiers["genrm_cot"].score(question, solution, num_votes=3), rel=1e-5)
    assert json.loads(outputs[0])["score"] == want and len(outputs) >= 4
    # 40 solutions take long enough to be running when the signal comes.
    body = {"question": question, "solution": [f"{solution} {i}" for i in range(40)]}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      reply = pool.submit(serving.post, f"{url}/score", body)
      processes.wait_for(lambda: "genrm_running 0" not in serving.get(f"{url}/metrics") or reply.done())
      assert not reply.done()
      process.send_signal(signal.SIGTERM)
      status, scores = reply.result()
    assert status == 200 and len(scores["scores"]) == 40 and None not in scores["scores"]
    assert process.wait(60) == 0
    ((code, out, err),) = processes.finish([exposed])
    assert (code, out) == (1, "") and re.search(r"^error: --host=0.0.0.0 can be reached .*\n\Z", err)
  finally:
    for started in (process, exposed):
      started.kill()
    process.communicate()


def test_settings_that_cannot_be_are_refused(monkeypatch):
  assert all(server.check_token("", host) == "" for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"))
  assert server.check_token(TOKEN, "0.0.0.0") == TOKEN and server.check_pattern(None) is None
  with socket.create_server(("127.0.0.1", 0)) as taken:
    refused(
      *(
        (r"set GENRM_JAX_TOKEN to a secret", server.check_token, "", host) for host in ("0.0.0.0", "::", "my.host", "")
      ),
      *(("GENRM_JAX_TOKEN must be 16 or more", server.check_token, t, "127.0.0.1") for t in (TOKEN[1:], f"{TOKEN}/")),
      ("has 0 groups; mark the question by one", server.check_pattern, "Q:"),
      ("no regular expression: missing", server.check_pattern, "(Q:"),
      ("cannot listen on 127.0.0.1, port", server.bound, "127.0.0.1", taken.getsockname()[1]),
    )
  monkeypatch.setitem(sys.modules, "starlette.applications", None)
  refused((r"\(starlette.applications\): pip install 'genrm-jax\[serve\]'", server.check_packages))


def test_nothing_is_printed_about_batches(cot, capsys):
  url, _ = cot
  assert serving.post(f"{url}/score", {"question": "mike", "solution": f"e {time.time()} {os.getpid()}"})[0] == 200
  assert capsys.readouterr() == ("", "")
