"""Google Cloud Storage on a local port: the emulator from PyPI plus features of the real service that it lacks.

Added: generations of objects in reads and as conditions of writes (for tensorstore), moving an object (for gcsfs),
buckets without access for writers or readers, and a record of all reads.
"""

import contextlib
import functools
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

_CLOSED_TO_READERS = {"private": 403, "closed": 401}
_OBJECT = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/]+)/o(?:/([^/]+)(?:/moveTo/o/([^/]+))?)?")


class Emulator(NamedTuple):
  """`environ` makes a process use the emulator for gs://. `reads` are names of objects with their Range headers."""

  environ: dict[str, str]
  reads: list[tuple[str, str | None]]


@contextlib.contextmanager
def running() -> Iterator[Emulator]:
  """Starts an empty emulator on a free loopback port."""
  storage = Storage(use_memory_fs=True)
  for name in ("bucket", "readonly", *_CLOSED_TO_READERS):
    buckets.create_bucket(name, storage)
  reads: list[tuple[str, str | None]] = []
  # Not threaded: checking a condition and writing the object must be atomic.
  httpd = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(_Handler, storage, reads))
  thread = threading.Thread(target=httpd.serve_forever)
  thread.start()
  url, nowhere = f"http://127.0.0.1:{httpd.server_address[1]}", "127.0.0.1:1"
  environ = {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "GOOGLE_CLOUD_PROJECT": "none",
    # No search for credentials on the network, no query for the type of the bucket.
    "NO_GCE_CHECK": "true",
    **dict.fromkeys(("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"), nowhere),
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "EPATH_USE_TF": "false",
  }
  try:
    yield Emulator(environ, reads)
  finally:
    httpd.shutdown()
    httpd.server_close()
    thread.join()


class _Handler(server.RequestHandler):
  def __init__(self, storage: Storage, reads: list[tuple[str, str | None]], *args) -> None:
    self.reads = reads
    super().__init__(storage, *args)

  def handle(self) -> None:
    with contextlib.suppress(ConnectionError):  # gcsfs requests object and folder at once, and drops one
      super().handle()

  def do_GET(self) -> None:
    bucket, name, _, query = self._parts()
    if bucket in _CLOSED_TO_READERS:
      self._answer(_CLOSED_TO_READERS[bucket])
      return
    if query.get("alt") == "media":
      self.reads.append((name, self.headers.get("Range")))
    super().do_GET()

  def do_POST(self) -> None:
    bucket, name, new_name, query = self._parts()
    wanted = query.get("ifGenerationMatch")
    if bucket == "readonly":
      self._answer(403)
    elif wanted is not None and wanted != self._generation(bucket, query["name"]):
      self._answer(412)
    elif new_name and self._generation(bucket, name) == "0":
      self._answer(404)
    elif new_name:
      moved = objects._copy("", self.storage, bucket, name, bucket, new_name)
      self.storage.delete_file(bucket, name)
      self._answer(200, moved)
    else:
      super().do_POST()

  def do_DELETE(self) -> None:
    bucket, name, _, query = self._parts()
    if bucket == "readonly":
      self._answer(403)
    elif query.get("ifGenerationMatch", self._generation(bucket, name)) != self._generation(bucket, name):
      self._answer(412)
    else:
      super().do_DELETE()

  def end_headers(self) -> None:
    bucket, name, _, query = self._parts()
    if self.command == "GET" and query.get("alt") == "media":
      self.send_header("X-Goog-Generation", self._generation(bucket, name))
    super().end_headers()

  def _parts(self) -> tuple[str, str, str, dict[str, str]]:
    """Bucket, object, new name and query of the request; "" where absent."""
    url = urllib.parse.urlsplit(self.path)
    match = _OBJECT.fullmatch(url.path)
    bucket, name, new_name = (urllib.parse.unquote(part or "") for part in match.groups()) if match else ("", "", "")
    return bucket, name, new_name, dict(urllib.parse.parse_qsl(url.query))

  def _generation(self, bucket: str, name: str) -> str:
    return self.storage.objects.get(bucket, {}).get(name, {}).get("generation", "0")

  def _answer(self, status: int, fields: object = None) -> None:
    self.rfile.read(int(self.headers.get("Content-Length") or 0))
    data = json.dumps(fields if fields is not None else {"error": {"code": status, "message": "refused"}}).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)
