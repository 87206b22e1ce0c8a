"""Tests, imported as packages so that they can share helpers."""
