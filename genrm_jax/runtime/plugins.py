"""Classes named in a config: one of the library's by its name, or a user's own by its import path."""

import importlib
from collections.abc import Mapping

from genrm_jax.runtime.errors import UserError


def load_class(spec: str, built_in: Mapping[str, str], what: str) -> type:
  """The class that `spec` names.

  Args:
    spec: a key of `built_in`, or "package.module:Class".
    built_in: name -> import path.
    what: the kind of thing, for messages.

  Raises:
    UserError: the name is unknown, the module does not import, or it has no such class.
  """
  path = built_in.get(spec, spec)
  module_name, _, class_name = path.partition(":")
  if not module_name or not class_name:
    raise UserError(
      f"unknown {what} {spec!r}; there are: {', '.join(built_in)}, or the import path of your own, "
      '"package.module:Class"'
    )
  try:
    module = importlib.import_module(module_name)
  except Exception as e:  # whatever the user's module raises while it is imported
    raise UserError(
      f"{what} {spec!r}: module {module_name} does not import ({type(e).__name__}: {e}); check the name, and that its "
      "folder is on PYTHONPATH"
    ) from e
  found = getattr(module, class_name, None)
  if not isinstance(found, type):
    classes = [n for n, value in vars(module).items() if isinstance(value, type) and value.__module__ == module_name]
    raise UserError(
      f"{what} {spec!r}: {module.__file__} has no class {class_name}; it has {', '.join(classes) or 'none'}"
    )
  return found
