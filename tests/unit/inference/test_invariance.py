"""Whatever the model, the soft prompt and the rows: company, order, padding, the cache, a reload and an export change no answer."""

from pathlib import Path
from tempfile import TemporaryDirectory

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from retune.inference.encoding import Encoder
from retune.inference.families import generate_batch
from retune.inference.predictor import Predictor
from retune.inference.release import read_release, write_release

LABELS = {"low": " low", "later": " later today", "never": " never again"}
WRITTEN = 6
NEAR = {"rtol": 1e-4, "atol": 2e-4}
"""Of log-probabilities of several tokens: the weights are sharp, and fp32 adds up in another order."""

some_text = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(tiny.WORDS), max_size=20).map(" ".join))
some_rows = st.lists(st.builds(lambda text: {"text": text}, some_text), min_size=1, max_size=5)
drawn = given(
    kind=st.sampled_from(["llama", "qwen2", "gpt2", "mistral", "gemma"]),
    seed=st.integers(0, 10_000),
    std=st.sampled_from([0.2, 0.3, 0.5]),
    size=st.sampled_from([0, 1, 4, 17]),
    rows=some_rows,
)


def made(kind, seed, std, size):
    """A base model, and what would be tuned for it."""
    base = tiny.make_base(kind, seed=seed, std=std)
    return base, tiny.tuned(tiny.make_soft_prompt(base, size, seed)) if size else {}


def log_probabilities(logits, sequences, labels, before):
    """[N, C]; logits: of each row before each label, padded on the right, [N * C, T, V]. before: tokens before the sequence."""
    shares, found = logits.log_softmax(-1), []
    for number, ids in enumerate(sequences):
        label = labels[number % len(labels)]
        at = torch.arange(before + len(ids) - 1, before + len(ids) - 1 + len(label))
        found.append(shares[number, at, torch.tensor(label)].sum())
    return torch.stack(found).view(-1, len(labels))


@settings(max_examples=30, deadline=None)
@drawn
def test_labels_score_the_same_alone_in_any_order_reloaded_exported_and_padded(kind, seed, std, size, rows):
    base, tensors = made(kind, seed, std, size)
    prompt = tiny.make_prompt(labels=LABELS, tune={"num_virtual_tokens": size} if size else {"method": "none"})
    model = Predictor(base, prompt, tensors)
    scores = model.score_labels(rows)
    torch.testing.assert_close(torch.cat([model.score_labels([row]) for row in rows]), scores, **NEAR)
    torch.testing.assert_close(model.score_labels(rows[::-1]).flip(0), scores, **NEAR)

    with TemporaryDirectory() as folder:
        place = Path(folder) / "release"
        write_release(place, prompt, tensors, base, {})
        assert torch.equal(Predictor.of(read_release(place), base).score_labels(rows), scores)

        # Transformers' own model and PEFT's, on batches that are padded on the right.
        encoder = Encoder(prompt, base.tokenizer)
        labels = [base.tokenizer(text, add_special_tokens=False).input_ids for text in LABELS.values()]
        prompts = [ids for ids in encoder.prompts(rows) for _ in labels]
        ids = [torch.tensor([*before, *label]) for before, label in zip(prompts, labels * len(rows), strict=True)]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(size + len(x), dtype=torch.long) for x in ids], batch_first=True)
        vectors = [torch.cat([model.prompt_embeddings(row), base.embed(torch.tensor(label))]) for row in rows for label in labels]
        plain = tiny.make_model(kind, len(base.tokenizer), seed=seed, std=std)
        with torch.no_grad():
            exported = plain(inputs_embeds=torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True), attention_mask=mask).logits
            torch.testing.assert_close(log_probabilities(exported, prompts, labels, size), scores, **NEAR)
            if size:
                theirs = PeftModel.from_pretrained(plain, place / "adapter").eval()
                padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
                found = theirs(input_ids=padded, attention_mask=mask[:, size:]).logits
                torch.testing.assert_close(log_probabilities(found, prompts, labels, size), scores, **NEAR)


@settings(max_examples=20, deadline=None)
@drawn
def test_each_token_written_with_a_cache_alone_or_not_is_the_likeliest_without(kind, seed, std, size, rows):
    base, tensors = made(kind, seed, std, size)
    tune = {"num_virtual_tokens": size} if size else {"method": "none"}
    model = Predictor(base, tiny.make_summary_prompt(tune=tune), tensors)
    encoded = model._encode(rows, WRITTEN)
    together = generate_batch(base, model._prefix, encoded, WRITTEN)
    alone = [generate_batch(base, model._prefix, [row], WRITTEN)[0] for row in encoded]
    plain = tiny.make_model(kind, len(base.tokenizer), seed=seed, std=std)
    for row, *answers in zip(rows, together, alone, strict=True):
        for written in answers:
            vectors = torch.cat([model.prompt_embeddings(row), base.embed(torch.tensor(written, dtype=torch.long))])
            with torch.no_grad():
                logits = plain(inputs_embeds=vectors[None]).logits[0, len(vectors) - len(written) - 1 :]
            chosen = logits[torch.arange(len(written)), written]
            assert (chosen > logits[: len(written)].max(-1).values - 1e-3).all()
            if len(written) < WRITTEN:
                assert logits[-1, list(base.stop_ids)].max() > logits[-1].max() - 1e-3
