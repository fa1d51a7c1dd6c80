"""Rows of messages: a list of {role, content}, or of {from, value} as ShareGPT has them.

The list ends where the student is to answer: with the user, or with a tool's result. An assistant's
message after that is the row's response.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from iwopd_megatron.errors import RecipeError

Message = dict[str, Any]  # role, content (a text), and what else the row gives a chat template
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


@dataclass(frozen=True)
class Conversation:
    """A row's messages: `question` is what the user says last, `before` and `after` the others."""

    before: tuple[Message, ...]
    question: str
    after: tuple[Message, ...]
    response: str | None  # what an assistant said at the end


def read_conversation(value: list[Any], where: str) -> Conversation:
    """Return the messages of a row; a last one of an assistant's is taken off as the response.

    where: the row's place. RecipeError names the message that no model can be asked.
    """
    messages = [
        _message(item, f"{where}: message {number}") for number, item in enumerate(value, 1)
    ]
    response = None
    if messages and messages[-1]["role"] == "assistant":
        response = messages.pop()["content"]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f"ends with one of role {messages[-1]['role']}" if messages else "is empty"
        raise RecipeError(
            f"{where}: the list of messages before the answer {last}; it must end with the "
            "user's, or with a tool's result."
        )
    asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if asked is None:
        raise RecipeError(f"{where}: none of the messages is the user's.")
    question = messages[asked]["content"]
    return Conversation(tuple(messages[:asked]), question, tuple(messages[asked + 1 :]), response)


def is_written_out(text: str) -> bool:
    """Return whether a text is a list of messages written as JSON or Python, not a question."""
    return WRITTEN_OUT.match(text) is not None


def _message(item: Any, where: str) -> Message:
    """Return a message with a known role and a text; RecipeError for any other."""
    if not isinstance(item, dict):
        raise RecipeError(f"{where} is {item!r:.80}, not an object with role and content.")
    given = {key: value for key, value in item.items() if value is not None}
    if "role" not in given and "from" in given:
        given = {"role": given.pop("from"), "content": given.pop("value", None)} | given
    role = given.get("role")
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RecipeError(f"{where} is of role {role!r:.80}; known roles: {', '.join(ROLES)}.")
    for key in MEDIA:
        if given.get(key):
            raise RecipeError(f"{where} has '{key}'; only texts can be asked.")
    content = given.get("content")
    if content is None and role == "assistant" and given.get("tool_calls"):
        content = ""
    return given | {"role": role, "content": _text(content, where)}


def _text(content: Any, where: str) -> str:
    """Return a message's text: a content, or its parts' texts joined as chat templates do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RecipeError(f"{where}: content {content!r:.80} is not a text.")
    for part in content:
        is_object = isinstance(part, dict)
        kind = part.get("type") if is_object else part
        if not is_object or kind != "text" or not isinstance(part.get("text"), str):
            raise RecipeError(
                f"{where} has a part {kind!r:.80}; only parts of type 'text' can be asked."
            )
    return "".join(part["text"] for part in content)
