"""What `build` makes of regularizer.replay: examples of earlier runs' training data, in this run's tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ftlab.config import Config, makes_classifier
from ftlab.data.labelled import encode_labelled, load_labelled
from ftlab.data.loader import Replay
from ftlab.data.records import Record, load_records
from ftlab.data.templates import ChatTemplate
from ftlab.data.tokenization import Example, encode_all
from ftlab.errors import FtlabError
from ftlab.models.labels import LabelSet
from ftlab.models.tokenizer import Tokenizer

__all__ = ["earlier_examples", "replay_note"]


def earlier_examples(
    config: Config, tokenizer: Tokenizer, template: ChatTemplate | None, labels: LabelSet | None
) -> list[Example]:
    """The training examples of every run in regularizer.replay.source; none with a share of 0.

    Each run's records are read by its own configuration (its files, splits, limits and system message, not what it
    replayed itself), and encoded by this one's tokenizer, template, data.max_length and data.too_long. Ids begin with
    the run's name, before it the run's place in the list if two have one name.

    Errors: FtlabError naming the run: one that learnt conversations where this one learns labels or the reverse, other
    labels, data that changed since, and a record that is too long.
    """
    settings = config.regularizer.replay
    found: list[Example] = []
    names = [Path(source).resolve().name for source in settings.source]
    for number, source in enumerate(settings.source if settings.share > 0 else ()):
        run = Path(source)
        records, earlier = _records(run)
        try:
            encode = _encoder(config, tokenizer, template, labels, earlier)
            examples = encode(records)
        except FtlabError as error:
            raise FtlabError(f"regularizer.replay.source: {source}: {error}") from error
        name = names[number] if len(set(names)) == len(names) else f"{number + 1}-{names[number]}"
        found += [replace(example, id=f"{name}/{example.id}") for example in examples]
    if settings.share > 0 and not found:
        raise FtlabError(
            "regularizer.replay.source: no earlier example is left; look at data.max_length and data.too_long"
        )
    return found


def _records(run: Path) -> tuple[list[Record], LabelSet | None]:
    """The training records of a run, and its labels. Errors: FtlabError if its data are not what they were."""
    from ftlab.open_run import read_config  # builds on `build`, which builds on this module

    earlier, record = read_config(run)
    labels = None
    if makes_classifier(earlier.data):
        splits, info, labels = load_labelled(earlier.data)
    else:
        splits, info = load_records(earlier.data)
    before = record.get("data", {}).get("sha256", info.sha256)
    if before != info.sha256:
        raise FtlabError(
            f"regularizer.replay.source: the data of {run} changed since that run ({info.location}); restore what they "
            "were, or leave the run out"
        )
    return splits.train, labels


def _encoder(
    config: Config,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    labels: LabelSet | None,
    earlier: LabelSet | None,
) -> Callable[[list[Record]], list[Example]]:
    """How records become examples of this run. Errors: FtlabError if the earlier run learnt something else."""
    if labels is None or earlier is None:
        if labels is not earlier:
            kinds = ("conversations", "labels") if earlier is None else ("labels", "conversations")
            raise FtlabError("that run learnt {} and this one learns {}; leave it out".format(*kinds))
        assert template is not None
        return functools.partial(encode_all, template=template, tokenizer=tokenizer, config=config.data)
    if labels != earlier:
        raise FtlabError(f"that run's labels ({earlier}) are not this one's ({labels})")
    assert makes_classifier(config.data)
    return functools.partial(encode_labelled, labels=labels, tokenizer=tokenizer, config=config.data)


def replay_note(config: Config, new: int, pool: int) -> str:
    """The line of the run's summary."""
    settings = config.regularizer.replay
    count = Replay((), settings.share).count(new)
    return (
        f"replay: each epoch has {new} new examples and {count} of the {pool} of {', '.join(settings.source)} "
        f"({count / (new + count):.1%})"
    )
