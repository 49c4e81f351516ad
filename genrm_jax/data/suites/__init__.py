"""Suites on which verifiers are measured: rows as their authors publish them, and the figures they report."""
