"""What only rank 0 has: its steps are taken there, and every rank hears of them."""

import pytest
from worlds import run_world

from iwopd_megatron.config.models import Layout
from iwopd_megatron.errors import ServiceError
from iwopd_megatron.runtime.main_only import main_only
from iwopd_megatron.runtime.parallel import initialise, shutdown


class Counter:
    """Counts on rank 0."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def clear(self) -> None:
        self.count = 0

    def fail(self) -> None:
        raise ServiceError("rank 0 lost its server.")


def check_steps() -> None:
    parallel = initialise(Layout())
    made = []

    def make() -> Counter:
        made.append(Counter())
        return made[-1]

    counter = main_only(parallel, make)
    assert len(made) == parallel.is_main
    assert [counter.call(Counter.add, 2), counter.call(Counter.add, number=3)] == [2, 5]
    assert counter.peek(-1, Counter.add, 1) == (6 if parallel.is_main else -1)
    counter.tell(Counter.clear)
    assert counter.call(Counter.add, 4) == 4
    with pytest.raises(ServiceError, match="rank 0 lost its server"):
        counter.call(Counter.fail)
    shutdown()


def test_every_rank_hears_what_rank_0_finds():
    run_world(2, check_steps)
