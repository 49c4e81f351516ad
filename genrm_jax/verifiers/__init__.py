"""Verifiers: prompts, training examples, losses and votes. One file per verifier; base.py holds the interface."""
