from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftlab.models.attention import Documents
from ftlab.models.configuration import RopeScaling
from ftlab.models.llama import KVCache, LlamaForCausalLM, RMSNorm, rotary_frequencies
from ftlab.models.loading import initialise, random_llama
from tests.helpers.models import random_ids, tiny_config, tiny_llama


def gradients(model: LlamaForCausalLM, logits: Tensor) -> list[Tensor]:
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad(logits, list(model.parameters()), upstream))


def test_parameter_names_are_those_of_the_checkpoint() -> None:
    names = set(random_llama(tiny_config(num_hidden_layers=1, attention_bias=True), 0).state_dict())
    block = "model.layers.0"
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        f"{block}.input_layernorm.weight",
        f"{block}.post_attention_layernorm.weight",
        *(f"{block}.self_attn.{leaf}_proj.{kind}" for leaf in "qkvo" for kind in ("weight", "bias")),
        *(f"{block}.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")),
    }


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.lm_head is not None
    assert untied.head_weight is untied.lm_head.weight
    assert untied.head_weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()
    h = tied.hidden_states(random_ids(1, 5))
    torch.testing.assert_close(tied.logits(h), h @ tied.model.embed_tokens.weight.T)


def test_nothing_is_left_without_a_value() -> None:
    model = random_llama(tiny_config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True), seed=0)
    assert not list(model.buffers())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in model.modules() if isinstance(m, RMSNorm))


def test_a_new_model_takes_no_memory_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=False))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (random_llama(tiny_config(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head_weight, c.head_weight)
    model = tiny_llama()
    model.extra = nn.Parameter(torch.empty(3))  # a parameter outside every rule still gets a value
    initialise(model, 0)
    assert torch.equal(model.extra, torch.zeros(3))


def test_positions_follow_from_what_is_given() -> None:
    model = tiny_llama()
    ids = random_ids(2, 6)
    torch.testing.assert_close(model(ids), model(ids, torch.arange(6).expand(2, 6)), rtol=0, atol=0)
    documents = Documents.from_lengths([4, 2, 6])
    explicit = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]])
    torch.testing.assert_close(
        model(ids, documents=documents), model(ids, explicit, documents=documents), rtol=0, atol=0
    )
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    padded = model(ids, mask_BS=mask)
    torch.testing.assert_close(padded[0, 2:], model(ids[:1, 2:])[0])
    torch.testing.assert_close(padded[1], model(ids[1:])[0])
    assert padded.isfinite().all()


def test_attention_depends_on_distance_only() -> None:
    model = tiny_llama()
    ids = random_ids(1, 8)
    shifted = model(ids, torch.arange(1000, 1008)[None])
    torch.testing.assert_close(shifted, model(ids), rtol=1e-3, atol=1e-3)


def test_cache_in_pieces_equals_one_pass() -> None:
    model = tiny_llama()
    ids = random_ids(3, 10)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, :4] = False
    whole = model(ids, mask_BS=mask)
    for pieces in ([1] * 10, [6, 1, 1, 1, 1], [5, 3, 2]):
        cache = KVCache(2, 10)
        parts = []
        for part in ids.split(pieces, dim=1):
            end = cache.length + part.shape[1]
            parts.append(model(part, cache=cache, mask_BS=mask[:, :end]))
        torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask])
    unmasked = KVCache(2, 10)
    parts = [model(part, cache=unmasked) for part in ids.split([4, 5, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids))
    with pytest.raises(ValueError, match="holds 10 positions, 11 are needed"):
        model(ids[:, :1], cache=unmasked)


def test_the_cache_is_allocated_once_and_rows_can_leave() -> None:
    model = tiny_llama()
    ids = random_ids(3, 5)
    cache = KVCache(2, 8)
    model(ids, cache=cache)
    keys = cache._keys[0]
    assert keys is not None
    assert keys.shape == (3, 8, 2, 8)
    model(ids[:, :1], cache=cache)
    assert cache._keys[0] is keys
    cache.select(torch.tensor([2]))
    both = torch.cat((ids, ids[:, :1], ids[:, 1:2]), 1)
    torch.testing.assert_close(model(ids[2:, 1:2], cache=cache), model(both)[2:, -1:])


@pytest.mark.parametrize("documents", [None, Documents.from_lengths([5, 3, 8])], ids=["plain", "packed"])
def test_activation_checkpointing_changes_no_bit(documents: Documents | None) -> None:
    ids = random_ids(2, 8)
    results = []
    for on in (False, True):
        model = tiny_llama()
        for block in model.blocks:
            block.mlp.down_proj = nn.Sequential(nn.Dropout(0.3), block.mlp.down_proj)
        model.checkpoint_blocks = on
        torch.manual_seed(0)
        logits = model(ids, documents=documents)
        results.append((logits, gradients(model, logits), torch.get_rng_state()))
    (logits, plain, state), (logits_c, checkpointed, state_c) = results
    assert torch.equal(logits, logits_c)
    assert torch.equal(state, state_c)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_checkpointed_blocks_keep_only_their_inputs() -> None:
    def saved_bytes(on: bool) -> int:
        model = tiny_llama(num_hidden_layers=4)
        model.checkpoint_blocks = on
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.hidden_states(random_ids(4, 32))
        return sum(seen.values())

    assert saved_bytes(True) < 0.4 * saved_bytes(False)


# Dynamo looks at .grad of what it traces and hides the warning from its own log only.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_compile_in_place() -> None:
    """Graph capture with the eager backend: same numbers, same names, with documents of changing lengths."""
    plain, compiled = tiny_llama(), tiny_llama()
    names = list(compiled.state_dict())
    for block in compiled.blocks:
        block.compile(backend="eager")
    assert list(compiled.state_dict()) == names
    for lengths in ([5, 3, 8], [2, 14], [1, 1, 2, 12]):
        ids = random_ids(1, 16)
        documents = Documents.from_lengths(lengths)
        a, b = plain(ids, documents=documents), compiled(ids, documents=documents)
        torch.testing.assert_close(a, b)
        for x, y in zip(gradients(plain, a), gradients(compiled, b), strict=True):
            torch.testing.assert_close(x, y)
    cache = KVCache(2, 16)
    torch.testing.assert_close(compiled(random_ids(1, 8), cache=cache), plain(random_ids(1, 8)))


def test_autocast_and_half_storage_give_half_precision_products() -> None:
    ids = random_ids(2, 8)
    exact = tiny_llama(initializer_range=0.05)(ids)
    with torch.autocast("cpu", torch.bfloat16):
        masters = tiny_llama(initializer_range=0.05)(ids)
    stored = tiny_llama(initializer_range=0.05).to(torch.bfloat16)(ids)
    for logits in (masters, stored):
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)


def test_norm_is_computed_in_fp32() -> None:
    norm = RMSNorm(4, 1e-5).to(torch.float16)
    x = torch.tensor([[300.0, 400.0, 0.0, 0.0]], dtype=torch.float16)  # 300^2 is beyond fp16
    torch.testing.assert_close(norm(x), torch.tensor([[1.2, 1.6, 0.0, 0.0]], dtype=torch.float16))


def test_rotary_frequencies_of_scalings() -> None:
    plain = rotary_frequencies(tiny_config(head_dim=64, rope_theta=5e5))
    assert plain[0] == 1.0
    assert plain[-1].item() == pytest.approx(5e5 ** (-62 / 64))
    linear = rotary_frequencies(tiny_config(head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling("linear", 4.0)))
    torch.testing.assert_close(linear, plain / 4)
    llama3 = rotary_frequencies(tiny_config(head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0)))
    torch.testing.assert_close(llama3[0], plain[0])  # short waves are kept
    torch.testing.assert_close(llama3[-1], plain[-1] / 8)  # long ones stretched
    assert ((llama3 <= plain) & (llama3 >= plain / 8)).all()


def test_misuse_is_refused() -> None:
    model = tiny_llama()
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="neither a cache nor a mask"):
        model(ids, documents=Documents.from_lengths([4]), cache=KVCache(2, 4))
    with pytest.raises(ValueError, match=r"the mask is \(1, 3\), the keys are \(1, 4\)"):
        model(ids, mask_BS=torch.ones(1, 3, dtype=torch.bool))
