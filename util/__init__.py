"""Shared code of the scripts, engines and tools."""

__version__ = "0.2.0"
