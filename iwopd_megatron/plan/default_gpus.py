"""GPUs for roles that a recipe gives none: as many as each role's own settings ask for."""

from __future__ import annotations

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.recipe import Recipe


def planned_cluster(recipe: Recipe) -> tuple[Cluster, list[str]]:
    """Return a cluster with GPUs for every role of the recipe, and a sentence for each assumed.

    Teacher services get the fewest GPUs that their layouts fit on, rollout servers those of
    `rollout.servers.start`; servers of given urls are not planned.
    """
    cluster, said = recipe.cluster, []
    if cluster is None:
        cluster = Cluster(trainer=recipe.world)
        said.append(f"cluster.trainer={cluster.trainer}, the recipe's processes (assumed)")
    if recipe.services and not cluster.teacher:
        gpus = sum(service.world for service in recipe.services.values())
        names = " and ".join(f"{key}.service" for key in recipe.services)
        said.append(f"cluster.teacher={gpus}, the fewest that {names} can have (assumed)")
        cluster = cluster.model_copy(update={"teacher": gpus})
    servers = recipe.rollout.servers
    if recipe.rollout.engine != "hf" and not cluster.rollout and not servers.urls:
        count = servers.start or 1
        gpus = count * servers.tp
        said.append(f"cluster.rollout={gpus}, for rollout.servers.start={count} (assumed)")
        cluster = cluster.model_copy(update={"rollout": gpus})
    return cluster, said
