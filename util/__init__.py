"""What scripts, engines and tools share."""

__version__ = "0.2.0"
