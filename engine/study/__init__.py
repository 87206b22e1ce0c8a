"""The paper's tables: their cells, the jobs that compute them, and the results as Markdown, CSV and LaTeX.

Nothing here computes a score: each cell is a run of train.py, test.py or the baselines.
"""
