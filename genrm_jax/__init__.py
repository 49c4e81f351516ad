"""Generative verifiers (GenRM, arXiv 2408.15240) in JAX."""

__version__ = "0.1.0"
