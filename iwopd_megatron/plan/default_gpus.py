"""GPUs that a recipe does not give to its roles, for planning: as many as each has by itself."""

from __future__ import annotations

from iwopd_megatron.config.cluster import Cluster
from iwopd_megatron.config.recipe import Recipe


def with_cluster(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with GPUs for every role that it has, and a sentence for each that it did not say.

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
    return recipe.model_copy(update={"cluster": cluster}), said
