"""A Hugging Face hub on loopback that serves folders as models, for `huggingface_hub` to download."""

import contextlib
import functools
import hashlib
import http.server
import json
import pathlib
import re
import threading

REVISION = "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers what downloading asks for; `hub` has the folders, the gated models and the paths asked for."""

  def __init__(self, hub, *args):
    self.hub = hub
    super().__init__(*args)

  def log_message(self, *args):
    pass

  def do_GET(self):
    self.hub.requests.append(f"{self.command} {self.path}")
    asked = re.fullmatch(
      r"/(?:api/models/)?([^/]+/[^/?]+)(?:/(resolve|tree|revision)/([^/?]+)(?:/([^?]+))?)?(?:\?.*)?", self.path
    )
    name, what, _, file = asked.groups() if asked else ("", None, None, None)
    folder = self.hub.folders.get(name)
    if folder is None:
      return self._send(401, {"error": "Invalid"}, {"X-Error-Code": "RepoNotFound"})
    if name in self.hub.gated and self.headers.get("Authorization") != "Bearer right" and what == "resolve":
      return self._send(401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
    files = {p.name: 1 << 50 if name in self.hub.vast else p.stat().st_size for p in folder.iterdir()}
    if what in (None, "revision"):
      siblings = [{"rfilename": file, "size": size} for file, size in files.items()]
      return self._send(200, {"id": name, "modelId": name, "sha": REVISION, "siblings": siblings})
    if what == "tree":
      listed = [{"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in files.items()]
      return self._send(200, listed)
    if file not in files:
      return self._send(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
    data = (folder / file).read_bytes()
    return self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": REVISION})

  do_HEAD = do_GET

  def _send(self, status, content, headers=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)


class Hub:
  """`folders` by model name; those in `gated` need the token "right", and files of those in `vast` are a pebibyte."""

  def __init__(self, folders: dict[str, pathlib.Path], gated=(), vast=()):
    self.folders, self.gated, self.vast, self.requests = folders, gated, vast, []

  @contextlib.contextmanager
  def serve(self):
    """Yields the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()
      server.server_close()
