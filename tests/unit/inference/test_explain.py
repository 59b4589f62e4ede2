"""What a soft prompt learned, on tiny models: against prompts made by hand, transformers' eager attention and a search by hand."""

import pytest
import tiny
import torch

from retune.errors import BadInputError
from retune.explain import attention_masses, explain, nearest_tokens, token_text
from retune.inference.decoder import run_prefix
from retune.inference.encoding import Encoder
from retune.inference.inputs import EncodedRow, encode_with_answers
from retune.inference.predictor import Predictor
from retune.prompt_tuning.trainer import validation_batches, validation_loss
from retune.recorded import Recorded
from retune.records import Lineage
from retune.tuned import Tuned

ROWS = tiny.make_rows(12)
ENCODED = [EncodedRow([10, 11, 12, 13, 14, 15], [40, 1]), EncodedRow([30, 31], [41, 42, 1]), EncodedRow([50, 51, 52], [1])]


def tuned(base, size=4, **changes):
    soft_prompt = tiny.make_soft_prompt(base, size)
    prompt = tiny.make_prompt(tune={"num_virtual_tokens": size}, **changes)
    return Tuned(
        Recorded("ticket_priority", "a" * 64, 1, Lineage("", "", {}, "", False, "")),
        Predictor(base, prompt, tiny.tuned(soft_prompt)),
        soft_prompt,
    )


def batches(base, rows, size):
    return validation_batches(base, rows, run_prefix(base, tiny.make_soft_prompt(base, size)))


@pytest.mark.parametrize("size", [1, 4])
def test_an_effect_is_the_loss_of_a_prompt_made_without_the_token_less_that_of_the_whole(base, size):
    release = tuned(base, size)
    found = explain(release, ROWS)

    def loss(soft_prompt):
        sums, tokens = Predictor(base, release.predictor.prompt, {} if soft_prompt is None else tiny.tuned(soft_prompt)).reference_losses(
            ROWS
        )
        return sums.sum() / tokens.sum()

    assert found.loss == pytest.approx(loss(release.soft_prompt), rel=1e-6)
    assert found.template_loss == pytest.approx(loss(None), rel=1e-6)
    assert (found.rows, found.answer_tokens) == (12, 24)
    assert [token.number for token in found.tokens] == list(range(1, size + 1))
    for number, token in enumerate(found.tokens):
        rest = [vector for place, vector in enumerate(release.soft_prompt) if place != number]
        without = loss(torch.stack(rest) if rest else None)
        assert token.effect == pytest.approx(without - loss(release.soft_prompt), abs=1e-6)


def test_the_loss_is_the_one_that_tuning_measures(llama):
    release = tuned(llama)
    rows, _ = encode_with_answers(llama, Encoder(release.predictor.prompt, llama.tokenizer), 4, ROWS)
    expected = validation_loss(llama, lambda: run_prefix(llama, release.soft_prompt), batches(llama, rows, 4))
    assert explain(release, ROWS).loss == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
def test_masses_are_those_of_transformers_eager_attention(kind):
    """Row by row, on the plain model with its own attention weights; grouped-query attention included."""
    base = tiny.make_base(kind)
    soft_prompt = tiny.make_soft_prompt(base, 5)
    masses, even = attention_masses(base, soft_prompt, batches(base, ENCODED, 5))

    model = tiny.make_model(kind, len(base.tokenizer))
    model.set_attn_implementation("eager")
    embed = model.get_input_embeddings()
    paid, shares = [], []
    for row in ENCODED:
        vectors = torch.cat([soft_prompt, embed(torch.tensor([*row.prompt, *row.answer]))])
        weights = torch.stack(model(inputs_embeds=vectors[None], output_attentions=True).attentions)[:, 0].mean((0, 1))  # [P + T, P + T]
        for place in range(5 + len(row.prompt) - 1, 5 + len(row) - 1):
            paid.append(weights[place, :5])
            shares.append(1 / (place + 1))
    torch.testing.assert_close(masses[:5], torch.stack(paid).mean(0).double(), rtol=0, atol=1e-6)
    assert masses.sum().item() == pytest.approx(1, abs=1e-9)
    assert even == pytest.approx(sum(shares) / len(shares))


def test_rows_that_share_attention_products_are_told_apart(llama):
    """Many rows in several chunks give the mean of each row alone, weighted by its answer tokens."""
    rows, _ = encode_with_answers(llama, Encoder(tiny.make_summary_prompt(), llama.tokenizer), 4, tiny.make_rows(40))
    soft_prompt = tiny.make_soft_prompt(llama)
    together, _ = attention_masses(llama, soft_prompt, batches(llama, rows, 4))
    alone = [attention_masses(llama, soft_prompt, batches(llama, [row], 4))[0] * len(row.answer) for row in rows]
    torch.testing.assert_close(together, torch.stack(alone).sum(0) / sum(len(row.answer) for row in rows), rtol=0, atol=1e-6)


def test_the_nearest_tokens_are_those_of_a_search_by_hand(base, monkeypatch):
    monkeypatch.setattr("retune.explain.VOCABULARY", 64)  # several parts
    soft_prompt = tiny.make_soft_prompt(base, 3)
    by_cosine, by_distance = nearest_tokens(base, soft_prompt, count=4)
    table = base.embed(torch.arange(len(base.tokenizer)))
    for place, vector in enumerate(soft_prompt):
        cosines = [torch.cosine_similarity(vector, word, dim=0).item() for word in table]
        distances = [torch.dist(vector, word).item() for word in table]
        assert [n.id for n in by_cosine[place]] == sorted(range(len(table)), key=lambda i: -cosines[i])[:4]
        assert [n.id for n in by_distance[place]] == sorted(range(len(table)), key=lambda i: distances[i])[:4]
        for neighbour in [*by_cosine[place], *by_distance[place]]:
            assert neighbour.cosine == pytest.approx(cosines[neighbour.id], abs=1e-5)
            assert neighbour.distance == pytest.approx(distances[neighbour.id], abs=1e-5)


def test_the_embedding_of_a_word_is_nearest_to_that_word_as_the_model_reads_it():
    """Gemma scales its embeddings; the table that is compared is the scaled one."""
    base = tiny.make_base("gemma")
    word = base.tokenizer.convert_tokens_to_ids(" urgent")
    by_cosine, by_distance = nearest_tokens(base, base.embed(torch.tensor([word])))
    for nearest in (by_cosine[0][0], by_distance[0][0]):
        assert (nearest.text, nearest.cosine, nearest.distance) == (" urgent", pytest.approx(1), pytest.approx(0, abs=1e-5))


def test_rows_of_the_embedding_that_no_token_uses_are_not_named(llama):
    base = tiny.make_base("llama")
    base.model.resize_token_embeddings(len(base.tokenizer) + 60, mean_resizing=False)
    unused = base.embed(torch.tensor([len(base.tokenizer) + 7]))
    (nearest,), _ = nearest_tokens(base, unused, count=len(base.tokenizer) + 60)
    assert sorted(neighbour.id for neighbour in nearest) == list(range(len(base.tokenizer)))


@pytest.mark.parametrize(("piece", "text"), [(" urgent", " urgent"), ("<0xE2>", "<0xE2>"), (tiny.EOS, tiny.EOS), ("\n", "\n")])
def test_a_token_reads_as_in_a_text(piece, text):
    tokenizer = tiny.make_tokenizer()
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids(piece)) == text


def test_without_rows_or_with_an_empty_one_the_error_says_so(llama):
    with pytest.raises(BadInputError, match="ticket_priority: the validation split of its release is empty"):
        explain(tuned(llama), [])
    rows = [{"text": "hot", "label": "low"}, {"text": "", "label": "low"}]
    with pytest.raises(BadInputError, match="row 1: the rendered template has no tokens"):
        explain(tuned(llama, template="{text}"), rows)
