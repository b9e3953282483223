"""What a row of data says: a prompt, and responses to it, as plain texts or as a chat.

Fields are plain strings or lists of messages ``{"role": …, "content": …}``, also as the trainers of TRL take them:

    prompt              a string, used verbatim, or the messages of a chat
    messages            a chat; goes before ``prompt``. A last turn of the assistant is a response, not prompt
    response            a string, the assistant's turn as a list of one message, or the chat through that turn
    chosen, rejected    the same; chats that differ in their last turn alone need no ``prompt``

Whatever can be read in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Chat = list[Message]


def read_conversation(where: str, row: dict[str, Any], fields: Sequence[str] = ()) -> tuple[str | Chat, list[str]]:
    """The prompt, a text or the chat so far, and the texts of the responses in ``fields``.

    ValueError begins with ``where`` and says which field is missing, malformed or at odds with another.
    """
    prompt, answer = _prompt(where, row)
    responses = []
    for field in fields:
        value = row.get(field)
        if value is None and answer is not None and len(fields) == 1:
            value = answer
        if isinstance(value, list):
            before, value = _split(where, field, value)
            if value is None:
                raise ValueError(f"{where}: {field} must end with the assistant's turn; found {before[-1]['role']!r}")
            prompt = _agreed(where, field, prompt, before)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: field {field!r} must be a non-empty string; found {value!r}")
        responses.append(value)
    if prompt is None:
        raise ValueError(f"{where}: has neither a string prompt nor a list messages; found {sorted(row)}")
    if fields and answer is not None and answer not in responses:
        raise ValueError(f"{where}: messages end with a response that is not the row's {' or '.join(fields)}; keep one")
    return prompt, responses


def _prompt(where: str, row: dict[str, Any]) -> tuple[str | Chat | None, str | None]:
    """The prompt of ``messages`` or ``prompt``, and the response that ends ``messages``; None where there is none."""
    if isinstance(row.get("messages"), list):
        before, answer = _split(where, "messages", row["messages"])
        if not before:
            raise ValueError(f"{where}: messages hold the assistant's turn alone; put what it answers before it")
        return before, answer
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        before, answer = _split(where, "prompt", prompt)
        if answer is not None:
            raise ValueError(f"{where}: prompt ends with the assistant's turn; end it with the turn to be answered")
        return before, None
    return (prompt if isinstance(prompt, str) else None), None


def _split(where: str, field: str, messages: list[Any]) -> tuple[Chat, str | None]:
    """The turns before the assistant's last one, and its text; all turns and None where another role ends the chat."""
    if not messages:
        raise ValueError(f"{where}: {field} is a list without messages; remove the row")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: messages must be objects with strings role and content; found {message!r}")
    # Tables fill keys that other messages have with nulls, which chat templates would take for values.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if chat[-1]["role"] == "assistant":
        return chat[:-1], str(chat[-1]["content"])
    return chat, None


def _agreed(where: str, field: str, prompt: str | Chat | None, before: Chat) -> str | Chat:
    """The one prompt that the row's own and the turns before a response's last amount to."""
    if isinstance(prompt, str) and [(turn["role"], turn["content"]) for turn in before] == [("user", prompt)]:
        return before
    if isinstance(prompt, str):
        raise ValueError(f"{where}: prompt is a text, but {field} a chat that does not begin with it; use one kind")
    if prompt is None and not before:
        raise ValueError(f"{where}: {field} has no turn to answer; add prompt or messages")
    if prompt is not None and before and before != prompt:
        raise ValueError(f"{where}: {field} answers another chat than the row's prompt; make them the same")
    return before if prompt is None else prompt
