"""Data sets: finding the files (folders, lists), samples and shots (medical_few, fewshot), reading images (readers).

`python -m dataset.check` examines a data set before any training, `python -m dataset.phantom` draws a synthetic one.
"""
