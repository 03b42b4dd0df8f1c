"""What a trainer reports of its work."""

import pytest

from clients.trainers.base import OutOfMemoryError, WorkLog
from devices.cost import ModelCost, Passes

NETWORK = ModelCost("net", 1.0, 2.0, 100, 10, inference_bytes=((100, 7), (50, 8)))


@pytest.mark.parametrize(
    "count, passes",
    [(0, []), (9, [(9, 1)]), (512, [(512, 1)]), (1100, [(512, 2), (76, 1)])],
)
def test_judging_is_priced_at_the_batches_that_run(count: int, passes: list[tuple[int, int]]):
    log = WorkLog(10**6)
    log.judge(NETWORK, count)
    assert log.work().passes == tuple(Passes(NETWORK, batch, forwards) for batch, forwards in passes)


def test_judging_takes_the_memory_of_its_largest_batch():
    """100 + 7 each are more than 50 + 8 each up to 50 examples; 512 are never held at once with 20."""
    for count, held in ((20, 240), (60, 530), (1100, 50 + 8 * 512)):
        log = WorkLog(held)
        log.judge(NETWORK, count)
        assert log.peak_memory_bytes == held
        with pytest.raises(OutOfMemoryError, match=f"needs {held} bytes"):
            WorkLog(held - 1).judge(NETWORK, count)
