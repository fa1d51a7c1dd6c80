"""grading.code."""
