import pytest
import torch

from retune.errors import ConfigError
from retune.prompt_tuning import initial_prompt


def nearest(base, prompt):
    """Ids of the tokens whose embeddings the rows are; -1 for none."""
    table = base.embed(torch.arange(len(base.tokenizer)))
    found = [(table == row).all(1).nonzero() for row in prompt]
    return [int(f[0]) if len(f) else -1 for f in found]


@pytest.mark.parametrize("init", ["text", "sampled_vocabulary", "random"])
def test_each_start_is_p_by_h_and_repeats_by_seed(base, init):
    one = initial_prompt(init, base, 7, 13, "angry router")
    assert one.shape == (7, base.hidden_size)
    assert one.dtype == torch.float32
    assert not one.requires_grad
    assert torch.equal(one, initial_prompt(init, base, 7, 13, "angry router"))
    assert init == "text" or not torch.equal(one, initial_prompt(init, base, 7, 14, "angry router"))


def test_a_text_is_repeated_or_cut_to_p_tokens(llama):
    ids = llama.tokenizer(" angry router", add_special_tokens=False)["input_ids"]
    assert nearest(llama, initial_prompt("text", llama, 5, 0, " angry router")) == (ids * 5)[:5]
    assert nearest(llama, initial_prompt("text", llama, 1, 0, " angry router")) == ids[:1]


def test_special_tokens_in_the_text_are_ordinary_characters(llama):
    assert llama.eos_id not in nearest(llama, initial_prompt("text", llama, 5, 0, "<eos>"))


@pytest.mark.parametrize("text", ["", None])
def test_a_text_without_tokens_is_refused(llama, text):
    with pytest.raises(ConfigError, match="init: text needs init_text"):
        initial_prompt("text", llama, 5, 0, text)


def test_sampled_tokens_are_words_each_taken_once(llama):
    ids = nearest(llama, initial_prompt("sampled_vocabulary", llama, 60, 0))
    tokens = llama.tokenizer.convert_ids_to_tokens(ids)
    assert len(set(ids)) == 60
    assert not set(ids) & {0, 1, 2}
    assert not any(token.startswith("<0x") for token in tokens)


def test_a_small_vocabulary_is_sampled_more_than_once(llama):
    ids = nearest(llama, initial_prompt("sampled_vocabulary", llama, 300, 0))
    counts = {i: ids.count(i) for i in ids}
    assert set(counts.values()) <= {300 // len(counts), 300 // len(counts) + 1}


def test_random_values_have_the_scale_of_the_embeddings(llama):
    prompt = initial_prompt("random", llama, 1000, 0)
    table = llama.embed(torch.arange(len(llama.tokenizer)))
    torch.testing.assert_close(prompt.mean(0), table.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(prompt.std(0), table.std(0), rtol=0.15, atol=0)
    assert nearest(llama, prompt[:5]) == [-1] * 5
