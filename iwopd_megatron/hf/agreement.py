"""Gates before the first round: student, teachers and servers mean the same by every token id.

Each raises GateError with one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iwopd_megatron.errors import GateError


def same_vocabulary(
    student: Path, teacher: Path, student_tokenizer: Any, teacher_tokenizer: Any
) -> None:
    """Refuse a teacher whose tokenizer has other ids or another EOS than the student's."""
    if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise GateError(
            f"tokenizers of {student} and {teacher} differ: {token!r} is {ours.get(token)} against "
            f"{theirs.get(token)}; distil between models of one vocabulary."
        )
    if student_tokenizer.eos_token_id != teacher_tokenizer.eos_token_id:
        raise GateError(
            f"EOS is {student_tokenizer.eos_token_id} for {student} but "
            f"{teacher_tokenizer.eos_token_id} for {teacher}; "
            "set the same eos_token in both tokenizer_config.json files."
        )


def same_chat_template(
    student: Path, teacher: Path, student_tokenizer: Any, teacher_tokenizer: Any
) -> None:
    """Refuse a teacher whose chat template is not the student's, which prompts are written with."""
    if student_tokenizer.chat_template != teacher_tokenizer.chat_template:
        raise GateError(
            f"the chat templates of {student} and {teacher} differ, so the teacher reads prompts "
            "in a form it was not trained on; copy the teacher's template to the student, or "
            "write gates.same_chat_template=false where that is meant."
        )


def served_teacher(
    url: str,
    info: Mapping[str, Any],
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    same_template: bool = True,
) -> None:
    """Refuse a scoring server that does not hold the recipe's teacher, or whose ids mean others.

    info, student, teacher: as `fingerprint.identity`; what a server does not tell is not compared.
    """
    if info.get("vocab_size", student["vocab_size"]) != student["vocab_size"]:
        raise GateError(
            f"the teacher at {url} has a vocabulary of {info['vocab_size']}, the student of "
            f"{student['vocab_size']}; serve a model of the student's family."
        )
    if not set(info.get("eos_token_ids", ())) <= set(student["eos_token_ids"]):
        raise GateError(
            f"the teacher at {url} ends answers with {info['eos_token_ids']}, the student only "
            f"with {student['eos_token_ids']}; make the student's generation_config.json name "
            "them all."
        )
    theirs = info.get("tokenizer", student["tokenizer"])
    parts = ["vocabulary", "special_tokens"] + ["chat_template"] * same_template
    differing = [part for part in parts if theirs.get(part) != student["tokenizer"][part]]
    if differing:
        hint = " or write gates.same_chat_template=false" * (differing == ["chat_template"])
        raise GateError(
            f"the tokenizer of the teacher at {url} is not the student's: {differing[0]} differs; "
            f"give its folder the student's tokenizer files{hint}."
        )
    if (
        info.get("config_fingerprint", teacher["config_fingerprint"])
        != (teacher["config_fingerprint"])
    ):
        raise GateError(
            f"the server at {url} holds {info.get('model_path')}, whose config.json is not that of "
            "the recipe's teacher; point hf or urls of the teacher at the other."
        )


def server_fits(url: str, info: Mapping[str, Any], longest: int, temperature: float) -> None:
    """Refuse a scoring server that cannot score rollouts of `longest` tokens at their temperature.

    info: the server's /model_info.
    """
    if temperature != 1 and not info.get("has_logprob_temperature"):
        raise GateError(
            f"the server at {url} scores at temperature 1 only, as SGLang does, but "
            f"rollout.temperature={temperature:g}; write rollout.temperature=1, or serve the "
            "teacher with 'iwopd serve-teacher'."
        )
    if info.get("max_sequence_tokens", longest) < longest:
        raise GateError(
            f"the teacher at {url} takes sequences of at most {info['max_sequence_tokens']} "
            f"tokens, and rollout.max_prompt_tokens + max_response_tokens = {longest}; raise "
            "service.microbatch_tokens of the teacher, or lower those."
        )


def served_student(url: str, info: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Refuse a rollout server whose model is not the student, as far as it tells.

    info, student: as `fingerprint.identity`.
    """
    for key, what in (
        ("vocab_size", "vocabulary size"),
        ("eos_token_ids", "end-of-answer ids"),
        ("tokenizer_fingerprint", "tokenizer"),
        ("config_fingerprint", "config.json"),
    ):
        if info.get(key, student[key]) != student[key]:
            raise GateError(
                f"the rollout server at {url} serves {info.get('model_path')}, whose {what} is not "
                "the student's; start it with the recipe's student.hf."
            )
