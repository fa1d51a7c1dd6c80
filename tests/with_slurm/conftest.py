"""A real Slurm of four emulated nodes, started for these tests and stopped after them."""

import pytest
from launches import Cluster, until
from slurm import Testbed, install


@pytest.fixture(scope="session")
def bed(tmp_path_factory):
    install()
    made = Testbed(tmp_path_factory.mktemp("slurm"))
    made.up()
    yield made
    made.output("scancel", "--user", "root")
    until(lambda: not made.output("squeue", "-h").strip(), 60)
    made.down()


@pytest.fixture
def cluster(bed, tmp_path):
    yield Cluster(bed, tmp_path)
    bed.output("scancel", "--user", "root")
    until(lambda: not bed.output("squeue", "-h").strip(), 60)
