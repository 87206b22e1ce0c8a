"""What is on disk: the flags and settings, the run's folder, the checkpoint, and the published format of one.

Nothing here trains or scores; what this program wrote itself is trusted.
"""
