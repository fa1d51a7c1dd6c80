"""Runs as one self-contained page: tables, charts and the finding in words.

In come run folders; out go report.html, its figures as PNG files and summary.json.
"""

__all__ = ["data", "page", "summary", "terminal"]
