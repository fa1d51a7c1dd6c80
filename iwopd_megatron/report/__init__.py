"""Runs as one self-contained page: tables, charts and the finding in words.

In come run folders; out go report.html, its figures as PNG files, summary.json, and a table for the
terminal.
"""

__all__ = ["data", "page", "summary", "terminal"]
