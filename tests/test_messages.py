"""The messages to users follow one form: what is wrong, where, what would be right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from sdtune.errors import STOPPED

SOURCE = Path(__file__).parents[1] / "src"
CODE = sorted(SOURCE.glob("**/*.py"))
LONGEST = 220
"""Characters of a message's literal text; paths and values come on top."""

OLD_WORDS = (
    "stands twice", "there is no such", "leave it out", "leaves it out", "leave them out", "goes on", "go on with",
    "behind the recipe", "one's own", "so many", "anew", "at hand", "by itself", "holds no", "is wanted",
    "wants", "mend", "beside", "picture", "a folder a", "unless it is told", "as it is", "for want of", "takes no",
    "is to be", "none but", "for good", "whole",
)  # fmt: skip

COMPLETED_BY_CALLER = re.compile(r"(is|has|contains|states|its) ")
"""How a text begins that its caller puts behind the name of a file, in the modules of :data:`FILE_READERS`."""

FILE_READERS = (
    "sdtune/backbone/families/__init__.py",
    "sdtune/backbone/families/unet.py",
    "sdtune/formats/float8.py",
    "sdtune/formats/original/checkpoint.py",
    "sdtune/images/files.py",
)

FORWARDED = re.compile(r"[\W_]*(exports\[\{\}\])?[\W_]*(and \{\} more errors; )?(no job was started)?")
"""The text of another exception, at most with its place before it."""

ACTIONS = (
    "add|available|build|check|choose|continue|convert|copy|correct|delete|did you mean|download|expected|install|keep"
    "|list|lower|make|move|name|need|pass|put|quote|reduce|remove|rename|restore|run|save|see|select|set|start|supported|train"
    "|try|use|write|lists the"
)
STATES_WHAT_IS_RIGHT = re.compile(
    rf"; .*\b({ACTIONS})\b|\bmust\b|\bneeds? \S|\brequire|\bexpected\b|\bmax \{{\}}|\bat (least|most)\b"
    r"|\bis not (one of|a multiple of|an? \w+)|, not an? |\bis neither \w+ .*nor"
)
"""What a message without ``remedy=`` says: the allowed values, the expected kind of thing, or what to do."""

PLACE = re.compile(r"^\{\}|\{\}: | \{\}|^-{1,2}\w[\w-]*\b|\b[a-z_]+(\.[a-z_]+)+\b|\b\w+(/\w+)*=|^[a-z_]+: ")
"""A value or file, an option, a dotted key, an override, or a key with a colon at the beginning."""


@dataclass(frozen=True)
class Message:
    """One text of a ``UserError`` or ``refuse`` call.

    Args:
        place: FILE:LINE.
        text: what is wrong; a placeholder {} for each value.
        key: ``key=``; empty if there is none.
        remedy: ``remedy=``; empty if there is none.
    """

    place: str
    text: str
    key: str = ""
    remedy: str = ""

    @property
    def full(self) -> str:
        return "; ".join(part for part in (self.key, self.text, self.remedy) if part)


class Texts:
    """The texts that an expression of a module can have, with {} for what is known only when it runs.

    Both branches of a condition are texts. Constants of the package, variables that are assigned once, and functions
    that return texts are looked up.
    """

    def __init__(self, functions: dict[str, ast.FunctionDef], constants: dict[str, ast.expr]) -> None:
        self._functions, self._constants = functions, constants

    def of(self, node: ast.expr | None, scope: dict[str, ast.expr]) -> list[str]:
        match node:
            case None | ast.Constant(value=None):
                return [""]
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                return ["".join(parts) for parts in product(*(self.of(value, scope) for value in values))]
            case ast.FormattedValue(value=value):
                return self.of(value, scope)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [a + b for a in self.of(left, scope) for b in self.of(right, scope)]
            case ast.IfExp(body=body, orelse=orelse):
                return self.of(body, scope) + self.of(orelse, scope)
            case ast.BoolOp(values=values):
                return [text for value in values for text in self.of(value, scope)]
            case ast.Name(id=name) if value := scope.get(name, self._constants.get(name)):
                return self.of(value, {key: kept for key, kept in scope.items() if key != name})
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="format")) if name in self._constants:
                return self.of(self._constants[name], scope)
            case ast.Call(func=ast.Name(id="suggestion" | "_suggested_key")):
                return ["; did you mean {}?", "; available: {}"]
            case ast.Call(func=ast.Name(id=name)) if name in self._functions:
                return self.returned_by(name)
            case _:
                return ["{}"]

    def returned_by(self, name: str) -> list[str]:
        function = self._functions[name]
        if not (isinstance(function.returns, ast.Name | ast.BinOp) and "str" in ast.unparse(function.returns)):
            return ["{}"]
        inner = Texts({key: other for key, other in self._functions.items() if key != name}, self._constants)
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        texts = [text for value in returned for text in inner.of(value, local_values(function))]
        return sorted({text for text in texts if text})


def local_values(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """The variables of ``function`` that are assigned exactly once."""
    assigned = [
        (node.targets[0].id, node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    names = [name for name, _ in assigned]
    return {name: value for name, value in assigned if names.count(name) == 1}


def module_constants(module: ast.Module) -> dict[str, ast.expr]:
    return {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def functions_of(module: ast.AST) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}


def messages_of(module: ast.Module, name: str, package: Texts | None = None) -> Iterator[Message]:
    """The messages of a module; without ``package``, names are looked up in the module alone."""
    texts = package or Texts(functions_of(module), module_constants(module))
    scopes: dict[ast.AST, dict[str, ast.expr]] = {}
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    for function in functions:  # an inner function comes after the outer one and replaces it
        scopes |= dict.fromkeys(ast.walk(function), local_values(function))
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Name(id="UserError" | "refuse"), args=[text, *_], keywords=keywords):
                scope = scopes.get(node, {})
                extra = {keyword.arg: keyword.value for keyword in keywords}
                for parts in product(*(texts.of(e, scope) for e in (text, extra.get("key"), extra.get("remedy")))):
                    yield Message(f"{name}:{node.lineno}", *parts)


def parsed_package() -> dict[str, ast.Module]:
    return {str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def all_messages() -> list[Message]:
    modules = parsed_package()
    public = {name: f for module in modules.values() for name, f in functions_of(module).items() if name[0] != "_"}
    constants = {name: value for module in modules.values() for name, value in module_constants(module).items()}
    messages = []
    for name, module in modules.items():
        texts = Texts(public | functions_of(module), constants | module_constants(module))
        messages += messages_of(module, name, texts)
        if name == "sdtune/cli/messages.py":  # its texts reach the user by the converter in exit_codes.py
            messages += [Message(name, text) for text in texts.returned_by("composition_error")]
    return messages


MESSAGES = [message for message in all_messages() if not FORWARDED.fullmatch(message.text)]


def faults(message: Message) -> list[str]:
    """What ``message`` lacks of the form: what is wrong, where, what would be right."""
    found = []
    if len(message.full.replace("{}", "")) > LONGEST:
        found.append(f"longer than {LONGEST} characters")
    if message.full.endswith("."):
        found.append("ends with a period")
    if message.text == STOPPED:  # the line of Ctrl-C, which is not about an input
        return found
    what = message.text.split("; ")[0]
    is_completed = message.place.split(":")[0] in FILE_READERS and COMPLETED_BY_CALLER.match(what) is not None
    if not message.key and not is_completed and not PLACE.search(what):
        found.append("names no key, file, option or value")
    if not message.remedy and not STATES_WHAT_IS_RIGHT.search(message.text):
        found.append("does not say what would be right")
    return found


def test_all_messages_are_collected() -> None:
    calls = sum(
        len(re.findall(r"(?<!class )(?<!def )\b(?:UserError|refuse)\((?=[^)])", p.read_text(encoding="utf-8")))
        for p in CODE
    )
    assert len({message.place for message in all_messages() if message.place[-1].isdigit()}) == calls
    source = """
MAX = "max 3"
def check(x):
    remedy = "set " + "it"
    raise UserError(f"{MAX if x else describe()}, got {x}", key="a.b", remedy=remedy)
def describe() -> str:
    return "min 1"
"""
    assert list(messages_of(ast.parse(source), "f.py")) == [
        Message("f.py:5", "max 3, got {}", "a.b", "set it"),
        Message("f.py:5", "min 1, got {}", "a.b", "set it"),
    ]


def test_texts_of_the_command_line_are_collected() -> None:
    texts = {message.text for message in MESSAGES if message.place.startswith("sdtune/cli/")}
    assert "{}: unknown option; write settings as KEY=VALUE, without dashes" in texts
    assert "{}: the value is missing; write {}=VALUE" in texts
    assert "{}: unknown setting; did you mean {}?" in texts


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.place)
def test_message_has_the_form(message: Message) -> None:
    assert faults(message) == [], message.full


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (Message("f.py:1", "the value is invalid", remedy="use one of {}"), "names no key, file, option or value"),
        (Message("f.py:1", "no images", key="data.path"), "does not say what would be right"),
        (Message("f.py:1", "contains no images", key="data.path"), "does not say what would be right"),
        (Message("f.py:1", "the folder is in use", key="data.path"), "does not say what would be right"),
        (Message("f.py:1", "only 3 images", key="data.path"), "does not say what would be right"),
        (Message("f.py:1", "unreadable; nothing was done", key="data.path"), "does not say what would be right"),
        (Message("f.py:1", "the version 1.5 is too old", remedy="update it"), "names no key, file, option or value"),
        (Message("f.py:1", "{} failed", remedy="try again."), "ends with a period"),
        (Message("f.py:1", "x" * 200, "data.path", "set data.path=DIR"), "longer than 220 characters"),
    ],
)
def test_message_without_the_form_is_found(message: Message, fault: str) -> None:
    assert faults(message) == [fault]


@pytest.mark.parametrize("word", OLD_WORDS)
def test_messages_use_no_old_word(word: str) -> None:
    pattern = re.compile(rf"\b{re.escape(word)}\b")
    assert [message for message in MESSAGES if pattern.search(message.full)] == []
