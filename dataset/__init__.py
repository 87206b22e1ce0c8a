"""Data sets: where they lie (layout), samples and shots (medical_few, fewshot), the one reader of pictures (readers).

`python -m dataset.check` examines one before any training, `python -m dataset.phantom` draws one.
"""
