"""Chat templates: a conversation to text, and to tokens that know which of them are learnt.

A template is a jinja2 program that may come from a stranger's model, so it runs in jinja2's sandbox. It is rendered
with a mark in place of every message's content; the text between the marks is the template's own, the rest is the
user's. So each piece is tokenised for what it is: only the template's text can yield control tokens, and the learnt
part is the assistant's content and its end-of-turn token, byte for byte, wherever a tokenizer would like to merge.

Named templates (B and E are the tokenizer's BOS and EOS):

- ``model``: the template that comes with the tokenizer.
- ``chatml``: ``<|im_start|>role\\ncontent<|im_end|>\\n`` for every message.
- ``plain``: ``content\\n`` for a system message, ``人类:content\\n`` for the user, ``AI:contentE`` for the assistant,
  and a newline between an answer and the next question. For base models: it needs no special token but E.

BOS is in the tokens exactly when the template writes it; none is ever added, as for a template in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftlab.data.records import Message
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import sha256_bytes
from ftlab.models.tokenizer import Tokenizer

__all__ = ["NAMED_TEMPLATES", "ChatTemplate", "Segment"]

NAMED_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'AI:' + message['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% else %}{{ ('人类:' if message['role'] == 'user' else '') + message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'AI:' }}{% endif %}"
    ),
}
# Templates may write today's date; a fixed one keeps training and generation, today and next year, the same.
TEMPLATE_DATE = datetime(2024, 7, 26)
# Two private-use characters around the number of a message: a mark that no template writes by itself.
MARK_OPEN, MARK_CLOSE = "\ue5c0", "\ue5c1"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the rendered text.

    `supervised`: learnt. `content`: written by a user or a model, so a control token's spelling in it is plain text.
    """

    text: str
    supervised: bool
    content: bool = False


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the contents of a sequence of roles.

    `literals` are the texts before, between and after the contents: one more than messages. `turn_ends` gives for each
    assistant message the length of the part of the following literal that ends the turn, its stop token included.
    """

    literals: tuple[str, ...]
    turn_ends: Mapping[int, int]


class GenerationTag(Extension):
    """Accepts ``{% generation %}...{% endgeneration %}``, a hint for other tools, and renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set attribute)

    def parse(self, parser: Parser) -> list[Node]:
        """The enclosed nodes."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as text; jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def compile_template(source: str, where: str) -> jinja2.Template:
    """The program in a sandbox, with what templates of published models expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: not a jinja template: {error.message}") from None


class ChatTemplate:
    """A template and the tokenizer whose tokens it writes. Make one with `load`."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.source = source
        self.tokenizer = tokenizer
        self.bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        self.eos = tokenizer.token(tokenizer.eos_id)
        self.stops = sorted((tokenizer.token(id) for id in tokenizer.stop_ids), key=len, reverse=True)
        self.fingerprint = sha256_bytes(json.dumps([source, self.bos, self.eos]).encode())
        self._program = compile_template(source, name)
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}
        self._literal_ids: dict[str, list[int]] = {}
        self._check_tokenizer()

    @classmethod
    def load(cls, spec: str, tokenizer: Tokenizer) -> ChatTemplate:
        """`spec` is model, chatml, plain or the path of a jinja file.

        Raises ConfigError if there is no such template, or if its answers do not end in a token that stops generation.
        """
        if spec == "model":
            if tokenizer.chat_template is None:
                raise ConfigError("data.template=model: the tokenizer brings no chat template; use chatml or plain")
            template = cls("the model's chat template", tokenizer.chat_template, tokenizer)
        elif spec in NAMED_TEMPLATES:
            template = cls(spec, NAMED_TEMPLATES[spec], tokenizer)
        else:
            path = Path(spec).expanduser()
            if not path.is_file():
                raise ConfigError(
                    f"data.template={spec}: no such file; use model, chatml, plain or a jinja file's path"
                )
            try:
                template = cls(str(path), path.read_text("utf-8"), tokenizer)
            except UnicodeDecodeError:
                raise ConfigError(f"data.template={spec}: not UTF-8 text") from None
        try:
            template.skeleton(("user", "assistant"))
        except FtlabError as error:
            raise ConfigError(f"data.template={spec}: {error}") from None
        return template

    # --- text -------------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The template's text for a conversation."""
        try:
            return self._program.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                tools=None,
                documents=None,
            )
        except Exception as error:  # a template is a program: anything may come out of it
            raise FtlabError(f"{self.name} refuses this conversation: {type(error).__name__}: {error}") from None

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Pieces whose texts together are `render(messages)`; supervised are every answer and the end of its turn.

        Raises FtlabError if the template writes a message otherwise than given (white space around it may go), leaves
        one out, or rewrites a turn when later ones follow.
        """
        skeleton = self.skeleton(tuple(message.role for message in messages))
        contents = self._contents(skeleton, messages)
        pieces = [Segment(skeleton.literals[0], False)]
        for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
            after = skeleton.literals[index + 1]
            end = skeleton.turn_ends.get(index, 0)
            answer = message.role == "assistant"
            pieces += [Segment(content, answer, content=True), Segment(after[:end], True), Segment(after[end:], False)]
        return [piece for piece in pieces if piece.text]

    def prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The pieces up to where the next answer begins; no piece is supervised.

        `messages` end with a user's turn; an answer at the end is left out.
        """
        asked = messages[:-1] if messages and messages[-1].role == "assistant" else messages
        extended = [*asked, Message("assistant", mark(len(asked)))]
        skeleton = self.skeleton(tuple(message.role for message in extended))
        contents = self._contents(skeleton, extended)
        pieces = [Segment(skeleton.literals[0], False)]
        for content, after in zip(contents[:-1], skeleton.literals[1:-1], strict=True):
            pieces += [Segment(content, False, content=True), Segment(after, False)]
        return [piece for piece in pieces if piece.text]

    def _contents(self, skeleton: Skeleton, messages: Sequence[Message]) -> list[str]:
        """Each message's content as the template wrote it, found in the full text."""
        text = self.render(messages)
        position, contents = 0, []
        for index, message in enumerate(messages):
            position += len(skeleton.literals[index])
            follows = skeleton.literals[index + 1]
            given = message.content
            for candidate in (given, given.strip(), given.rstrip(), given.lstrip()):
                end = position + len(candidate)
                if text.startswith(candidate, position) and text.startswith(follows, end):
                    contents.append(candidate)
                    position = end
                    break
            else:
                raise FtlabError(
                    f"{self.name} changes the text of message {index} ({message.role}): use another template"
                )
        whole = "".join(part for pair in zip(skeleton.literals, [*contents, ""], strict=True) for part in pair)
        if whole != text:
            raise FtlabError(
                f"{self.name} writes this conversation unlike others with the same roles: use another template"
            )
        return contents

    # --- the template's own text ------------------------------------------------------------------------------------

    def skeleton(self, roles: tuple[str, ...]) -> Skeleton:
        """What the template writes around the contents of these roles; found once for each sequence of roles."""
        known = self._skeletons.get(roles)
        if known is None:
            known = self._skeletons[roles] = self._find_skeleton(roles)
        return known

    def _find_skeleton(self, roles: tuple[str, ...]) -> Skeleton:
        messages = [Message(role, mark(index)) for index, role in enumerate(roles)]
        literals = split_at_marks(self.render(messages), len(roles), self.name)
        turn_ends = {}
        for index, role in enumerate(roles):
            if role != "assistant":
                continue
            start = "".join(literals[number] + mark(number) for number in range(index)) + literals[index]
            prompt = self.render(messages[:index], add_generation_prompt=True)
            alone = literals if index == len(roles) - 1 else self.skeleton(roles[: index + 1]).literals
            same = alone[: index + 1] == literals[: index + 1] and literals[index + 1].startswith(alone[index + 1])
            if not same or not start.startswith(prompt):
                raise FtlabError(
                    f"{self.name} rewrites earlier turns, or asks for an answer otherwise than it writes one: message "
                    f"{index} is not preceded by what precedes it in generation; split the conversation into records "
                    "of one answer each, or use another template"
                )
            turn_ends[index] = self._turn_end(literals[index + 1])
        return Skeleton(literals, turn_ends)

    def _turn_end(self, literal: str) -> int:
        """The length of what ends an answer: all up to the first token that stops a generation."""
        found = [(place, stop) for stop in self.stops if (place := literal.find(stop)) >= 0]
        if found:
            place, stop = min(found, key=lambda pair: pair[0])  # self.stops has the longest first
            end = place + len(stop)
            if self.tokenizer.encode(literal[:end], allow_special=True)[-1] in self.tokenizer.stop_ids:
                return end
        raise FtlabError(
            f"{self.name} ends an answer with {literal[:40]!r}, which has none of the tokens that stop this model "
            f"({', '.join(self.stops)}): it would never learn to stop; use another template"
        )

    # --- tokens -----------------------------------------------------------------------------------------------------

    def token_ids(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Ids and their label flags. Every segment is tokenised by itself, so none shares a token with another."""
        ids: list[int] = []
        supervised: list[bool] = []
        for segment in segments:
            if segment.content:
                new = self.tokenizer.encode(segment.text, allow_special=False)
            elif (known := self._literal_ids.get(segment.text)) is not None:
                new = known
            else:
                new = self._literal_ids[segment.text] = self.tokenizer.encode(segment.text, allow_special=True)
            ids += new
            supervised += [segment.supervised] * len(new)
        bos = self.tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise FtlabError(f"{self.name} begins with two BOS tokens ({self.bos}): take one out")
        return ids, supervised

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to where the next answer begins: exactly those that come before it in training.

        `messages` end with a user's turn; an answer at the end is left out.
        """
        return self.token_ids(self.prompt_segments(messages))[0]

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer that puts something between two pieces, such as a space before each."""
        pieces = ["a", " b", "\n", "c"]
        ids = [id for piece in pieces for id in self.tokenizer.encode(piece)]
        if (text := self.tokenizer.decode(ids)) != "".join(pieces):
            raise FtlabError(
                f"this tokenizer turns {''.join(pieces)!r} in pieces into {text!r}: it cannot be used piece by piece, "
                "and labels would not be exact"
            )


def mark(index: int) -> str:
    """The text that stands for the content of a message."""
    return f"{MARK_OPEN}{index}{MARK_CLOSE}"


def split_at_marks(text: str, count: int, name: str) -> tuple[str, ...]:
    """The texts around marks 0 to count - 1, each of which must be there once and in order."""
    literals, position = [], 0
    for index in range(count):
        place = text.find(mark(index))
        if place < position or text.count(mark(index)) != 1:
            raise FtlabError(f"{name} leaves out, repeats or moves message {index}: use another template")
        literals.append(text[position:place])
        position = place + len(mark(index))
    literals.append(text[position:])
    return tuple(literals)
