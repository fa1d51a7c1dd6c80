"""EvalPlus's own file against the code grader: every canonical solution has to pass, and to fail
once it answers a single input wrongly. `python bench/code_grader.py MbppPlus.jsonl [problems]`
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from iwopd_megatron.grading.graders import grade
from iwopd_megatron.grading.pool import Submission

# The solution has a scope of its own, so that one which calls itself calls the right one.
MUTANT = """
_scope, _calls = {{}}, 0
exec({code!r}, _scope)

def {name}(*arguments):
    global _calls
    _calls += 1
    value = _scope[{name!r}](*arguments)
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
        tried = [i for i, row in enumerate(rows) if "plus" not in name or row["plus_input"]]
        asked = [Submission("code", f"```python\n{codes[i]}\n```", answers[i]) for i in tried]
        grades = [found.right for found in grade(asked)]
        print(f"{name:32} {sum(grades):6.0f} {len(grades):5} {time.perf_counter() - start:7.1f}")
        is_right = name == "canonical"
        odd = [rows[i]["task_id"] for i, x in zip(tried, grades, strict=True) if x != is_right]
        if odd:
            print(f"  not as expected: {', '.join(odd)}")
        result[name.replace(" ", "_")] = int(sum(grades))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
