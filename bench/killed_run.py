"""`iwopd train` that is killed with SIGKILL, launcher and ranks alike, at one point of one round.

python bench/killed_run.py ROUND POINT SECONDS RECIPE [key=value ...] [--resume]
POINT is where the clock of SECONDS starts: a phase of the round, the optimiser step, or the save.
Used by drill.py and the tests; the run itself is the package's own, unchanged.
"""

import os
import signal
import sys
import threading

from iwopd_megatron.cli import main as cli
from iwopd_megatron.train.round import Clock
from iwopd_megatron.train.student import StudentModel
from iwopd_megatron.train.trainer import Trainer

POINTS = ("generate", "score", "train", "step", "sync", "save")


def arm(seconds):
    """Kill the process group `seconds` from now, from a thread, whatever the rank then does."""
    killer = threading.Timer(seconds, lambda: os.killpg(0, signal.SIGKILL))
    killer.daemon = True
    killer.start()


def main(at_round, point, seconds):
    current = {"round": 0}

    def reached(name):
        if name == point and current["round"] == at_round and os.environ["RANK"] == "0":
            arm(seconds)

    run_round, phase = Trainer._round, Clock.phase
    step, save = StudentModel.step, StudentModel.save

    def counted_round(self, number):
        current["round"] = number
        return run_round(self, number)

    def counted_phase(self, name):
        reached(name)
        return phase(self, name)

    def counted_step(self):
        reached("step")
        return step(self)

    def counted_save(self, *args):
        reached("save")
        return save(self, *args)

    Trainer._round, Clock.phase = counted_round, counted_phase
    StudentModel.step, StudentModel.save = counted_step, counted_save
    cli.main()


if __name__ == "__main__":
    os.setpgrp()  # a group of its own: only this run is killed
    at_round, point, seconds, *arguments = sys.argv[1:]
    assert point in POINTS, f"no point '{point}'; use one of {', '.join(POINTS)}"
    sys.argv[1:] = ["train", *arguments]
    main(int(at_round), point, float(seconds))
