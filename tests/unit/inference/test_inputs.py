import pytest
import tiny
import torch

from retune.errors import BadInputError
from retune.inference.inputs import CHUNK, EncodedRow, LabelTree, by_tokens, check_length, pack, sorted_batches

ROWS = [EncodedRow([5, 6, 7], [8, 1]), EncodedRow([9]), EncodedRow([], [4, 1])]
OPEN, SHUT = 0.0, float("-inf")


def test_rows_lie_end_to_end_the_shortest_first_at_positions_after_the_soft_prompt():
    packed = pack(ROWS, 2)  # an answer's last token predicts nothing: it is not read
    assert packed.ids.tolist() == [9, 4, 5, 6, 7, 8]
    assert packed.positions.tolist() == [2, 2, 2, 3, 4, 5]
    assert packed.order == (1, 2, 0)
    assert packed.ends.tolist() == [5, 0, 1]


def test_each_answer_token_is_predicted_by_the_token_before_it_or_by_the_soft_prompt():
    packed = pack(ROWS, 2)
    assert list(zip(packed.owners.tolist(), packed.sources.tolist(), packed.targets.tolist(), strict=True)) == [
        (2, -1, 4),
        (2, 1, 1),
        (0, 4, 8),
        (0, 5, 1),
    ]


def test_a_token_sees_the_soft_prompt_and_its_own_row_up_to_itself():
    packed = pack([EncodedRow([5]), EncodedRow([6, 7])], 1)
    assert packed.sizes == (3,)
    assert packed.masks[0].tolist() == [[OPEN, OPEN, SHUT, SHUT], [OPEN, SHUT, OPEN, SHUT], [OPEN, SHUT, OPEN, OPEN]]


def test_a_node_of_a_tree_sees_its_row_and_its_own_beginning():
    tree = LabelTree([[10, 11, 12], [10, 13], [14, 15], [16]])
    assert tree.ids.tolist() == [10, 11, 14]
    assert tree.depths.tolist() == [0, 1, 0]
    assert list(zip(tree.label.tolist(), tree.source.tolist(), tree.target.tolist(), strict=True)) == [
        (0, 0, 10),
        (0, 1, 11),
        (0, 2, 12),
        (1, 0, 10),
        (1, 1, 13),
        (2, 0, 14),
        (2, 3, 15),
        (3, 0, 16),
    ]
    packed = pack([EncodedRow([5])], 0, tree=tree)
    assert packed.ids.tolist() == [5, 10, 11, 14]
    assert packed.positions.tolist() == [0, 1, 2, 1]
    assert packed.masks[0].tolist() == [
        [OPEN, SHUT, SHUT, SHUT],
        [OPEN, OPEN, SHUT, SHUT],
        [OPEN, OPEN, OPEN, SHUT],
        [OPEN, SHUT, SHUT, OPEN],
    ]


def test_chunks_are_whole_rows_and_hold_all_tokens():
    lengths = [CHUNK - 1, 1, 1, 3 * CHUNK, 40, 2]
    packed = pack([EncodedRow([5] * n) for n in lengths], 3)
    assert packed.sizes == (44, CHUNK - 1, 3 * CHUNK)
    assert [tuple(m.shape) for m in packed.masks] == [(n, n + 3) for n in packed.sizes]
    assert len(packed.ids) == sum(lengths)


def test_a_prompt_beyond_the_context_is_refused_with_its_figures():
    base = tiny.make_base(context=34)
    check_length(3, EncodedRow([1] * 10, [2] * 4), 20, 0, base)
    with pytest.raises(
        BadInputError, match=r"row 3: prompt too long: 20 virtual \+ 10 prompt \+ 5 answer tokens = 35, but the model reads 34"
    ):
        check_length(3, EncodedRow([1] * 10, [2] * 4), 20, 1, base)


def test_a_row_with_nothing_to_read_is_refused():
    base = tiny.make_base(context=34)
    check_length(0, EncodedRow([], [2]), 1, 0, base)
    with pytest.raises(BadInputError, match="row 0: the rendered template is empty"):
        check_length(0, EncodedRow([], [2]), 0, 0, base)


def test_batches_hold_rows_of_like_length_whatever_order_they_come_in():
    rows = [EncodedRow([1] * n, [i]) for i, n in enumerate([5, 1, 3, 5, 2])]
    batches = sorted_batches(rows, 7)
    assert batches == [[1, 4], [2], [0], [3]]
    shuffled = [rows[i] for i in (3, 2, 0, 4, 1)]
    assert [[shuffled[i] for i in b] for b in sorted_batches(shuffled, 7)] == [[rows[i] for i in b] for b in batches]
    assert sorted_batches([], 7) == []


def test_room_for_what_follows_each_row_counts():
    assert by_tokens("abc", [2, 2, 9], 4) == [["a", "b"], ["c"]]
    assert sorted_batches([EncodedRow([1, 2])] * 4, 8, extra=2) == [[0, 1], [2, 3]]


def test_packing_is_on_the_host_until_it_is_asked_elsewhere():
    assert pack(ROWS, 2, torch.device("meta")).ids.device.type == "meta"
