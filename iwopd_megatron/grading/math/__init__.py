"""grading.math."""
