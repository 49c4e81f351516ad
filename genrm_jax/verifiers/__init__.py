"""Verifiers: how each one asks, what it is trained on, its loss and its votes. See base.py; one file per verifier."""
