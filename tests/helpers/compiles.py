"""Counts what JAX compiles."""

import collections
import contextlib

import jax


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
