"""What docs/semantics.md says of long texts: how far logits move with the position, in plain `generate()` and with rebases."""

import json

import pytest
from transformers import PreTrainedModel

from .positions import POSITIONS, RESULT, dense_error, plain_error, rebased_error

ROWS = {row["position"]: row for row in json.loads(RESULT.read_text())["relative_error_of_logits"]}


@pytest.mark.parametrize(
    "position, least, most", [(1_000, 0, 2e-4), (10_000, 5e-5, 1e-3), (100_000, 5e-4, 1e-2), (1_000_000, 5e-3, 1e-1)]
)
def test_logits_move_with_the_position(llama: PreTrainedModel, position: int, least: float, most: float) -> None:
    # As much as with DynamicCache: it is the model's own angle that is rounded, and nothing that the cache adds.
    plain, dense = plain_error(llama, position), dense_error(llama, position)
    assert least <= plain <= most
    assert dense / 10 <= plain <= 10 * dense


def test_rebases_keep_logits_where_they_are(llama: PreTrainedModel) -> None:
    assert rebased_error(llama, 10_000) <= 1e-5 < plain_error(llama, 10_000) / 10


def test_the_result_file_says_the_same(llama: PreTrainedModel) -> None:
    assert list(ROWS) == POSITIONS
    for position in (10_000, 1_000_000, 16_000_000):
        assert plain_error(llama, position) == pytest.approx(ROWS[position]["plain"], rel=0.5)
    assert all(row["rebased"] <= 1e-5 for row in ROWS.values() if "rebased" in row)
