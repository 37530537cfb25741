"""Completions and what is thought of them: judges."""
