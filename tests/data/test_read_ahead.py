"""What goes wrong in a worker arrives as what it is."""

from __future__ import annotations

import pytest
from torch.utils.data import Dataset

from omnisieve.data.errors import DataError
from omnisieve.data.feature_cache import FeatureCacheError
from omnisieve.data.media import MediaError
from omnisieve.data.read_ahead import ReadAhead


class Numbers(Dataset[int]):
    """0 to 5, but the fourth cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise self.error
        return index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        MediaError("a.mp4", "video", "truncated", "the file ends early"),
        FeatureCacheError("a.mp4 is not in the feature cache"),
        DataError("sample 3 cannot be read"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("options", "before"),
    [({"batch_size": None}, [0, 1, 2]), ({"batch_size": 2, "collate_fn": sum}, [1])],
    ids=["items", "batches"],
)
def test_errors_arrive_in_order_and_unchanged(workers: int, error: DataError, options: dict, before: list[int]) -> None:
    items = iter(ReadAhead(Numbers(error), num_workers=workers, **options))
    assert [next(items) for _ in before] == before
    with pytest.raises(type(error)) as caught:
        next(items)
    assert str(caught.value) == str(error)


def test_mistakes_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        list(ReadAhead(Numbers(ZeroDivisionError("here")), batch_size=None, num_workers=1))
