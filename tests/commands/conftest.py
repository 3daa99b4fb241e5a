"""What several tests of commands ask for."""

from sample_commands import adapter

__all__ = ["adapter"]
