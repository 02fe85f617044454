"""What each study of scripts/study.py compares."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PHRASES", "SEEDS", "STUDIES", "TUNING_SEED", "UPPER_HALF", "Entry", "Study"]

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
UPPER_HALF = r"layers\.(1[5-9]|2[0-9])\..*_proj"  # all projections of the upper 15 of SmolLM2's 30 layers


@dataclass(frozen=True)
class Entry:
    """One row of a table: the words that make it, and its settings, in order, of which one is chosen.

    `ladder`: the settings; three are tried from `start` on, and then the next one beyond as long as the best so far is
    the last or the first tried. Without a ladder nothing is chosen.
    `rate_of`: name of an earlier row of the same group whose chosen setting this row takes over.
    """

    group: str
    name: str
    words: tuple[str, ...]
    ladder: tuple[str, ...] = ()
    start: int = 0
    rate_of: str | None = None


@dataclass(frozen=True)
class Study:
    """Runs that share `common`. Each group of entries is a table; its first row is what the others are held against."""

    title: str
    subject: str  # in a few words, for the pages of what it measures
    text: tuple[str, ...]
    common: tuple[str, ...]
    entries: tuple[Entry, ...]
    scores: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    seed_words: tuple[str, ...] = ("training.seed={seed}", "data.shots_seed={seed}")
    tuning_words: tuple[str, ...] = ()

    def words_of_group(self, group: str) -> tuple[str, ...]:
        """What the runs of a group share beyond `common`."""
        return dict(self.groups)[group]


def _ladder(key: str, *values: str) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for value in values)


def _rates(*rates: str) -> tuple[str, ...]:
    return _ladder("optimizer.lr", *rates)


# --- classification: all-MiniLM-L6-v2, definition to organ system -----------------------------------------------------

MINILM = (
    *("model=minilm", "data.max_length=64", "data.too_long=truncate", "data.limit_validation=300"),
    *("data.limit_test=1000", "schedule=linear", "precision=bf16", "training.preflight=false", "parallel.threads=1"),
    *("evaluation.times=1", "evaluation.baseline=false", "checkpoint.metric=loss", "tracking=disabled"),
    "method.rates=[classifier:5]",
)
ORGAN = ("data=hpo_organ", "data.batch_size=32", "data.micro_batch_size=32")
CLASSIFIER_SCORES = ("accuracy", "ece", "loss")
WEIGHT_RATES = _rates("1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2")

EIGHT = "8 labels a class"
FEW_SHOT = Study(
    title="Eight labels a class: what trains",
    subject="MiniLM, definition to organ system",
    text=(
        "all-MiniLM-L6-v2 learns the organ system of a clinical term from its definition: 21 classes of the Human",
        "Phenotype Ontology, 8 labelled definitions a class, 5 epochs (30 steps), scored on 1000 others. Gradual",
        "unfreezing ends at stage 5 of 6: its lowest block, counted as trained, never trained.",
    ),
    common=(*MINILM, *ORGAN),
    scores=CLASSIFIER_SCORES,
    groups=((EIGHT, ("data.shots=8", "training.epochs=5")),),
    entries=(
        Entry(EIGHT, "full", ("method=full",), WEIGHT_RATES, 2),
        Entry(EIGHT, "linear probe", ("method=linear_probe",), _rates("1e-3", "3e-3", "1e-2", "3e-2", "1e-1"), 1),
        Entry(EIGHT, "BitFit", ("method=bitfit",), WEIGHT_RATES, 4),
        Entry(EIGHT, "upper third of the blocks", ("method=freeze",), WEIGHT_RATES, 3),
        Entry(EIGHT, "upper half", ("method=freeze", "method.frozen_fraction=0.5"), WEIGHT_RATES, 3),
        Entry(EIGHT, "LoRA, rank 16", ("method=lora_bert", "method.rank=16", "method.alpha=32"), WEIGHT_RATES, 4),
        Entry(EIGHT, "full, rates 0.8 a block downward", ("method=full", "method.layer_decay=0.8"), WEIGHT_RATES, 3),
        Entry(EIGHT, "gradual unfreezing, a block an epoch", ("method=gradual_unfreeze",), WEIGHT_RATES, 3),
        Entry(
            EIGHT,
            "gradual unfreezing, rates 0.8 a block downward",
            ("method=gradual_unfreeze", "method.layer_decay=0.8"),
            WEIGHT_RATES,
            3,
        ),
    ),
)

# --- L2-SP and weight decay by the number of labels -------------------------------------------------------------------

LABELS = (
    (EIGHT, ("data.shots=8", "training.epochs=5")),
    ("32 labels a class", ("data.shots=32", "training.epochs=3")),
    ("128 labels a class", ("data.shots=128", "training.epochs=1")),
)


def _held(group: str) -> tuple[Entry, ...]:
    held = (*("1e-4", "1e-3", "1e-2", "1e-1", "1", "10"),)
    in_step = (*("1e-1", "1", "10", "100", "1000"),)
    l2_sp = "regularizer.l2_sp.strength"
    return (
        Entry(group, "full", ("method=full",), WEIGHT_RATES, 2),
        Entry(
            group,
            "weight decay",
            ("method=full",),
            _ladder("optimizer.weight_decay", "1e-2", "1e-1", "1", "10", "30"),
            1,
            rate_of="full",
        ),
        Entry(group, "L2-SP", ("method=full", "regularizer.l2_sp.beta=0.001"), _ladder(l2_sp, *held), 1, "full"),
        Entry(
            group,
            "L2-SP in the optimizer's step",
            ("method=full", "regularizer.l2_sp.mode=decoupled"),
            _ladder(l2_sp, *in_step),
            1,
            "full",
        ),
    )


L2_SP = Study(
    title="L2-SP and weight decay, by the number of labels",
    subject="MiniLM, all weights, definition to organ system",
    text=(
        "All weights of all-MiniLM-L6-v2 learn the organ system of a clinical term from its definition (21 classes,",
        "scored on 1000 texts). At each number of labels the learning rate is chosen without a penalty and kept. L2-SP",
        "pulls the new head to zero with beta = 0.001, the other rows have no such pull.",
    ),
    common=(*MINILM, *ORGAN),
    scores=CLASSIFIER_SCORES,
    groups=LABELS,
    entries=tuple(entry for group, _ in LABELS for entry in _held(group)),
)

# --- generation: SmolLM2-135M-Instruct, lay phrase to clinical term ---------------------------------------------------

TERM = "60 rows of 512 tokens"
GENERATION = Study(
    title="What trains, in generation",
    subject="SmolLM2, lay phrase to clinical term, 60 steps",
    text=(
        "SmolLM2-135M-Instruct learns to give the clinical term of a layperson's phrase: 60 steps of one row of 512",
        "tokens each, scored by greedy answers to 300 held-out phrases. QLoRA takes the rate that was chosen for LoRA.",
    ),
    common=(
        *("model=smollm2_135m", "data=hpo_lay_to_clinical", "data.template=chatml", "data.max_length=256"),
        *("data.row_length=512", "data.pad_rows=true", "data.batch_size=1", "data.micro_batch_size=1"),
        *("data.limit_validation=150", "data.limit_test=300", "schedule=cosine", "precision=bf16"),
        *("training.max_steps=60", "training.preflight=false", "parallel.threads=1", "evaluation.times=1"),
        *("evaluation.baseline=false", "evaluation.max_new_tokens=24", "checkpoint.metric=loss"),
        "tracking=disabled",
    ),
    scores=("exact_match", "token_f1", "loss"),
    groups=((TERM, ()),),
    seed_words=("training.seed={seed}",),
    tuning_words=("evaluation.generate=false", "data.limit_test=1"),
    entries=(
        Entry(TERM, "LoRA, rank 16", ("method=lora", "method.rank=16", "method.alpha=32"), WEIGHT_RATES, 4),
        Entry(
            TERM, "QLoRA (NF4), rank 16", ("method=qlora", "method.rank=16", "method.alpha=32"), rate_of="LoRA, rank 16"
        ),
        Entry(TERM, "full", ("method=full",), WEIGHT_RATES, 2),
        Entry(TERM, "upper half of the blocks", ("method=freeze", "method.frozen_fraction=0.5"), WEIGHT_RATES, 2),
        Entry(TERM, "upper third", ("method=freeze",), WEIGHT_RATES, 2),
    ),
)

# --- dropout by the size of the data and the task ---------------------------------------------------------------------

DROPOUT_GROUPS = (
    ("organ system, 8 labels a class", (*ORGAN, "data.shots=8")),
    ("organ system, 32 labels a class", (*ORGAN, "data.shots=32")),
    (
        "spam, 32 labels a class",
        ("data=spam_assassin", "data.batch_size=16", "data.micro_batch_size=16", "data.shots=32"),
    ),
    (
        "spam, 128 labels a class",
        ("data=spam_assassin", "data.batch_size=16", "data.micro_batch_size=16", "data.shots=128"),
    ),
)
DROPOUT = Study(
    title="Dropout, by the size of the data and the task",
    subject="MiniLM, all weights, 60 steps",
    text=(
        "All weights of all-MiniLM-L6-v2 train for 60 steps at the learning rate 3e-4, with dropout of the same p on",
        "the embedding, on attention, in the blocks and before the new head. Organ systems of clinical definitions (21",
        "classes, 32 texts a step: 11 and 3 times over 168 and 672 labelled ones), and mail that is spam or not (16 a",
        "step, the first 64 tokens of each: 15 and 4 times over 64 and 256 mails). Scored on 1000 texts.",
    ),
    common=(*MINILM, "method=full", "optimizer.lr=3e-4", "training.max_steps=60"),
    scores=CLASSIFIER_SCORES,
    groups=DROPOUT_GROUPS,
    entries=tuple(
        Entry(
            group,
            f"p = {p}",
            tuple(f"regularizer.dropout.{place}={p}" for place in ("embedding", "residual", "attention", "head")),
        )
        for group, _ in DROPOUT_GROUPS
        for p in ("0", "0.1", "0.2", "0.4")
    ),
)

# --- SmolLM2-135M-Instruct with LoRA in its upper half, 60 steps of 16 phrases: what study_soups.py mixes ------------

PHRASES = (
    *("model=smollm2_135m", "data=hpo_lay_to_clinical", "data.template=chatml", "data.max_length=96"),
    *("data.too_long=drop", "data.packing=false", "data.batch_size=16", "data.micro_batch_size=16"),
    *("data.limit_validation=150", "data.limit_test=300", f"method.targets=['{UPPER_HALF}']"),
    *("schedule=cosine", "precision=bf16", "training.max_steps=60", "training.preflight=false", "parallel.threads=1"),
    *("evaluation.times=1", "evaluation.baseline=false", "evaluation.max_new_tokens=24", "checkpoint.metric=loss"),
    *("tracking=disabled", "method=lora", "method.rank=16", "method.alpha=32", "optimizer.lr=3e-3"),
)

# --- classification again: the LoRA family, regularizers, noise -------------------------------------------------------

BERT_ADAPTERS = ("method.targets=[query,key,value,dense]", "method.alpha=32")
ADAPTERS = Study(
    title="The LoRA family",
    subject="MiniLM, definition to organ system",
    text=(
        "all-MiniLM-L6-v2 learns the organ system of a clinical term from its definition (21 classes, 8 labelled",
        "definitions each, 5 epochs, 30 steps, scored on 1000 others) with adapters on all linear layers. The rate is",
        "chosen for each row by itself. alpha is 32 everywhere.",
    ),
    common=(*MINILM, *ORGAN),
    scores=CLASSIFIER_SCORES,
    groups=tuple(
        (f"rank {rank}", (*BERT_ADAPTERS, f"method.rank={rank}", "data.shots=8", "training.epochs=5"))
        for rank in (16, 64)
    ),
    entries=(
        Entry("rank 16", "LoRA", ("method=lora",), WEIGHT_RATES, 4),
        Entry("rank 16", "LoRA+", ("method=lora_plus",), WEIGHT_RATES, 3),
        Entry("rank 16", "PiSSA", ("method=pissa",), WEIGHT_RATES, 3),
        Entry("rank 16", "DoRA", ("method=dora",), WEIGHT_RATES, 4),
        Entry("rank 64", "LoRA", ("method=lora",), WEIGHT_RATES, 4),
        Entry("rank 64", "rsLoRA", ("method=lora", "method.rslora=true"), WEIGHT_RATES, 3),
    ),
)

THIRTY_TWO = "32 labels a class"
TENTH = ("regularizer.dropout.embedding=0.1", "regularizer.dropout.residual=0.1")
AT_ONE_RATE = "32 labels a class, at a constant rate"
REGULARIZERS = Study(
    title="Regularizers one by one",
    subject="MiniLM, all weights, definition to organ system",
    text=(
        "All weights of all-MiniLM-L6-v2 learn the organ system of a clinical term from its definition (21 classes,",
        "scored on 1000 texts). The learning rate is chosen without a regularizer and kept for all of a table. R-Drop",
        "has the dropout of the row above it too. R-Drop and SAM do about twice the work in as many steps.",
    ),
    common=(*(word for word in MINILM if word != "schedule=linear"), *ORGAN, "method=full"),
    scores=CLASSIFIER_SCORES,
    groups=(
        (THIRTY_TWO, ("data.shots=32", "training.epochs=3", "schedule=linear")),
        (AT_ONE_RATE, ("data.shots=32", "training.epochs=3", "schedule=constant")),
    ),
    entries=(
        Entry(THIRTY_TWO, "plain", (), WEIGHT_RATES, 2),
        Entry(THIRTY_TWO, "dropout 0.1", TENTH, rate_of="plain"),
        *(
            Entry(THIRTY_TWO, name, words, _ladder(f"regularizer.{key}", *values), 1, "plain")
            for name, words, key, values in (
                ("R-Drop", TENTH, "r_drop", ("0.1", "0.3", "1", "3", "10")),
                ("label smoothing", (), "label_smoothing", ("0.01", "0.02", "0.05", "0.1", "0.2", "0.4")),
                ("mixout", (), "mixout", ("0.1", "0.3", "0.5", "0.7", "0.9")),
                ("SAM", (), "sam", ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5")),
                ("L2", (), "l2.strength", ("1e-6", "1e-5", "1e-4", "1e-3", "1e-2")),
                ("L1-SP", (), "l1_sp.strength", ("1e-7", "1e-6", "1e-5", "1e-4", "1e-3")),
            )
        ),
        Entry(AT_ONE_RATE, "plain", (), WEIGHT_RATES, 1),
        Entry(
            AT_ONE_RATE,
            "EMA",
            ("regularizer=ema",),
            _ladder("regularizer.average.decay", "0.5", "0.8", "0.9", "0.95", "0.98"),
            1,
            "plain",
        ),
        Entry(
            AT_ONE_RATE,
            "SWA",
            ("regularizer=swa",),
            _ladder("regularizer.average.start", "0.1", "0.25", "0.5", "0.75", "0.9"),
            1,
            "plain",
        ),
    ),
)

NOISE = Study(
    title="Noise inside the model",
    subject="MiniLM, all weights, definition to organ system",
    text=(
        "All weights of all-MiniLM-L6-v2 learn the organ system of a clinical term from its definition (21 classes,",
        "8 labelled definitions each, 5 epochs, 30 steps, scored on 1000 others). The learning rate is chosen without",
        "noise and kept. It is high: with 3e-4 the [same runs reach 63 %](few-shot.md), so what noise is worth at a",
        "lower rate is not said here.",
    ),
    common=(*MINILM, *ORGAN, "method=full"),
    scores=CLASSIFIER_SCORES,
    groups=((EIGHT, ("data.shots=8", "training.epochs=5")),),
    entries=(
        Entry(EIGHT, "plain", (), WEIGHT_RATES, 2),
        Entry(
            EIGHT,
            "stochastic depth",
            (),
            _ladder("regularizer.stochastic_depth", "0.05", "0.1", "0.2", "0.3", "0.5"),
            0,
            "plain",
        ),
        Entry(EIGHT, "NEFTune", (), _ladder("regularizer.neftune", "1", "2", "5", "10", "20"), 1, "plain"),
    ),
)

STUDIES = {
    "few_shot": FEW_SHOT,
    "generation": GENERATION,
    "l2_sp": L2_SP,
    "dropout": DROPOUT,
    "adapters": ADAPTERS,
    "regularizers": REGULARIZERS,
    "noise": NOISE,
}
