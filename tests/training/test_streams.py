"""How validation clips are laid out over ranks."""

import pytest

from omnisieve.training.streams import val_shards


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_clip_counts_once_and_ranks_keep_step(size: int, world_size: int):
    shards = [val_shards(size, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    counted = [clip for shard in shards for indices, counts in shard if counts for clip in indices]
    assert sorted(counted) == list(range(size))
    assert len({len(shard) for shard in shards}) == 1
    assert all(indices for shard in shards for indices, _ in shard)
