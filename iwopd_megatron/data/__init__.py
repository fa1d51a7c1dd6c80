"""Problems: read from people's files, filtered, encoded as prompts and put in an order.

In come the recipe's data section and a tokenizer; out goes a `RunData`: what a run trains on
and is evaluated on, or one sentence about the first row that cannot be used.
"""

__all__ = [
    "before_start",
    "benchmarks",
    "problems",
    "prompts",
    "run_data",
    "sources",
    "training_set",
]
