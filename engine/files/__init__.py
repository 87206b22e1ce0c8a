"""Files and flags: settings, the folder of a run, checkpoints, and the published checkpoint format.

Nothing here trains or scores. Files that this program wrote itself are trusted.
"""
