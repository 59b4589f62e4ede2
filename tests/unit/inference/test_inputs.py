import pytest
import tiny
import torch

from retune.errors import BadInputError
from retune.inference.inputs import IGNORED, EncodedRow, assemble, check_length, collate, sorted_batches

ROWS = [EncodedRow([5, 6, 7], [8]), EncodedRow([9])]
X = IGNORED


def test_right_padding_keeps_answers_as_labels():
    batch = collate(ROWS, "right")
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.labels.tolist() == [[X, X, X, 8], [X, X, X, X]]


def test_left_padding_puts_pads_first():
    batch = collate(ROWS, "left")
    assert batch.ids.tolist() == [[5, 6, 7, 8], [0, 0, 0, 9]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


def test_soft_prompt_stands_before_the_text_of_a_right_padded_row(llama):
    soft = tiny.make_soft_prompt(llama, 2)
    inputs = assemble(llama, soft, collate(ROWS, "right"))
    assert inputs.mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2]]
    assert inputs.labels.tolist() == [[X, X, X, X, X, 8], [X, X, X, X, X, X]]
    assert torch.equal(inputs.embeddings[0], torch.cat([soft, llama.embed(torch.tensor([5, 6, 7, 8]))]))
    assert torch.equal(inputs.embeddings[1, :3], torch.cat([soft, llama.embed(torch.tensor([9]))]))


def test_soft_prompt_stands_between_pads_and_text_of_a_left_padded_row(llama):
    soft = tiny.make_soft_prompt(llama, 2)
    inputs = assemble(llama, soft, collate(ROWS, "left"))
    assert inputs.mask.tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert torch.equal(inputs.embeddings[0], torch.cat([soft, llama.embed(torch.tensor([5, 6, 7, 8]))]))
    assert torch.equal(inputs.embeddings[1, 3:], torch.cat([soft, llama.embed(torch.tensor([9]))]))


def test_without_soft_prompt_the_text_stands_alone(llama):
    inputs = assemble(llama, None, collate(ROWS, "left"))
    assert torch.equal(inputs.embeddings[0], llama.embed(torch.tensor([5, 6, 7, 8])))
    assert inputs.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_all_rows_reach_the_soft_prompt(llama, side):
    soft = tiny.make_soft_prompt(llama, 2).requires_grad_(True)
    assemble(llama, soft, collate(ROWS, side)).embeddings.sum().backward()
    assert torch.equal(soft.grad, torch.full_like(soft, 2.0))


def test_a_prompt_beyond_the_context_is_refused_with_its_figures():
    check_length(3, EncodedRow([1] * 10, [2] * 4), 20, 0, 34)
    with pytest.raises(
        BadInputError, match=r"row 3: prompt too long: 20 virtual \+ 10 prompt \+ 5 answer tokens = 35, but the model reads 34"
    ):
        check_length(3, EncodedRow([1] * 10, [2] * 4), 20, 1, 34)


def test_a_row_with_nothing_to_read_is_refused():
    check_length(0, EncodedRow([], [2]), 1, 0, 34)
    with pytest.raises(BadInputError, match="row 0: the rendered template is empty"):
        check_length(0, EncodedRow([], [2]), 0, 0, 34)


def test_batches_hold_rows_of_like_length_whatever_order_they_come_in():
    rows = [EncodedRow([1] * n, [i]) for i, n in enumerate([5, 1, 3, 5, 2])]
    batches = sorted_batches(rows, 2)
    assert batches == [[1, 4], [2, 0], [3]]
    shuffled = [rows[i] for i in (3, 2, 0, 4, 1)]
    assert [[shuffled[i] for i in b] for b in sorted_batches(shuffled, 2)] == [[rows[i] for i in b] for b in batches]
    assert sorted_batches([], 2) == []
