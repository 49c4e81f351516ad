"""Systematic changes to files: each reads as before or is refused in one message, and nothing is written."""

import collections
import json

import numpy as np

from genrm_jax.runtime.errors import UserError

DEEP = "[" * 100_000 + "]" * 100_000
# JSON texts of every kind, for places that hold another.
VALUES = [
  *("null", "true", '""', '"2"', '"../x"', "-1", "0", "1.5", "NaN", "Infinity", "1e999", str(10**9), "9" * 400),
  *("[]", "[[]]", "[1, 2]", "{}", '{"a": 1}', DEEP),
]


class Sweep:
  """Counts what becomes of changed copies of a folder.

  Args:
    folder: the copy that is changed, and restored after every change.
    load: reads it; returns the parameters in it as a dict of arrays, or anything if not `same`.
    same: whether what is read must be as it was before the change.
  """

  def __init__(self, folder, load, same=True):
    self.folder, self.load, self.want, self.counts = folder, load, load(folder), collections.Counter()
    self.same = same

  def try_(self, what, change):
    """`change(path of the file `what`)`, then a load; then all is as before."""
    path = self.folder / what
    before = path.read_bytes()
    change(path)
    state = _listing(self.folder)
    try:
      got = self.load(self.folder)
    except UserError as e:
      self.counts["refused"] += 1
      assert len(str(e)) < 2000 and ("\n" not in str(e) or "made by something else" in str(e)), (what, str(e))
    else:
      self.counts["loaded"] += 1
      assert not self.same or got.keys() == self.want.keys()
      for name, array in self.want.items() if self.same else ():
        np.testing.assert_array_equal(got[name], array, strict=True)
    finally:
      assert _listing(self.folder) == state, "written"
      if path.is_dir():
        path.rmdir()
      path.write_bytes(before)

  def files(self, what):
    """The file is gone, empty, cut, replaced by a folder, or no text."""
    size = (self.folder / what).stat().st_size
    for change in (
      lambda path: path.unlink(),
      lambda path: (path.unlink(), path.mkdir()),
      *(lambda path, n=n: path.write_bytes(path.read_bytes()[:n]) for n in (0, 1, 7, 8, 9, size // 2, size - 1)),
      *(lambda path, text=text: path.write_text(text) for text in ("[]", "null", '"x"', "3", "{}", DEEP)),
      lambda path: path.write_bytes(b"\xff\xfe\0" * 50),
      lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ):
      self.try_(what, change)

  def bits(self, what, places):
    """One bit is flipped."""

    def flip(path, place, bit):
      data = bytearray(path.read_bytes())
      data[place] ^= 1 << bit
      path.write_bytes(data)

    for i, place in enumerate(places):
      self.try_(what, lambda path, place=place, bit=i % 8: flip(path, place, bit))

  def values(self, what, decode=json.loads, encode=lambda text: text.encode(), keep=lambda keys: True, every=1):
    """Each value of a JSON file is removed, or replaced by one after another of VALUES."""
    content = decode((self.folder / what).read_bytes())
    for i, keys in enumerate(filter(keep, _places(content))):
      for value in (None, *VALUES)[i % every :: every]:
        text = _replaced(content, keys, value)
        self.try_(what, lambda path, text=text: path.write_bytes(encode(text)))


def _listing(folder):
  return {p: (p.is_dir(), p.stat().st_mtime_ns) for p in folder.rglob("*")}


def _places(content, keys=()):
  """The keys of every value in JSON, but in a list only those of the first two."""
  pairs = content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
  for key, value in pairs:
    yield (*keys, key)
    yield from _places(value, (*keys, key))


def _replaced(content, keys, value):
  """JSON in which the value at some keys is another JSON text, or removed if that is None."""
  copy = json.loads(json.dumps(content))
  inner = copy
  for key in keys[:-1]:
    inner = inner[key]
  if value is None:
    del inner[keys[-1]]
    return json.dumps(copy)
  inner[keys[-1]] = "<here>"
  return json.dumps(copy).replace('"<here>"', value)
