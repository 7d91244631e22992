"""A plan gives every pair once, whatever the shards, processes and workers, and says it by counts alone."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.plan import BLOCK, make_plan

SHARDS = st.lists(st.integers(0, 90), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_every_pair_comes_once_but_for_those_that_fill_no_batch(sizes, processes, workers, each, seed):
    plan = make_plan(sizes, each * processes, processes, workers, seed, 0)
    batches = plan.batches()
    assert batches.shape == (sum(sizes) // (each * processes), each * processes)
    assert len(np.unique(batches)) == batches.size and (batches < sum(sizes)).all()
    places = plan.places(sum(sizes))
    for number, batch in enumerate(batches):
        for rank in range(processes):
            rows = batch[rank * each : (rank + 1) * each]
            assert {plan.lane(places[pair]) for pair in rows} == {rank * workers + number % workers}


def test_a_pair_is_shuffled_within_its_block_and_the_shards_within_the_epoch():
    sizes = [300, 7, 0, 500, 120, 64, 300, 41]
    one, other = (make_plan(sizes, 8, 1, 2, 0, epoch) for epoch in (0, 1))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for start in range(0, one.starts[1], BLOCK):
        block = one.block(start)
        assert sorted(one.reading[block]) == sorted(one.given[block]) and block.stop - block.start <= BLOCK
        assert len({*shard_of[one.reading[block]]}) > 1
    assert (one.given != other.given).mean() > 0.9
    again = make_plan(sizes, 8, 1, 2, 0, 0)
    assert (again.given == one.given).all() and (again.reading == one.reading).all()


def test_every_shard_is_read_by_one_worker_and_those_at_a_cut_by_two():
    sizes = [100] * 40
    plan = make_plan(sizes, 16, 2, 4, 0, 0)
    shard_of = np.repeat(np.arange(40), sizes)
    readers = [{*shard_of[plan.reading[start:stop]]} for start, stop in pairwise(plan.starts)]
    assert sum(map(len, readers)) <= 40 + len(readers) - 1
    for start, stop in pairwise(plan.starts):
        for shard in range(40):  # forward within a shard
            own = plan.reading[start:stop][shard_of[plan.reading[start:stop]] == shard]
            assert (np.diff(own) > 0).all()
