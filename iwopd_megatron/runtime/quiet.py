"""What libraries read at import: one thread a process, huge pages, and no warnings."""

import logging
import os
import warnings
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def quiet() -> None:
    """Set one thread and silence libraries; call it before anything heavy is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if HUGE_PAGES.exists():  # torch would warn; weights in small pages are read at half the speed
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore", module=r"megatron|torch|transformers")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name in ("megatron", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.ERROR)
