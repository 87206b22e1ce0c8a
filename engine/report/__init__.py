"""Presentation of results: pictures, figures, report pages, W&B. The other modules of engine do not import it."""
