from __future__ import annotations

import hashlib
import itertools

import pytest

from ftlab.data.sources.sentence_templates import AnyOrder, Chain, Choice, Draw, Named, draw_sentence, parse_template
from ftlab.errors import FtlabError


def drawn(template: str, named: dict[str, str] | None = None, number: int = 300) -> set[str]:
    """What comes of many draws, with single spaces."""
    node = parse_template(template)
    rules = {name: parse_template(text) for name, text in (named or {}).items()}
    return {" ".join(draw_sentence(node, rules, Draw(f"{template}{i}")).split()) for i in range(number)}


def test_a_template_as_a_tree() -> None:
    assert parse_template("never mind") == "never mind"
    assert parse_template("<turn> [on|off] ({area:room};a)") == Chain(
        (Named("<turn>"), " ", Choice(("on", "off", "")), " ", AnyOrder((Named("{area}"), "a")))
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("(a|b) c", {"a c", "b c"}),
        ("a|b c", {"a", "b c"}),
        ("light[s]", {"light", "lights"}),
        ("[a|b]c", {"ac", "bc", "c"}),
        ("4( |-)hour", {"4 hour", "4-hour"}),
        ("[[of ](the|my)] x", {"x", "the x", "my x", "of the x", "of my x"}),
        ("(a;b;c)", {" ".join(order) for order in itertools.permutations("abc")}),
        ("(go (to|in) x;[now])", {"go to x", "go in x", "go to x now", "now go to x", "go in x now", "now go in x"}),
        ("把[灯]{on:state}", {"把开", "把灯开", "把关", "把灯关"}),
        ("<all>", {"all", "all my rooms", "all the rooms"}),
    ],
)
def test_every_sentence_of_a_template_is_drawn_and_no_other(template: str, expected: set[str]) -> None:
    named = {"{on}": "开|关", "<all>": "all [<the> rooms]", "<the>": "(my|the)"}
    assert drawn(template, named) == expected


def test_choices_are_about_even() -> None:
    draws = [Draw(f"x{i}").below(4) for i in range(4000)]
    assert all(900 < draws.count(value) < 1100 for value in range(4))


def test_a_draw_depends_on_its_name_alone() -> None:
    first, second = Draw("same"), Draw("same")
    assert [first.below(1000) for _ in range(5)] == [second.below(1000) for _ in range(5)]
    digest = hashlib.sha256(b"same\x000").digest()
    assert Draw("same").below(1000) == int.from_bytes(digest[:8], "big") % 1000


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("(a|b", "a \\) is missing"),
        ("[a", "a \\] is missing"),
        ("a)", "\\) closes nothing"),
        ("a]", "\\] closes nothing"),
        ("(a]", "\\] closes nothing"),
        ("<a", "expected a name between < and >"),
        ("{}", "expected a name between { and }"),
        ("{a(b}", "expected a name between { and }"),
        ("(a|b;c)", "\\| and ; stand in one group"),
        ("(" * 50 + ")" * 50, "more than 40 brackets"),
    ],
)
def test_broken_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(FtlabError, match=message):
        parse_template(template)


def test_names_must_be_known_and_end() -> None:
    with pytest.raises(FtlabError, match="<b> is not known"):
        drawn("<a>", {"<a>": "<b>"})
    with pytest.raises(FtlabError, match="does a rule need itself"):
        drawn("<a>", {"<a>": "x <b>", "<b>": "<a>"})
