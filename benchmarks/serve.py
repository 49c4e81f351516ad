"""The reward server under load: requests per second and latency, and what it makes of bad requests and hang-ups.

    python benchmarks/serve.py --checkpoint=PATH [--requests=256] [--num-votes=K]
    python benchmarks/serve.py --checkpoint=PATH --soak=100000

Without --soak: one solution per request, from 1, 8 and 64 clients that each wait for their reply before they ask
again. All solutions differ. The last column compares with `score_many` on as many solutions in one call.

With --soak: requests of 16 clients, of which 5% are malformed and 5% hang up without reading the reply. Solutions
repeat, so every score is compared with that of `score_many`. It ends with exit code 1 if a reply is lost or wrong.
"""

import argparse
import dataclasses
import http.client
import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import genrm_jax

CLIENTS = (1, 8, 64)
BAD = ((b"{", 400), (b'{"question": 1}', 400), (b'{"question": "a", "solution": "b", "num_votes": 0}', 400))
NUM_DISTINCT = 200  # solutions of a soak


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, tuple[str, int]]:
  """Starts a server in another process; returns the process and the address."""
  code = "from genrm_jax.pipeline.cli import console; console()"
  options = [f"--checkpoint={args.checkpoint}", "--port=0", f"--rows_per_batch={args.rows}"]
  options += [f"--num_votes={args.num_votes}"] if args.num_votes else []
  process = subprocess.Popen([sys.executable, "-c", code, "serve", *options], stderr=subprocess.PIPE, text=True)
  for line in process.stderr:
    if found := re.search(r"http://([\d.]+):(\d+)", line):
      threading.Thread(target=lambda: [sys.stderr.write(more) for more in process.stderr], daemon=True).start()
      return process, (found[1], int(found[2]))
    sys.stderr.write(line)
  sys.exit("the server did not start")


def ask(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, dict]:
  connection.request("POST", "/score", body)
  reply = connection.getresponse()
  return reply.status, json.loads(reply.read())


def body_of(question: str, solution: str) -> bytes:
  return json.dumps({"question": question, "solution": solution}).encode()


def metric(address: tuple[str, int], name: str) -> float:
  connection = http.client.HTTPConnection(*address)
  connection.request("GET", "/metrics")
  return float(re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)[1])


def load_test(args: argparse.Namespace, address: tuple[str, int], pairs: list[tuple[str, str]], offline: float) -> None:
  print(f"{'clients':>8} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8} {'of offline':>11}")
  per_run = args.requests
  for run, num_clients in enumerate(CLIENTS):
    todo = iter(pairs[run * per_run : (run + 1) * per_run])
    lock, seconds = threading.Lock(), []

    def client(todo=todo, lock=lock, seconds=seconds) -> None:
      connection = http.client.HTTPConnection(*address)
      while True:
        with lock:
          pair = next(todo, None)
        if pair is None:
          return
        begin = time.monotonic()
        status, reply = ask(connection, body_of(*pair))
        if status != 200:
          raise SystemExit(f"HTTP {status}: {reply}")
        seconds.append(time.monotonic() - begin)

    begin = time.monotonic()
    with ThreadPoolExecutor(num_clients) as pool:
      for done in [pool.submit(client) for _ in range(num_clients)]:
        done.result()
    speed = per_run / (time.monotonic() - begin)
    p50, p99 = 1000 * np.quantile(seconds, (0.5, 0.99))
    print(f"{num_clients:8} {speed:11.2f} {p50:8.0f} {p99:8.0f} {speed / offline:11.0%}", flush=True)


def soak(args: argparse.Namespace, address: tuple[str, int], pairs: list[tuple[str, str]], want: list[float]) -> None:
  """Raises SystemExit if any reply is lost or wrong."""
  counts, lock = {"scored": 0, "refused": 0, "hung up": 0, "lost": 0, "wrong": 0}, threading.Lock()
  numbers, num_clients = itertools.count(), 16
  memory = [metric(address, "genrm_peak_memory_bytes")]

  def count(what: str) -> None:
    with lock:
      counts[what] += 1

  def client(seed: int) -> None:
    rng, connection = np.random.default_rng(seed), http.client.HTTPConnection(*address, timeout=300)
    while next(numbers) < args.soak:
      kind, i = rng.random(), int(rng.integers(len(pairs)))
      body, status = (body_of(*pairs[i]), 200) if kind > 0.05 else BAD[rng.integers(len(BAD))]
      if 0.05 < kind < 0.1:
        with socket.create_connection(address) as hasty:
          hasty.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        count("hung up")
        continue
      try:
        found, reply = ask(connection, body)
      except (OSError, http.client.HTTPException) as e:
        print(f"lost: {e!r}", file=sys.stderr)
        count("lost")
        connection = http.client.HTTPConnection(*address, timeout=300)
        continue
      is_right = found == status and (status != 200 or np.isclose(reply["score"], want[i], rtol=1e-4))
      count(("refused", "scored")[status == 200] if is_right else "wrong")

  begin = time.monotonic()
  with ThreadPoolExecutor(num_clients) as pool:
    clients = [pool.submit(client, seed) for seed in range(num_clients)]
    while not all(c.done() for c in clients):
      time.sleep(1)
      memory.append(metric(address, "genrm_peak_memory_bytes"))
  for done in clients:
    done.result()
  print(f"{sum(counts.values())} requests in {time.monotonic() - begin:.0f} s: {counts}")
  print("peak memory in MiB, at start, a quarter, half, end: ", end="")
  print([round(memory[int(q * (len(memory) - 1))] / 2**20) for q in (0, 0.25, 0.5, 1)])
  if counts["lost"] or counts["wrong"]:
    raise SystemExit(1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--num-votes", type=int)
  parser.add_argument("--rows", type=int, default=32, help="sequences in the model at a time")
  parser.add_argument("--requests", type=int, default=256, help="per number of clients")
  parser.add_argument("--question", default="1mike2dan;", help="what all solutions answer")
  parser.add_argument("--letters", default="EnDa12", help="what solutions are made of; the tokenizer must know them")
  parser.add_argument("--soak", type=int, default=0, help="requests of a soak test instead")
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  number = NUM_DISTINCT if args.soak else args.requests * (len(CLIENTS) + 1)
  texts = dict.fromkeys("".join(rng.choice(list(args.letters), size=rng.integers(8, 24))) for _ in range(2 * number))
  pairs = [(args.question, text) for text in list(texts)[:number]]
  # Offline first, and alone: the server would share the processor.
  verifier = genrm_jax.load(args.checkpoint, rows_per_batch=args.rows)
  if args.num_votes:
    verifier = dataclasses.replace(verifier, how=dataclasses.replace(verifier.how, num_votes=args.num_votes))
  offline = pairs if args.soak else pairs[-args.requests :]
  verifier.score_many(offline)  # compiles
  begin = time.monotonic()
  want = verifier.score_many(offline)
  speed = len(offline) / (time.monotonic() - begin)
  del verifier
  process, address = start(args)
  try:
    if args.soak:
      soak(args, address, pairs, want)
    else:
      print(f"offline: {speed:.2f} solutions/s")
      connection = http.client.HTTPConnection(*address)
      for size in (1, 4, 16, len(offline)):  # compiles
        questions, solutions = zip(*offline[:size], strict=True)
        ask(connection, json.dumps({"question": questions, "solution": solutions, "seed": size}).encode())
      load_test(args, address, pairs, speed)
  finally:
    process.terminate()
    print(f"exit code of the server after SIGTERM: {process.wait(120)}")


if __name__ == "__main__":
  main()
