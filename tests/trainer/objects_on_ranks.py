"""Hands objects from rank to rank where tensors may be waited for a second at most: `torchrun objects_on_ranks.py`."""

import time
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from torch.distributed.distributed_c10d import _set_pg_timeout

from trl_steppo.errors import DataError, RolloutError
from trl_steppo.learning.ranks import _object_group, from_first_rank, gather_objects, together
from trl_steppo.trainer.data_stream import StreamedRows, check_same_order


def main() -> None:
    rank = PartialState(cpu=True, backend="gloo").process_index
    assert gather_objects([]) == []  # both have started
    _set_pg_timeout(timedelta(seconds=1), torch.distributed.group.WORLD)
    group = _object_group()
    assert group is _object_group()
    assert group is not torch.distributed.group.WORLD
    assert torch.distributed.get_backend(group) == "gloo"
    if rank == 1:
        time.sleep(3)  # an episode that takes longer than ranks wait for each other's tensors
    assert gather_objects(list(range(rank + 1))) == [0, 0, 1]
    assert from_first_rank({"rank": rank}) == {"rank": 0}

    def play() -> int:
        if rank == 1:
            time.sleep(2)
            raise OSError("broken")
        return rank

    with pytest.raises(OSError if rank == 1 else RolloutError, match="^broken" if rank == 1 else "OSError: broken"):
        together(play)
    stream = Dataset.from_list([{"prompt": str(number)} for number in range(50)]).to_iterable_dataset()
    check_same_order(StreamedRows(stream.shuffle(seed=3, buffer_size=20), seed=0).order, "train_dataset")
    with pytest.raises(DataError, match="`train_dataset` are not the same on all ranks"):
        check_same_order(StreamedRows(stream.shuffle(buffer_size=20), seed=0).order, "train_dataset")
    _set_pg_timeout(timedelta(seconds=60), torch.distributed.group.WORLD)
    total = torch.tensor([1.0])
    torch.distributed.all_reduce(total)  # what goes between tensors' ranks is not disturbed
    assert float(total) == 2.0
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
