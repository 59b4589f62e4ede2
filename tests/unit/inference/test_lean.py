import pytest
import tiny
import torch

from retune.inference.attention import PackedRows
from retune.inference.base_model import ARCHITECTURES
from retune.inference.decoder import run_pass
from retune.inference.inputs import pack
from retune.inference.lean import _Gate, _Norm, _Rotation, make_lean
from retune.inference.together import attend_together

DECODERS = sorted(kind for kind, family in ARCHITECTURES.items() if family == "decoder")


@pytest.mark.parametrize("kind", DECODERS)
def test_the_last_layer_answers_where_it_is_asked_and_as_without_being_asked(kind):
    base = tiny.make_base(kind)
    rows = [tiny.EncodedRow(list(range(5, 5 + n)), []) for n in (9, 14, 30)]
    packed = pack(rows, 0)
    vectors = base.embed(packed.ids)
    asked = torch.tensor([3, 8, 22, -1, 52])
    kept = [], []
    every, some = (
        run_pass(base, vectors, packed.positions, PackedRows(None, packed, own), places)
        for own, places in zip(kept, (None, asked), strict=True)
    )
    places = asked[asked >= 0]
    torch.testing.assert_close(some[places], every[places], rtol=1e-5, atol=1e-5)
    rest = torch.tensor([i for i in range(len(packed.ids)) if i not in asked])
    assert not torch.allclose(some[rest], every[rest])  # what nobody asked for was not computed
    for one, other in zip(*kept, strict=True):  # keys and values of all tokens
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", DECODERS)
def test_each_part_of_a_decoder_that_can_be_lean_is(kind):
    base = tiny.make_base(kind)
    plain = {type(module).__name__ for module in base.model.modules()}
    make_lean(base.model)
    make_lean(base.model)
    lean = {type(module).__name__ for module in base.model.modules() if hasattr(type(module), "retune_plain")}
    last = next(name for name in plain if name.endswith(("DecoderLayer", "Block")))
    norms = {name for name in plain if name.endswith("RMSNorm") and kind != "gemma"}  # Gemma's weight is another
    gates = {name for name in plain if name.endswith("MLP") and kind not in ("gemma", "gpt2")}  # theirs are of GELU
    turned = {name for name in plain if name.endswith("Attention") and kind != "gpt2"}  # which learns its positions
    assert lean == {last} | norms | gates | turned


@pytest.mark.parametrize("kind", DECODERS)
def test_weights_that_learn_have_their_gradient(kind):
    base = tiny.make_base(kind)
    base.model.requires_grad_(True)
    packed = pack([tiny.EncodedRow([5, 6, 7, 8], [])], 0)
    run = PackedRows(None, packed)
    gradients = []
    for asked in (None, torch.tensor([3])):
        base.model.zero_grad()
        run_pass(base, base.embed(packed.ids), packed.positions, run, asked)[3].square().sum().backward()
        gradients.append({name: weight.grad for name, weight in base.model.base_model.named_parameters()})
    every, some = gradients
    assert [name for name, gradient in every.items() if gradient is None] == []
    torch.testing.assert_close(some, every, rtol=1e-4, atol=1e-4)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(True)


def test_gradients_are_those_of_finite_differences():
    weight = drawn(6).detach()
    assert torch.autograd.gradcheck(lambda x: _Norm.apply(x, weight, 1e-3), drawn(1, 5, 6))
    assert torch.autograd.gradcheck(_Gate.apply, (drawn(1, 4, 7), drawn(1, 4, 7) * 2))
    cos, sin = drawn(1, 1, 5, 4).detach(), drawn(1, 1, 5, 4).detach() * 3  # of each element its own
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, cos, sin), drawn(1, 3, 5, 4))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_of_virtual_tokens_and_rows_together(groups):
    size, sizes = 3, (2, 4)
    masks = [torch.zeros(n, size + n, dtype=torch.float64) for n in sizes]
    masks[1][:2, -2:] = masks[1][0, -3] = float("-inf")
    q, k, v = drawn(4, 9, 5), drawn(groups, 9, 5), drawn(groups, 9, 5)

    def attend(q, k, v):
        return attend_together(q, k, v, 0.7, size, sizes, masks)

    seen = torch.full((9, 9), float("-inf"), dtype=torch.float64)
    seen[:3, :3] = torch.full((3, 3), float("-inf")).triu(1)
    seen[3:5, :5] = masks[0]
    seen[5:, [0, 1, 2, 5, 6, 7, 8]] = masks[1]
    keys, values = (x.repeat_interleave(4 // groups, 0) for x in (k, v))
    whole = ((q @ keys.transpose(1, 2) * 0.7 + seen).softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v), whole)
    assert torch.autograd.gradcheck(attend, (q, k, v))
