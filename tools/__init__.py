"""Command-line programs beside training: python -m tools.NAME --help."""
