"""Searches traced programs, and counts what JAX compiles."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def products(jaxpr: Any) -> list[Any]:
  return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


@contextlib.contextmanager
def compilations():
  """Yields how often each function has been lowered since."""
  counts: collections.Counter[str] = collections.Counter()

  def listen(event, seconds, **kwargs):
    if event.endswith("/jaxpr_to_mlir_module_duration"):
      counts[kwargs["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield counts
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
