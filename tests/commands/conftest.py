"""Fixtures of several command tests."""

from sample_commands import adapter

__all__ = ["adapter"]
