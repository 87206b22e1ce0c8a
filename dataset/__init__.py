"""Data sets: where they lie (folders, lists), samples and shots (medical_few, fewshot), readers of pictures (readers).

`python -m dataset.check` examines one before any training, `python -m dataset.phantom` draws one.
"""
