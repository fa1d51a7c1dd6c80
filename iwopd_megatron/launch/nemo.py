"""NeMo-Run: a job's roles as an experiment of its executors. The only file that imports it.

Traps it keeps from (0.11.1): every path of a local tunnel must be the experiment's own folder;
variables given to NeMo-Run are written in clear text and leak from one role to the next, so none
are: each node's agent sets them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from iwopd_megatron.errors import UserError
from iwopd_megatron.launch.profile import Profile, Sky, Slurm
from iwopd_megatron.launch.roles import Job, Role

try:
    import nemo_run
except ImportError as error:
    raise UserError(
        f"NeMo-Run does not import here ({error}); it has versions of its own, so give it an "
        "environment of its own with 'make cluster-venv' and use build/cluster-venv/bin/iwopd, or "
        "pip install 'iwopd-megatron[cluster]' in one."
    ) from None

SECONDS_BETWEEN_LOOKS = 5  # of the batch script at its roles


def executors(job: Job, profile: Profile, folder: Path) -> list[nemo_run.Executor]:
    """Return NeMo-Run's executors: one for each role on Slurm, one for all roles elsewhere.

    folder: the launch folder. UserError where an optional package of the executor is missing.
    """
    site = profile.site
    if isinstance(site, Slurm):
        return [_slurm(role, job, profile, site, folder) for role in job.roles]
    try:
        return [_machines(job, profile, site, folder)]
    except AssertionError as error:  # NeMo-Run's way to say that an optional package is missing
        raise UserError(f"executor {profile.executor}: {error}") from None


def launch(
    job: Job, places: list[nemo_run.Executor], profile: Profile, folder: Path, dryrun: bool
) -> str:
    """Write the experiment into the launch folder, and submit it unless `dryrun`.

    places: what `executors` returned. Returns the scheduler's name of the job, or an empty one.
    """
    title = folder.name.rpartition("_")[0]
    nemo_run.config.set_nemorun_home(str(folder))
    is_waiting = profile.is_waiting and not dryrun
    with nemo_run.Experiment(
        title,
        id=folder.name,
        base_dir=str(folder),
        log_level="WARNING",
        skip_status_at_exit=True,
        enable_goodbye_message=False,
        clean_mode=not is_waiting,
    ) as experiment:
        if profile.executor == "slurm":
            tasks = [_task(role.name, job, profile, folder) for role in job.roles]
            experiment.add(tasks, executor=places, name=title)
        else:
            task = _task("machine", job, profile, folder)
            experiment.add(task, executor=places[0], name=title)
        if dryrun:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            experiment.run(detach=not is_waiting, tail_logs=is_waiting)
        (task,) = experiment.jobs
        return task.handle.rpartition("/")[2]


def _task(role: str, job: Job, profile: Profile, folder: Path) -> nemo_run.Script:
    words = ["exec", profile.python, "-m", "iwopd_megatron.launch.agent", str(folder), role]
    return nemo_run.Script(inline=f"cd {shlex.quote(job.workdir)}\n{shlex.join(words)}\n")


def _slurm(
    role: Role, job: Job, profile: Profile, site: Slurm, folder: Path
) -> nemo_run.SlurmExecutor:
    """Return one group of the heterogeneous job: one agent on each of the role's nodes."""
    fills_nodes = all(r.gpus_per_node == profile.gpus_per_node for r in job.roles)
    image = profile.image(role.name)
    executor = nemo_run.SlurmExecutor(
        account=site.account,
        partition=site.partition,
        time=site.time,
        nodes=role.nodes,
        ntasks_per_node=1,
        gpus_per_node=role.gpus_per_node if job.has_gpus else None,
        exclusive=(site.exclusive and fills_nodes) or None,
        mem=site.mem if fills_nodes else None,
        signal=f"B:TERM@{site.warning_s}",
        heterogeneous=len(job.roles) > 1,
        container_image=image,
        container_mounts=profile.mounts if image else [],
        srun_args=list(site.srun_args),
        additional_parameters=dict(site.sbatch) or None,
        setup_lines=batch_lines(folder),
        job_name_prefix="iwopd.",
        packager=nemo_run.Packager(),
        tunnel=nemo_run.LocalTunnel(job_dir=str(folder / "experiments")),
        retries=job.requeues,
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=SECONDS_BETWEEN_LOOKS,
    )
    return executor


def batch_lines(folder: Path) -> str:
    """Return lines of the batch script: the trainer hears warnings, final ends are not requeued."""
    launch = shlex.quote(str(folder))
    return f"""
# Before the time limit: the trainer's agent looks for this file and has its ranks save and stop.
iwopd_launch={launch}
trap 'touch "$iwopd_launch/attempt_${{SLURM_RESTART_COUNT:-0}}/stop"' TERM
# A run that only a person can mend is not requeued.
scontrol() {{
    if [ "$1" = requeue ] && [ -e "$iwopd_launch/final.txt" ]; then
        cat "$iwopd_launch/final.txt"
    else
        command scontrol "$@"
    fi
}}
"""


def _machines(job: Job, profile: Profile, site: Sky | None, folder: Path) -> nemo_run.Executor:
    """Return the executor of a gang of machines that no scheduler divides among the roles.

    Each machine's agent finds its roles by the machine's number.
    """
    if profile.executor == "local":
        return nemo_run.LocalExecutor()
    if site is None:
        return nemo_run.DockerExecutor(
            container_image=profile.container,
            num_gpus=-1 if job.has_gpus else None,
            ipc_mode="host",
            network="host",
            volumes=[*profile.mounts, f"{folder}:{folder}"],
            packager=nemo_run.Packager(),
        )
    return nemo_run.SkypilotExecutor(
        infra=site.infra,
        gpus=site.accelerator if job.has_gpus else None,
        gpus_per_node=profile.gpus_per_node if job.has_gpus else None,
        num_nodes=job.machines,
        container_image=profile.container,
        setup=site.setup,
        file_mounts=site.file_mounts or None,
        storage_mounts=site.storage_mounts or None,
        use_spot=site.use_spot,
        packager=nemo_run.GitArchivePackager(),  # it takes no other
    )
