"""Searches traced programs."""

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
  """All equations, including those inside scans and calls."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def products(jaxpr: Any) -> list[Any]:
  """All matrix products."""
  return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]
