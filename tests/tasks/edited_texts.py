"""Texts near a given one, for property tests of what reads and verifies solutions."""

from hypothesis import strategies as st


def edited(text, *, characters="", texts=None):
  """The text itself; characters replaced, inserted or missing; cut short; continued; or anything."""
  at = st.integers(0, len(text))
  char = st.sampled_from(characters) | st.characters() if characters else st.characters()
  return st.one_of(
    st.just(text),
    st.builds(lambda i, c: text[:i] + c + text[i + 1 :], at, char),
    st.builds(lambda i, c: text[:i] + c + text[i:], at, char),
    st.builds(lambda i, n: text[:i] + text[i + n :], at, st.integers(1, 4)),
    st.builds(lambda i: text[:i], at),
    st.builds(lambda s: text + s, st.text(max_size=5)),
    st.text(max_size=15),
    *([] if texts is None else [texts]),
  )
