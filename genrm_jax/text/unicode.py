"""Valid Unicode: a Python string may hold half of a surrogate pair, which no encoding can express."""


def half_pair(text: str) -> str:
  """What is wrong with a text that is not valid Unicode, and the remedy; "" for a valid one."""
  try:
    text.encode()
  except UnicodeEncodeError as e:
    half = text[e.start]
    return f"half of a surrogate pair, {half!r}, at character {e.start}; this is invalid Unicode; remove it"
  return ""
