"""The paper's tables: which cells a table has, the jobs that compute them, and the figures as Markdown, CSV and LaTeX.

Nothing here computes a score: a cell is a run of train.py, test.py or the baselines.
"""
