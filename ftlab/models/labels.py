"""The labels of a classifier: their kind and their names, in an order that is part of the run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlab.errors import FtlabError

__all__ = ["Label", "LabelSet", "Target", "label_text"]

Label = str | tuple[str, ...] | float  # one label, several, or a number
Target = int | tuple[float, ...] | float  # its index, 0 or 1 for each label, or the number

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


def label_text(label: Label) -> str:
    """A label as a person reads it."""
    if isinstance(label, tuple):
        return ", ".join(sorted(label)) or "(none)"
    # All digits, so that a number in a file is the number that was read or predicted.
    return label if isinstance(label, str) else repr(float(label)).removesuffix(".0")


@dataclass(frozen=True)
class LabelSet:
    """kind: single, multi or regression. names: sorted; empty for regression."""

    kind: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, kind: str, labels: Iterable[Label]) -> LabelSet:
        """The set that training labels fix. Errors: FtlabError if there is nothing to tell apart."""
        if kind == "regression":
            return cls(kind, ())
        names: set[str] = set()
        for label in labels:
            names.update(label if isinstance(label, tuple) else [str(label)])
        if len(names) < 2 - (kind == "multi"):
            least = "one" if kind == "multi" else "two"
            raise FtlabError(
                f"the training records have the labels {sorted(names)}: a classifier needs {least} or more "
                f"(data.labels={kind})"
            )
        return cls(kind, tuple(sorted(names)))

    def __str__(self) -> str:
        """The kind and the first names, as a line for the user has them."""
        listed = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        return f"{self.kind}: {listed}" if self.names else self.kind

    @property
    def size(self) -> int:
        """Numbers that the head gives for a text."""
        return max(len(self.names), 1)

    def target(self, label: Label, where: str) -> Target:
        """What a label is learnt as. Errors: FtlabError naming a label that no training record has, and `where`."""
        if self.kind == "regression":
            return float(label)  # type: ignore[arg-type]
        if self.kind == "single":
            return self._index(str(label), where)
        assert isinstance(label, tuple)
        chosen = {self._index(name, where) for name in label}
        return tuple(float(index in chosen) for index in range(self.size))

    def _index(self, name: str, where: str) -> int:
        try:
            return self.names.index(name)
        except ValueError:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FtlabError(
                f"{where}: no training record has the label {name!r} (they have {', '.join(self.names[:8])}"
                f"{', ...' if self.size > 8 else ''}){hint}"
            ) from None

    def predicted(self, scores: Sequence[float]) -> str:
        """The answer behind one text's probabilities (the likeliest label, or all from 1/2 on) or number."""
        if self.kind == "regression":
            return label_text(float(f"{scores[0]:.7g}"))  # as many digits as fp32 has
        if self.kind == "multi":
            return label_text(tuple(name for name, score in zip(self.names, scores, strict=True) if score >= 0.5))
        return self.names[max(range(self.size), key=lambda index: scores[index])]

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {"kind": self.kind, "names": list(self.names)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LabelSet:
        """Back from run.json."""
        return cls(str(fields["kind"]), tuple(fields["names"]))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json that tell labels."""
        names = self.names or ("value",)
        return {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": PROBLEMS[self.kind],
        }

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], where: str) -> LabelSet:
        """Back from such fields, or those of a config.json that transformers wrote, which leaves defaults out.

        Without id2label there are two labels; without problem_type one output is a number, and several are one label a
        text. A number of several outputs keeps their names, so that no run's labels are like it.

        Errors: FtlabError, beginning with `where`, if id2label does not number its names from 0 or the kind is unknown.
        """
        table = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        numbers = [str(number) for number in range(len(table))] if isinstance(table, Mapping) else []
        if not numbers or set(table) != set(numbers):
            raise FtlabError(f"{where}: id2label must give each number from 0 on a label; write the folder again")
        names = tuple(str(table[number]) for number in numbers)
        kinds = {problem: kind for kind, problem in PROBLEMS.items()}
        problem = fields.get("problem_type") or PROBLEMS["regression" if len(names) == 1 else "single"]
        if problem not in kinds:
            raise FtlabError(f"{where}: problem_type={problem!r} is none of {', '.join(kinds)}; write the folder again")
        kind = kinds[problem]
        return cls(kind, () if kind == "regression" and len(names) == 1 else names)
