"""One thread a process, and imports of Megatron, torch and transformers without their warnings."""

import logging
import os
import warnings


def quiet() -> None:
    """Set one thread and silence libraries; call it before anything heavy is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore", module=r"megatron|torch|transformers")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name in ("megatron", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.ERROR)
