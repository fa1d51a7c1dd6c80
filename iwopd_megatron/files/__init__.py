"""Files: those that people bring, those that a run writes, and a folder that one process may write.

In come paths; out go trees, rows and bytes, or one sentence that names file and line. Knows
nothing of models, recipes or training.
"""

__all__ = [
    "iterations",
    "jsonl",
    "lock",
    "outputs",
    "rawfile",
    "run_files",
    "shipped",
    "typed_json",
    "yaml_file",
]
