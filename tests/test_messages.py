"""The messages to users follow one form: what is wrong, where, what would be right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
LONGEST = 220
"""Characters of a message's literal text; paths and values come on top."""

OLD_WORDS = (
    "stands twice", "there is no such", "leave it out", "leaves it out", "leave them out", "goes on", "go on with",
    "behind the recipe", "one's own", "so many", "anew", "at hand", "by itself", "holds no", "is wanted",
    "wants", "mend", "beside", "picture", "a folder a", "unless it is told", "as it is", "for want of", "takes no",
    "is to be", "none but", "for good", "whole",
)  # fmt: skip

COMPLETED_BY_CALLER = (
    "its EXIF data are damaged",
    "its floating-point pixels have no defined white value",
    "its gray values are outside of 0 to 65535",
    "is the SDXL refiner; use the SDXL base model",
    "contains a UNet without its text encoder; use a full checkpoint",
)
"""Texts that a caller puts behind the name of the file."""


@dataclass(frozen=True)
class Message:
    """The text of a ``UserError`` or ``refuse`` call.

    Args:
        place: FILE:LINE.
        text: key, message and remedy; a placeholder {} for each value.
        keyed: whether ``key=`` is set.
    """

    place: str
    text: str
    keyed: bool


def literal(node: ast.expr | None) -> str:
    """The literal text of an expression of strings, with {} for what is computed."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(literal(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return literal(left) + literal(right)
        case ast.IfExp(body=body, orelse=orelse):
            return max(literal(body), literal(orelse), key=len)
        case None:
            return ""
        case _:
            return "{}"


def messages_of(source: str, name: str) -> Iterator[Message]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id not in ("UserError", "refuse") or not node.args:
            continue
        extra = {keyword.arg: keyword.value for keyword in node.keywords}
        parts = [literal(extra.get("key")), literal(node.args[0]), literal(extra.get("remedy"))]
        yield Message(f"{name}:{node.lineno}", "; ".join(part for part in parts if part), "key" in extra)


def all_messages() -> list[Message]:
    return [
        message
        for path in sorted(SOURCE.glob("**/*.py"))
        for message in messages_of(path.read_text(), str(path.relative_to(SOURCE)))
    ]


MESSAGES = all_messages()


def has_place(message: Message) -> bool:
    """Whether the message names a key, an option, a file or a value."""
    return message.keyed or "{}" in message.text or bool(re.match(r"(-{1,2}\w+|\w+([./]\w+)*)(: | is )", message.text))


def test_all_messages_are_collected() -> None:
    assert len(MESSAGES) > 240
    [found] = messages_of('raise UserError(f"max {x}" if y else "b", key="a.b", remedy="set " + "it")', "f.py")
    assert found == Message("f.py:1", "a.b; max {}; set it", True)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.place)
def test_message_is_short_and_names_its_place(message: Message) -> None:
    assert len(message.text.replace("{}", "")) <= LONGEST
    assert has_place(message) or message.text in COMPLETED_BY_CALLER
    assert not message.text.endswith(".")


@pytest.mark.parametrize("word", OLD_WORDS)
def test_messages_use_no_old_word(word: str) -> None:
    pattern = re.compile(rf"\b{re.escape(word)}\b")
    assert [message for message in MESSAGES if pattern.search(message.text)] == []
