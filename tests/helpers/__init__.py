"""Helpers shared by tests: running commands, small models, images, scans, weight files and evaluations."""
