"""One grading process: a JSON line in, a JSON line out, until the input ends. Imports no torch.

Started by pool.py as `python -m iwopd_megatron.grading.worker`; it may hang or crash, for
its pool kills and replaces it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from iwopd_megatron.errors import UserError
from iwopd_megatron.runtime.stop import die_with_parent

MEMORY = 4 * 2**30  # bytes of address space


def main() -> None:
    """Grade the submissions on standard input until it ends; argv[1] is the pool's process id."""
    parent = int(sys.argv[1])
    die_with_parent()
    if os.getppid() != parent:  # it died before we asked
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from iwopd_megatron.grading.graders import prepare

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing a library prints ends among the answers
    for line in sys.stdin:
        request = json.loads(line)
        prepare(request["grader"])  # what is imported once is nobody's time
        # nothing catches SIGPROF: the kernel ends this process, also in the middle of a C loop
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
        answer = json.dumps(_grade(**request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer + "\n")
        answers.flush()


def _grade(grader: str, response: str, answer: str) -> dict[str, Any]:
    """Return {"right", maybe "trouble"}, or {"error": a sentence that ends the run}."""
    from iwopd_megatron.grading.graders import GRADERS

    try:
        return {"right": bool(GRADERS[grader](response, answer))}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # counted and shown: a grader's own mistake is nobody's wrong answer
        return {"right": False, "trouble": f"raised {type(error).__name__}"}


if __name__ == "__main__":
    main()
