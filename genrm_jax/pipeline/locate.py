"""Finds configs and assets of the installed `experiments` package from any current folder."""

import ast
import importlib.util
import pathlib

from genrm_jax.runtime.errors import UserError

_CONFIGS = "experiments/configs/"
_ASSETS = "experiments/assets/"


def config_path(text: str) -> str:
  """Resolves `--config` to FILE.py:VARIANT.

  Args:
    text: FILE.py:VARIANT or NAME:VARIANT; the variant is optional. An existing FILE.py takes precedence. Otherwise
      NAME or experiments/configs/NAME.py means a config of the installed package.

  Raises:
    UserError: neither a file nor a config has that name.
  """
  name, colon, variant = text.partition(":")
  if pathlib.Path(name).is_file():
    return text
  known = _packaged_configs()
  key = name.removeprefix(_CONFIGS).removesuffix(".py")
  if key in known and (name in (key, f"{_CONFIGS}{key}.py")):
    return f"{known[key]}{colon}{variant}"
  raise UserError(f"--config={text}: no such file or config; give FILE.py:VARIANT or one of {', '.join(sorted(known))}")


def asset_path(text: str) -> str:
  """Resolves experiments/assets/... to the installed package unless it exists locally; other paths are unchanged."""
  if not text.startswith(_ASSETS) or pathlib.Path(text).exists():
    return text
  packaged = experiments_folder() / text.removeprefix("experiments/")
  return str(packaged) if packaged.exists() else text


def experiments_folder() -> pathlib.Path:
  """The folder of the `experiments` package, which the lower layers must not import."""
  spec = importlib.util.find_spec("experiments")
  if spec is None or spec.origin is None:
    raise UserError("the package `experiments` is not installed; run pip install in a clone of genrm-jax")
  return pathlib.Path(spec.origin).parent


def _packaged_configs() -> dict[str, pathlib.Path]:
  """Config files by name: those that define `get_config(variant)`."""
  return {path.stem: path for path in (experiments_folder() / "configs").glob("*.py") if _is_config(path)}


def _is_config(path: pathlib.Path) -> bool:
  functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
  return any(f.name == "get_config" and [a.arg for a in f.args.args] == ["variant"] for f in functions)
