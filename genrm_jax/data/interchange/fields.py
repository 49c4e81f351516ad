"""Fields of rows in other tools' formats, checked: a UserError names the place and the field."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from genrm_jax.data.interchange.containers import Place
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.statements import last_box
from genrm_jax.text.unicode import half_pair

Fields = Mapping[str, Any]
_MAX_ANSWER_CHARACTERS = 10_000
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class Unusable(NamedTuple):
  """Stands for a solution that cannot be used."""

  why: str


EMPTY = Unusable("empty solution")


def wrong(name: str, value: Any, wanted: str, place: Place) -> UserError:
  return UserError(f'{place}: field "{name}" is {value!r:.60}, expected {wanted}; correct it')


def keys_of(row: Fields) -> str:
  """The keys of a row for a message, at most 200 characters."""
  return f"{list(row)!r:.200}"


def text_of(row: Fields, names: Sequence[str], place: Place, within: str = "") -> str:
  """The first of the fields that the row has: a text that is not empty, and valid Unicode."""
  name = next((name for name in names if name in row), names[0])
  if name not in row:
    raise UserError(f'{place}: no field "{within}{name}"; there are {keys_of(row)}')
  value = row[name]
  if not isinstance(value, str) or not value.strip():
    raise wrong(within + name, value, "a string that is not empty", place)
  return valid(value, within + name, place)


def valid(text: str, name: str, place: Place) -> str:
  if fault := half_pair(text):
    raise UserError(f'{place}: field "{name}" has {fault}')
  return text


def solutions_of(values: Sequence[Any], name: str, place: Place) -> tuple[str | Unusable, ...]:
  for value in values:
    if not (value is None or isinstance(value, str)):
      raise wrong(name, value, "a string", place)
  return tuple(valid(value, name, place) if value and value.strip() else EMPTY for value in values)


def list_of(row: Fields, name: str, place: Place) -> list[Any]:
  if not isinstance(row.get(name), list):
    raise wrong(name, row.get(name), "a list", place)
  return row[name]


def object_of(row: Fields, name: str, place: Place) -> dict[str, Any]:
  if not isinstance(row.get(name), dict):
    raise wrong(name, row.get(name), "an object", place)
  return row[name]


def identity_of(value: Any, name: str, place: Place) -> str:
  if type(value) not in (int, str):
    raise wrong(name, value, "a number or a string", place)
  return valid(str(value), name, place)


def label_of(row: Fields, name: str, place: Place) -> bool | None:
  """True or false, also as a number or a string; None if the row does not say."""
  value = row.get(name)
  if value is None:
    return None
  found = _LABELS.get(str(value).lower()) if type(value) in (bool, int, float, str) else None
  if found is None:
    raise wrong(name, value, "true or false", place)
  return found


def answer_of(value: Any, place: Place) -> tuple[str, str]:
  r"""The right answer and a worked solution, "" where unknown: the text itself, or what follows #### or is boxed in it.

  "72" -> ("72", "")      "48 + 24 = 72\n#### 72" -> ("72", all of it)      "so $\boxed{7}$." -> ("7", all of it)
  """
  if value is None:
    return "", ""
  if isinstance(value, list) and len(value) == 1:
    (value,) = value
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if type(value) not in (str, int, float):
    raise wrong("answer", value, "a string or a number", place)
  text = valid(str(value), "answer", place).strip()
  if "####" in text:
    return text.rpartition("####")[2].strip(), text
  box = last_box(text, _MAX_ANSWER_CHARACTERS)
  return (box.content.strip(), text) if box and box.content else (text, "")


def last_user(messages: Any, place: Place) -> str:
  """The last user message of a chat, of which the content may be in parts."""
  if isinstance(messages, str) and messages.strip():
    return valid(messages, "prompt", place)
  if isinstance(messages, list):
    for message in reversed(messages):
      if isinstance(message, dict) and message.get("role") == "user":
        content = message.get("content")
        if isinstance(content, list):
          content = "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
        return text_of({"content": content}, ("content",), place, "the user message's ")
  raise wrong("prompt", messages, "a chat with a user message", place)
