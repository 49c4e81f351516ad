"""The one exception that stands for a user's mistake."""


class UserError(Exception):
  """Bad input: a wrong path, a malformed line, an unknown name, a run made by another config.

  The message names the thing, the place and the remedy. Commands print it without a traceback and exit with 1.
  """
