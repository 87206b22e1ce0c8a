"""The old name of dataset.images, for callers that are not rewritten yet."""

from .images import *  # noqa: F403
