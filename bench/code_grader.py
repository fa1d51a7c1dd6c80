"""EvalPlus's own file against the code grader: every canonical solution has to pass, and to fail
once it answers a single input wrongly. `python bench/code_grader.py MbppPlus.jsonl [problems]`
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from iwopd_megatron.grading import grade
from iwopd_megatron.grading_pool import Answer

MUTANT = """
{code}

_right, _calls = {name}, 0

def {name}(*arguments):
    global _calls
    _calls += 1
    value = _right(*arguments)
    if _calls != {place}:
        return value
    return None if value is not None else 0
"""


def mutant(row: dict, kind: str) -> str:
    """The canonical solution, wrong on the last input of `kind` and before it right.

    Base and plus tests run in separate processes, so a wrong n-th call is wrong in whichever has n.
    """
    code = row["prompt"] + row["canonical_solution"]
    return MUTANT.format(code=code, name=row["entry_point"], place=len(row[kind]))


def main() -> None:
    answers = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    answers = answers[: int(sys.argv[2]) if len(sys.argv) > 2 else None]
    rows = [json.loads(answer) for answer in answers]
    programs = {
        "canonical": [row["prompt"] + row["canonical_solution"] for row in rows],
        "wrong on the last base input": [mutant(row, "base_input") for row in rows],
        "wrong on the last plus input": [mutant(row, "plus_input") for row in rows],
    }
    result = {"problems": len(rows)}
    print(f"{'program':32} {'pass':>6} {'of':>5} {'s':>7}")
    for name, codes in programs.items():
        start = time.perf_counter()
        grades = grade([
            Answer("code", f"```python\n{code}\n```", answer)
            for code, answer in zip(codes, answers, strict=True)
        ])  # fmt: skip
        print(f"{name:32} {sum(grades):6.0f} {len(grades):5} {time.perf_counter() - start:7.1f}")
        unexpected = [
            row["task_id"]
            for row, right in zip(rows, grades, strict=True)
            if right != (name == "canonical")
        ]
        if unexpected:
            print(f"  not as expected: {', '.join(unexpected)}")
        result[name.replace(" ", "_")] = int(sum(grades))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
