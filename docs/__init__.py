"""The project's documentation; `python -m docs.generate` writes docs/flags.md from the code."""
