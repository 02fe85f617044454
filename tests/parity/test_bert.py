"""Tiny random encoders and the real MiniLM against transformers: hidden states, logits and every gradient in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from ftlab.assets import resolve
from ftlab.data.labelled import LabelledExample, collate_labelled
from ftlab.errors import FtlabError
from ftlab.losses.classification import classification_loss
from ftlab.models.bert import BertConfig, load_bert, random_bert
from ftlab.models.heads import BertClassifier, Head
from ftlab.models.labels import LabelSet
from ftlab.models.tokenizer import load_tokenizer

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tanh gelu, three layers": {"hidden_act": "gelu_new", "num_hidden_layers": 3},
    "relu, one head, wide norm": {"hidden_act": "relu", "num_attention_heads": 1, "layer_norm_eps": 1e-3},
    "three segments": {"type_vocab_size": 3, "intermediate_size": 24},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def their_config(**changes: Any) -> Any:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "initializer_range": 0.3,
    }
    return transformers.BertConfig(**(sizes | changes))


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Not id 0: transformers freezes the embedding of the padding token.
    ids = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(11)[None] < torch.tensor([[11], [4], [1]])
    types = (torch.arange(11)[None] >= torch.tensor([[5], [2], [9]])).long()
    return ids, mask, types


def shaken(model: Any) -> Any:
    """The model with norms and biases away from their neutral first values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_hidden_states_and_gradients(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = shaken(transformers.BertModel(their_config(**changes)))
    theirs.save_pretrained(tmp_path)
    ours = load_bert(tmp_path, pooler=True)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ids, mask, types = rows()
    h = ours(ids, mask, types)
    expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types)
    assert ours.pooler is not None
    torch.testing.assert_close(h[mask], expected.last_hidden_state[mask])
    torch.testing.assert_close(ours.pooler(h), expected.pooler_output)
    weights = torch.randn(3, 11, 32) * mask[..., None]
    ((h * weights).sum() + ours.pooler(h).sum()).backward()
    ((expected.last_hidden_state * weights).sum() + expected.pooler_output.sum()).backward()
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_masked_language_model_gives_its_encoder(tmp_path: Path) -> None:
    theirs = shaken(transformers.BertForMaskedLM(their_config()))
    theirs.save_pretrained(tmp_path)
    ours = load_bert(tmp_path)
    ids, mask, types = rows()
    expected = theirs.bert(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
    torch.testing.assert_close(ours(ids, mask, types)[mask], expected[mask])


def test_old_names_and_the_position_buffer(tmp_path: Path) -> None:
    theirs = shaken(transformers.BertModel(their_config()))
    theirs.save_pretrained(tmp_path)
    expected = load_bert(tmp_path).state_dict()
    state = load_file(tmp_path / "model.safetensors")
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    save_file(state | {"embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "model.safetensors")
    found = load_bert(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, "missing encoder.layer.1.output.dense.bias"),
        ({"classifier.weight": torch.zeros(2, 32)}, "unexpected classifier.weight"),
        ({"encoder.layer.0.output.dense.bias": torch.zeros(5)}, "misshapen encoder.layer.0.output.dense.bias"),
        ({"encoder.layer.0.output.dense.bias": torch.full((32,), torch.nan)}, "not finite"),
        ({"embeddings.LayerNorm.gamma": torch.zeros(32)}, "one tensor under two names"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    transformers.BertModel(their_config()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | change
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "model.safetensors")
    with pytest.raises(FtlabError, match=message):
        load_bert(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"embedding_size": 16}, "embedding_size=16 is not known"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
    ],
)
def test_configurations_that_compute_something_else_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = their_config().to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(FtlabError, match=message):
        load_bert(tmp_path)


def test_what_stands_behind_a_row_changes_nothing() -> None:
    model = random_bert(BertConfig(61, 32, 48, 2, 4, initializer_range=0.3), seed=0).eval()
    ids, mask, types = rows()
    other = torch.where(mask, ids, (ids + 7) % 61)
    assert torch.equal(model(ids, mask, types)[mask], model(other, mask, types)[mask])
    alone = model(ids[1:2, :4], mask[1:2, :4], types[1:2, :4])
    torch.testing.assert_close(alone[0], model(ids, mask, types)[1, :4])


def test_a_row_longer_than_the_positions_is_refused() -> None:
    model = random_bert(BertConfig(61, 32, 48, 1, 4, max_position_embeddings=8), seed=0)
    with pytest.raises(FtlabError, match="row of 11 tokens, but the encoder has 8"):
        model(*rows())


TEXTS = ["An abnormality of the structure of the kidney.", "Épilepsie!", "A seizure " * 30]


def minilm() -> Path:
    option = Path(__file__).parents[2] / "conf" / "model" / "minilm.yaml"
    return resolve(yaml.safe_load(option.read_text())["location"])


@pytest.mark.network
def test_the_real_minilm_with_its_tokenizer() -> None:
    folder = minilm()
    ours = load_bert(folder, pooler=True).eval()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer, their_tokenizer = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert ids == their_tokenizer(text).input_ids
    batch = their_tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        h = ours(batch.input_ids, mask)
        expected = theirs(**batch)
    torch.testing.assert_close(h[mask], expected.last_hidden_state[mask])
    assert ours.pooler is not None
    torch.testing.assert_close(ours.pooler(h), expected.pooler_output)


@pytest.mark.network
def test_a_classifier_on_the_real_minilm_gives_the_same_logits_and_gradients() -> None:
    """Both read the published file; the head is new, so ours is copied into theirs."""
    folder = minilm()
    labels = LabelSet("single", ("heart", "kidney", "skin"))
    ours = BertClassifier(load_bert(folder, pooler=True), Head(labels, "pooler", seed=1)).eval()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels.size).eval()
    torch.nn.init.normal_(ours.classifier.bias, generator=torch.Generator().manual_seed(2))
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    tokenizer = load_tokenizer(folder)
    examples = []
    for target, text in enumerate(TEXTS):
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        nothing = [False] * len(ids)
        examples.append(LabelledExample(str(target), ids, nothing, False, [0] * len(ids), target, text))
    batch = collate_labelled(examples, labels, pad_id=0)
    expected = theirs(batch.input_ids, attention_mask=batch.mask.long(), labels=batch.labels)
    torch.testing.assert_close(ours(batch), expected.logits)
    loss = classification_loss(ours, batch, "single") / len(TEXTS)
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    named = dict(theirs.named_parameters())
    assert named.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        # Below 1e-5, the default, lies much of what the lower layers get.
        torch.testing.assert_close(
            parameter.grad, named[name].grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
