"""Sentence templates in the grammar of hassil, and sentences drawn from them.

====================  =========================================================================
``(a|b)``             one of them
``[a]``, ``[a|b]``    nothing, or one of them
``(a;b)``             all of them, in any order, with spaces between
``<rule>``            the template of that name
``{list}``            a value of that list; ``{list:slot}`` too, the slot says what it is for
====================  =========================================================================

Source: hassil, https://github.com/OHF-Voice/hassil. Differs from it: sentences are drawn by a hash, not listed, so a
template of millions costs what one of ten costs; each choice is uniform over its options. Escapes are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ftlab.errors import FtlabError

__all__ = ["AnyOrder", "Chain", "Choice", "Draw", "Named", "Node", "draw_sentence", "parse_template"]

MAX_DEPTH = 40  # brackets and names within one another; a rule that needs itself is met by it
CLOSING = {"(": ")", "[": "]", "<": ">", "{": "}"}
SPECIAL = set("()[]<>{}|;")


@dataclass(frozen=True)
class Chain:
    """Parts one after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class AnyOrder:
    """All parts, in any order."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Named:
    """A rule or a list, with its brackets and without a slot: ``<rule>``, ``{list}``."""

    name: str


Node = str | Chain | Choice | AnyOrder | Named


def parse_template(template: str) -> Node:
    """The template as a tree. Errors: FtlabError with the template and what is wrong in it."""
    node, _ = _branches(template, 0, "", 0)
    return node


def _branches(template: str, start: int, closing: str, depth: int) -> tuple[Node, int]:
    """What stands between `start` and the closing bracket ("": the end), and the place after that bracket."""
    if depth > MAX_DEPTH:
        raise FtlabError(f"template {template!r}: more than {MAX_DEPTH} brackets within one another")
    branches: list[list[Node]] = [[]]
    between: set[str] = set()
    at = start
    while at < len(template) and template[at] != closing:
        char = template[at]
        if char in "([":
            inner, at = _branches(template, at + 1, CLOSING[char], depth + 1)
            branches[-1].append(_optional(inner) if char == "[" else inner)
        elif char in "<{":
            end = template.find(CLOSING[char], at)
            name = template[at + 1 : end].partition(":")[0]
            if end < 0 or not name or SPECIAL & set(name):
                raise FtlabError(f"template {template!r}: expected a name between {char} and {CLOSING[char]}")
            branches[-1].append(Named(char + name + CLOSING[char]))
            at = end + 1
        elif char in "|;":
            between.add(char)
            branches.append([])
            at += 1
        elif char in SPECIAL:
            raise FtlabError(f"template {template!r}: {char} closes nothing")
        else:
            end = next((place for place in range(at, len(template)) if template[place] in SPECIAL), len(template))
            branches[-1].append(template[at:end])
            at = end
    if at >= len(template) and closing:
        raise FtlabError(f"template {template!r}: a {closing} is missing")
    if len(between) > 1:
        raise FtlabError(f"template {template!r}: | and ; stand in one group; put brackets around one of them")
    nodes: tuple[Node, ...] = tuple(part[0] if len(part) == 1 else Chain(tuple(part)) for part in branches)
    if not between:
        return nodes[0], at + 1
    return Choice(nodes) if between == {"|"} else AnyOrder(nodes), at + 1


def _optional(node: Node) -> Choice:
    return Choice((*node.options, "")) if isinstance(node, Choice) else Choice((node, ""))


class Draw:
    """A row of numbers that is a function of its name alone: the same on every machine, and in every order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.drawn = 0

    def below(self, limit: int) -> int:
        """The next number, from 0 to limit - 1."""
        digest = hashlib.sha256(f"{self.name}\0{self.drawn}".encode()).digest()
        self.drawn += 1
        return int.from_bytes(digest[:8], "big") % limit


def draw_sentence(node: Node, named: Mapping[str, Node], draw: Draw, depth: int = 0) -> str:
    """One sentence, with the spaces as they come.

    Args:
        node: a parsed template.
        named: rules and lists by name, with their brackets.
        draw: decides at each choice.
        depth: how many nodes this one is within.

    Raises:
        FtlabError: a name that is not known, or a rule that needs itself.
    """
    if isinstance(node, str):
        return node
    if depth > 3 * MAX_DEPTH:
        raise FtlabError(f"more than {3 * MAX_DEPTH} rules and brackets within one another; does a rule need itself?")
    if isinstance(node, Named):
        if node.name not in named:
            raise FtlabError(f"{node.name} is not known")
        return draw_sentence(named[node.name], named, draw, depth + 1)
    if isinstance(node, Choice):
        return draw_sentence(node.options[draw.below(len(node.options))], named, draw, depth + 1)
    if isinstance(node, Chain):
        return "".join(draw_sentence(part, named, draw, depth + 1) for part in node.parts)
    left = list(node.parts)
    shuffled = [left.pop(draw.below(len(left))) for _ in node.parts]
    return " ".join(draw_sentence(part, named, draw, depth + 1) for part in shuffled)
