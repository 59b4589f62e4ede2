import random
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from retune.errors import BadInputError, ConfigError, IntegrityError
from retune.inference.predictor import Predictor
from retune.inference.release import read_release, write_release

ROWS = tiny.make_rows(40)


def predictor(base, size=4, **changes):
    return Predictor(base, tiny.make_prompt(**changes), tiny.tuned(tiny.make_soft_prompt(base, size)) if size else {})


def writer(base, **changes):
    return Predictor(base, tiny.make_summary_prompt(**changes), tiny.tuned(tiny.make_soft_prompt(base)))


def test_classification_gives_a_label_and_probabilities_that_add_up(base):
    found = predictor(base).predict(ROWS)
    assert list(found.columns) == ["prediction", "p_low", "p_medium", "p_high"]
    np.testing.assert_allclose(found.iloc[:, 1:].sum(axis=1), 1, rtol=0, atol=1e-12)
    assert (found["prediction"] == found.iloc[:, 1:].idxmax(axis=1).str.removeprefix("p_")).all()
    assert found["prediction"].nunique() > 1


def test_probabilities_are_the_shares_of_the_labels_log_probabilities(base):
    scores = predictor(base).score_labels(ROWS[:3]).double().numpy()
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictor(base).predict(ROWS[:3]).iloc[:, 1:], expected, rtol=1e-12)


@pytest.mark.parametrize("labels", [None, {"low": " low", "later": " later today", "never": " never again"}], ids=["one token", "several"])
def test_predictions_do_not_depend_on_the_other_rows_or_their_order(base, labels):
    model = predictor(base, **({"labels": labels} if labels else {}))
    together = model.score_labels(ROWS)
    alone = torch.cat([model.score_labels([row]) for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    order = random.Random(0).sample(range(len(ROWS)), len(ROWS))
    assert torch.equal(model.score_labels([ROWS[i] for i in order]), together[order])


def test_generated_texts_do_not_depend_on_the_other_rows_or_their_order(base):
    model, rows = writer(base), ROWS[:12]
    together = model.generate(rows)
    assert together == [model.generate([row])[0] for row in rows]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    assert model.generate([rows[i] for i in order]) == [together[i] for i in order]
    assert len(set(together)) > 5


def test_generated_texts_are_stripped_and_hold_no_special_tokens(base):
    found = writer(base).predict(ROWS)
    assert list(found.columns) == ["prediction"]
    assert all(text == text.strip() and tiny.EOS not in text and tiny.PAD not in text for text in found["prediction"])


def test_a_table_keeps_its_index_and_may_hold_other_columns(llama):
    table = pd.DataFrame(ROWS[:4], index=[7, 7, "x", 0]).assign(text2=1)
    found = predictor(llama).predict(table)
    assert list(found.index) == [7, 7, "x", 0]
    pd.testing.assert_frame_equal(found.reset_index(drop=True), predictor(llama).predict(ROWS[:4]))


def test_no_rows_give_an_empty_table_with_all_columns(llama):
    for rows in ([], pd.DataFrame({"text": []})):
        assert list(predictor(llama).predict(rows).columns) == ["prediction", "p_low", "p_medium", "p_high"]
        assert len(predictor(llama).predict(rows)) == 0
        assert list(writer(llama).predict(rows).columns) == ["prediction"]


def test_the_soft_prompt_counts_and_the_template_alone_works(base):
    tuned, alone = predictor(base).score_labels(ROWS), predictor(base, 0).score_labels(ROWS)
    assert (tuned - alone).abs().max() > 0.5


def test_a_reloaded_release_predicts_the_same_bits(base, tmp_path):
    for name, model in (("labels", predictor(base)), ("texts", writer(base))):
        write_release(tmp_path / name, model.prompt, tiny.tuned(tiny.make_soft_prompt(base)), base, {})
        reloaded = Predictor.of(read_release(tmp_path / name), base)
        pd.testing.assert_frame_equal(reloaded.predict(ROWS), model.predict(ROWS), check_exact=True)


def test_a_release_loads_with_its_base_model_from_disk(tmp_path):
    base = tiny.save_base(tmp_path / "project/models/tiny")
    model = predictor(base, base_model=tiny.reference(base))
    release_id = write_release(tmp_path / "release", model.prompt, tiny.tuned(tiny.make_soft_prompt(base)), base, {})
    loaded = [
        Predictor.load(tmp_path / "release", project=tmp_path / "project", release_id=release_id),
        Predictor.load(tmp_path / "release", base_models=[tmp_path / "project/models"]),
    ]
    for one in loaded:
        pd.testing.assert_frame_equal(one.predict(ROWS), model.predict(ROWS), check_exact=True)
    with pytest.raises(BadInputError, match=f"no base model with sha256 {base.sha256}.*RETUNE_BASE_MODELS"):
        Predictor.load(tmp_path / "release", base_models=[tmp_path])


def test_a_release_does_not_run_on_another_model(llama, tmp_path):
    write_release(tmp_path / "r", tiny.make_prompt(), tiny.tuned(tiny.make_soft_prompt(llama)), llama, {})
    release = read_release(tmp_path / "r")
    with pytest.raises(IntegrityError, match="made with the base model 0000"):
        Predictor.of(release, replace(llama, sha256="5" * 64))
    with pytest.raises(IntegrityError, match="made with the tokenizer 1111"):
        Predictor.of(release, replace(llama, tokenizer_sha256="5" * 64))
    with pytest.raises(IntegrityError, match=r"prompt_embeddings must be \[4, 64\] for this base model, got \[4, 32\]"):
        Predictor.of(release, tiny.make_base("gpt2", n_embd=64))


def test_a_soft_prompt_of_the_wrong_width_is_refused(llama):
    with pytest.raises(BadInputError, match=r"must be \[4, 32\] for this base model, got \[4, 31\]"):
        Predictor(llama, tiny.make_prompt(), tiny.tuned(torch.zeros(4, 31)))


def test_reference_losses_count_the_answer_and_its_end(llama):
    model = predictor(llama)
    sums, tokens = model.reference_losses(ROWS[:5])
    assert tokens.tolist() == [2] * 5
    labels = model.score_labels(ROWS[:5])
    of_answer = np.array([-labels[i, list(model.prompt.labels).index(row["label"])].item() for i, row in enumerate(ROWS[:5])])
    assert (sums > of_answer).all()  # the end of the sequence comes on top
    assert model.perplexity(ROWS[:5]) == pytest.approx(np.exp(sums.sum() / 10))


def test_a_rows_losses_are_those_of_all_its_references(llama):
    rows = [{"text": "broken router", "summary": "late\nlate refund"}, {"text": "hot", "summary": "slow"}]
    each = [{"text": row["text"], "summary": text} for row in rows for text in row["summary"].split("\n")]
    sums, tokens = writer(llama).reference_losses(rows)
    single, counts = writer(llama).reference_losses(each)
    assert tokens.tolist() == [counts[0] + counts[1], counts[2]]
    assert sums == pytest.approx([single[0] + single[1], single[2]], rel=1e-5)
    assert writer(llama).perplexity(rows) == pytest.approx(writer(llama).perplexity(each), rel=1e-5)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    base = tiny.make_base("llama")
    base.model.get_output_embeddings().weight.data.zero_()
    assert writer(base).perplexity(ROWS) == pytest.approx(len(base.tokenizer), rel=1e-5)


def test_a_long_text_is_cut_and_a_prompt_beyond_the_context_is_refused():
    base = tiny.make_base("llama", context=40)
    long = [{"text": "broken router " * 100}]
    assert len(predictor(base, preprocess={"max_tokens": 28}).predict(long)) == 1
    with pytest.raises(BadInputError, match=r"row 0: prompt too long.*the model reads 40; lower preprocess.max_tokens"):
        predictor(base).predict(long)
    with pytest.raises(BadInputError, match="row 0: prompt too long"):
        writer(base, preprocess={"max_tokens": 28}).predict(long)


def test_what_a_task_does_not_have_is_an_error(llama):
    with pytest.raises(ConfigError, match="only task: classification has labels to score"):
        writer(llama).score_labels(ROWS)
    with pytest.raises(ConfigError, match=r"labels\..* must differ before either ends"):
        predictor(llama, labels={"late": " late", "later": " late again"})
    with pytest.raises(ConfigError, match="at least one row"):
        writer(llama).perplexity([])


def test_threads_do_not_disturb_each_other(llama):
    """A tokenizer shared between threads would switch its special tokens on and off under them."""
    model = predictor(llama, template="{text}<eos>\nPriority:")
    rows = [{"text": f"{row['text']} <eos>"} for row in ROWS]
    expected = model.score_labels(rows)
    wrong = []

    def work():
        for _ in range(3):
            llama.tokenizer("<eos>")
            if not torch.equal(model.score_labels(rows), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
