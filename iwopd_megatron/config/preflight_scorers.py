"""What can be refused of teachers and base student before any process starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from iwopd_megatron.config.preflight import check_context, check_layout, check_world, describe
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.hf.folder import check_model, eos_ids

if TYPE_CHECKING:
    from iwopd_megatron.config.models import Frozen, Service, Teacher
    from iwopd_megatron.config.recipe import Recipe


def check_scorers(recipe: Recipe) -> None:
    """Refuse models that cannot score the student's tokens, and settings they cannot have."""
    if recipe.teacher is not None and recipe.teachers:
        raise RecipeError(
            "the recipe has teacher and teachers; keep teacher for one that scores every problem, "
            "or teachers for one a source."
        )
    for role, teacher in recipe.named_teachers.items():
        _check_teacher(recipe, teacher, role)
    if recipe.base_model is not None:
        _check_model(recipe, recipe.base_model, "base")
        check_layout(recipe.student.parallel, read_hf_config(recipe.base_model.hf), "base")
    if recipe.loss.objective == "topk_kl":
        _check_topk(recipe)


def _check_model(recipe: Recipe, model: Frozen, role: str, weights: bool = True) -> HfConfig:
    """Its config.json; it must be of the student's vocabulary."""
    ours, theirs = read_hf_config(recipe.student.hf), check_model(model.hf, weights)
    if theirs.vocab_size != ours.vocab_size:
        raise RecipeError(
            f"{role} vocab_size={theirs.vocab_size} differs from the student's "
            f"{ours.vocab_size}; on-policy distillation needs one vocabulary: "
            "choose models of one family."
        )
    student, scorer = eos_ids(recipe.student.hf), eos_ids(model.hf)
    if not scorer <= student:
        raise RecipeError(
            f"the {role} ends answers with {sorted(scorer)}, the student only with "
            f"{sorted(student)}; make the student's generation_config.json name them all."
        )
    check_context(recipe, theirs, role)
    return theirs


def _check_teacher(recipe: Recipe, teacher: Teacher, role: str) -> None:
    hf = _check_model(recipe, teacher, role, weights=not teacher.urls)
    if not teacher.is_remote:
        check_layout(recipe.student.parallel, hf, "teacher")
        return
    unread = [name for name in ("offload", "microbatch_tokens") if getattr(teacher, name)]
    if unread:
        raise RecipeError(
            f"{role}.{unread[0]} is of an embedded teacher, but {role} is a server; "
            f"leave it out, or remove {role}.urls and {role}.service."
        )
    for url in teacher.urls:
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"{role}.urls: '{url}' is not a URL; write http://HOST:PORT.")
    if teacher.service is not None:
        _check_service(teacher.service, hf, f"{role}.service")


def _check_service(service: Service, hf: HfConfig, role: str) -> None:
    check_layout(service.parallel, hf, role)
    check_world(service.parallel, service.world, f"{role}.processes")
    if service.max_queue_tokens < service.microbatch_tokens:
        raise RecipeError(
            f"{role}.max_queue_tokens={service.max_queue_tokens} must be at least "
            f"{role}.microbatch_tokens={service.microbatch_tokens}, so that every sequence that "
            "fits a micro-batch fits the queue."
        )


def service_processes(recipe: Recipe) -> dict[str, int]:
    """Processes of every teacher service that a launch starts, by the teacher's key.

    As many as it asks for; without `processes` an even part of what the others leave of
    cluster.teacher, or where that is 0 the fewest its layout fits on.
    """
    services, total = recipe.services, recipe.cluster.teacher if recipe.cluster else 0
    if not total:
        return {key: service.world for key, service in services.items()}
    if not services:
        raise RecipeError(
            f"cluster.teacher={total} gives GPUs to a teacher service, but no teacher has one; "
            "add teacher.service, or write cluster.teacher=0."
        )
    asked = {key: service.processes for key, service in services.items() if service.processes}
    silent = [key for key in services if key not in asked]
    left = total - sum(asked.values())
    if not silent and left:
        words = " and ".join(f"{key}.service.processes={n}" for key, n in asked.items())
        differ = "differs" if len(asked) == 1 else f"sum to {total - left}, which differs"
        remedy = f"processes={total}" if len(asked) == 1 else f"cluster.teacher={total - left}"
        raise RecipeError(f"{words} {differ} from cluster.teacher={total}; write {remedy}.")
    if silent and (left < len(silent) or left % len(silent)):
        raise RecipeError(
            f"cluster.teacher={total} leaves {max(0, left)} GPUs for {' and '.join(silent)}, which "
            f"cannot share them evenly; write {silent[0]}.service.processes=N."
        )
    return {key: asked.get(key) or left // len(silent) for key in services}


def check_service_sizes(recipe: Recipe) -> None:
    """Refuse services whose part of cluster.teacher does not suit their layout."""
    sizes = service_processes(recipe)
    for key, size in sizes.items():
        layout = recipe.services[key].parallel
        if size % layout.unit:
            name = "cluster.teacher" if len(sizes) == 1 else f"{key}.service.processes"
            raise RecipeError(
                f"{name}={size} is not a multiple of {layout.unit}, what the layout "
                f"{describe(layout)} needs; write {-(-size // layout.unit) * layout.unit}."
            )


def _check_topk(recipe: Recipe) -> None:
    """The top K of an embedded teacher lies in the micro-batches of the samples it scored."""
    for role, teacher in recipe.named_teachers.items():
        if teacher.microbatch_tokens is not None:
            raise RecipeError(
                f"{role}.microbatch_tokens must be left out with loss.objective=topk_kl: the "
                "teacher's top K stays in the micro-batches that the student trains on."
            )
        if len(recipe.teachers) > 1 and not teacher.is_remote:
            raise RecipeError(
                f"loss.objective=topk_kl needs several teachers to be servers, and {role} is "
                f"embedded; give it urls or a service."
            )


def check_sources(recipe: Recipe, sources: Iterable[str]) -> None:
    """Refuse problems that no teacher scores."""
    missing = sorted(set(sources) - recipe.teachers.keys()) if recipe.teachers else []
    if missing:
        raise RecipeError(
            f"data.train has problems of source '{missing[0]}', but there are teachers "
            f"only for {', '.join(sorted(recipe.teachers))}; add teachers.{missing[0]}."
        )
