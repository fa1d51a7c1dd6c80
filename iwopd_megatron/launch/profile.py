"""The cluster profile of `iwopd launch`: YAML about a site, so that recipes name none.

Examples with comments lie in cluster/profiles/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from iwopd_megatron.config.load import parse_tree
from iwopd_megatron.config.models import NonNegativeInt, PositiveInt, Section
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.files.shipped import PROFILES
from iwopd_megatron.files.yaml_file import read_yaml

SECRET = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
Gpu = Literal["h100-80", "h200", "b200", "h20", "a100", "cpu"]


class Slurm(Section):
    """What executor slurm needs to know of a site."""

    account: str = Field(description="account that the jobs are charged to")
    partition: str | None = Field(None, description="partition; null: the cluster's default")
    time: str = Field("04:00:00", description="limit of one start; a run goes on after a requeue")
    exclusive: bool = Field(True, description="whole nodes; false: roles may share one")
    mem: str | None = Field("0", description="memory of a node; 0: all of it; null: not asked for")
    warning_s: PositiveInt = Field(
        300, description="before the limit the trainer is told to save; longer than a round"
    )
    srun_args: list[str] = Field([], description="more options of each role's srun")
    sbatch: dict[str, Any] = Field({}, description="more options of sbatch, e.g. qos: high")


class Sky(Section):
    """What executor skypilot needs to know of a cloud or Kubernetes cluster."""

    infra: str | None = Field(None, description="e.g. k8s/my-context, aws/us-east-1")
    accelerator: str = Field(description="SkyPilot's name of the GPU, e.g. H100")
    setup: str | None = Field(None, description="shell lines run once on each machine")
    file_mounts: dict[str, str] = Field({}, description="path there: path here, or a bucket's")
    storage_mounts: dict[str, dict[str, Any]] = Field(
        {}, description="a folder that all machines share; run and launch folder must lie in one"
    )
    use_spot: bool = Field(False, description="take spot machines, which may be taken away")


class Profile(Section):
    """A site: how jobs are submitted there, on which GPUs, and in which containers."""

    executor: Literal["local", "docker", "slurm", "skypilot"] = Field(
        description="what NeMo-Run submits to; slurm and skypilot need their section"
    )
    gpu: Gpu = Field(description="cpu: gpus_per_node counts processes, and no GPU is asked for")
    gpus_per_node: PositiveInt = Field(8, description="GPUs of one machine")
    python: str = Field(
        "python", description="Python that has iwopd_megatron, in the container if there is one"
    )
    container: str | None = Field(None, description="image of every role; null: none")
    containers: dict[str, str] = Field({}, description="other images, by role")
    mounts: list[str] = Field([], description="HOST:CONTAINER of every container")
    env: dict[str, str] = Field(
        {}, description="variables of every role's processes; no secrets, see 'iwopd launch --help'"
    )
    requeues: NonNegativeInt = Field(
        10, description="times a job that crashed, or was stopped and saved, is started again"
    )
    restarts: NonNegativeInt = Field(3, description="times a service that died is, in one start")
    ready_timeout_s: float = Field(1800, gt=0, description="seconds a service has to get ready")
    slurm: Slurm | None = None
    skypilot: Sky | None = None

    @property
    def site(self) -> Slurm | Sky | None:
        """Return the section that belongs to the executor; None for local and docker.

        A profile that `load_profile` returned has it where its executor needs it.
        """
        if self.executor == "slurm":
            return self.slurm
        return self.skypilot if self.executor == "skypilot" else None

    @property
    def has_gpus(self) -> bool:
        """Return whether roles ask for GPUs."""
        return self.gpu != "cpu"

    @property
    def is_waiting(self) -> bool:
        """Return whether `iwopd launch` stays until the job ends."""
        return self.executor in ("local", "docker")

    def image(self, role: str) -> str | None:
        """Return the container image of a role; None where it runs without one."""
        return self.containers.get(role, self.container)


def load_profile(name: str) -> Profile:
    """Return the profile of a YAML file, or of a shipped one by its name, e.g. slurm_h100.

    RecipeError where there is none, or it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    shipped = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml"))) or "none here"
    tree = read_yaml(path, "cluster profile", f"write a file's path, or one of: {shipped}")
    profile = parse_tree(tree, Profile, f"cluster profile {path}", is_recipe=False)
    _check(profile, path)
    return profile


def _check(profile: Profile, path: Path) -> None:
    """Raise RecipeError for what no field's type can refuse."""
    section = profile.executor
    if section in ("slurm", "skypilot") and profile.site is None:
        raise RecipeError(
            f"cluster profile {path}: executor {section} needs a section '{section}'; add it."
        )
    secret = next((name for name in profile.env if SECRET.search(name)), None)
    if secret is not None:
        raise RecipeError(
            f"cluster profile {path}: env.{secret} looks like a secret, and this file is copied in "
            "clear text; export it in the shell that launches, which the job inherits."
        )
    if profile.executor == "docker" and profile.container is None:
        raise RecipeError(f"cluster profile {path}: executor docker needs 'container'; add it.")
    if profile.executor == "local" and (profile.container or profile.containers):
        raise RecipeError(
            f"cluster profile {path}: executor local runs without containers; "
            "remove them, or write executor: docker."
        )
