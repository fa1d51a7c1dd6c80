"""What can be refused of teachers and base student before any process starts. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iwopd_megatron.config.preflight import check_context, check_layout, check_world
from iwopd_megatron.errors import RecipeError
from iwopd_megatron.hf.config import HfConfig, read_hf_config
from iwopd_megatron.hf.folder import check_model, eos_ids

if TYPE_CHECKING:
    from iwopd_megatron.config.models import Frozen, Service, Teacher
    from iwopd_megatron.config.recipe import Recipe


def check_scorers(recipe: Recipe) -> None:
    """Refuse teachers and base students that cannot score the student's tokens; RecipeError."""
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
    """Return a scoring model's config.json; refuse another vocabulary than the student's."""
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
        try:
            check_layout(recipe.student.parallel, hf, "teacher")
        except RecipeError as error:
            own = "or give it a layout of its own, teacher.service.parallel"
            raise RecipeError(f"{str(error).rstrip('.')}, {own}.") from None
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


def _check_topk(recipe: Recipe) -> None:
    """Refuse top K of embedded teachers that do not share the student's micro-batches."""
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
