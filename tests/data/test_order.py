"""Promise 3 as properties over (world, workers, batch, cursor): see the equation in docs/data.md."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cl.data.order import Order, digest, digest_hex, digest_parts, share

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)
small = st.integers(1, 9)


def epoch_ids(order, epoch=0):
    return order.epoch(epoch).ids(np.arange(order.length))


@given(counts, small, small, st.integers(0, 2**62), st.integers(0, 1000))
def test_every_sample_at_most_once_and_fewer_than_c_dropped(counts, streams, window, seed, epoch):
    order = Order(counts, seed, streams, window)
    ids = epoch_ids(order, epoch)
    assert len(np.unique(ids)) == len(ids)
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < sum(counts))
    assert sum(counts) - len(ids) < streams


@given(counts, small, small, small, st.integers(0, 99))
def test_streams_are_contiguous_spans_of_the_shuffled_shards(counts, streams, window, seed, epoch):
    order = Order(counts, seed, streams, window)
    ids, length = epoch_ids(order, epoch), order.epoch(epoch).stream_length
    shard_of = np.repeat(np.arange(len(counts)), counts)
    seen = []
    for c in range(streams):
        stream = ids[c::streams]
        assert len(stream) == length
        for start in range(0, length, window):  # samples never leave their window: together it is contiguous
            block = np.sort(stream[start : start + window])
            for shard in dict.fromkeys(shard_of[stream[start : start + window]].tolist()):
                part = block[shard_of[block] == shard]
                assert np.array_equal(part, np.arange(part[0], part[0] + len(part)))
            seen += block.tolist()
    assert len(seen) == len(set(seen))


@given(counts, small, small, st.integers(1, 24), st.sampled_from([1, 2, 3, 4, 8]), st.data())
def test_ranks_and_restarts_do_not_change_a_step(counts, streams, window, per_rank, world, data):
    order, batch = Order(counts, 5, streams, window), per_rank * world
    if batch > order.length:
        return
    per_epoch = order.length // batch
    assert sum(counts) - per_epoch * batch < streams + batch
    start = data.draw(st.integers(0, 2 * per_epoch))
    walk = order.steps(0, 0, batch)
    for _ in range(start):
        next(walk)
    epoch, first = next(walk)
    assert (epoch, first) == divmod(start, per_epoch)[:1] + (start % per_epoch * batch,)
    restarted = Order(counts, 5, streams, window)  # nothing of the run before is needed
    ranks = [share(first, batch, r, world) for r in range(world)]
    assert all(len(r) == per_rank and (np.diff(r) == world).all() for r in ranks)
    together = np.sort(np.concatenate(ranks))
    assert np.array_equal(together, np.arange(first, first + batch))
    assert np.array_equal(restarted.epoch(epoch).ids(together), order.epoch(epoch).ids(np.arange(first, first + batch)))
    if streams % world == 0:  # each rank reads its own streams only
        for r, positions in enumerate(ranks):
            assert (positions % streams % world == r).all()


@given(counts, small, small, st.data())
def test_cursor_continues_under_another_batch(counts, streams, window, data):
    order = Order(counts, 5, streams, window)
    if order.length < 2:
        return
    first, second = (data.draw(st.integers(1, order.length)) for _ in range(2))
    cursor = order.length // first * first
    epoch, start = order.advance(0, cursor, second)
    used = epoch_ids(order)[:cursor]
    if epoch == 0:
        rest = epoch_ids(order)[start : start + second]
        assert not set(used.tolist()) & set(rest.tolist())
    else:
        assert start == 0 and order.length - cursor < second


@given(counts, st.integers(1, 3), small)
def test_repeats_are_whole_passes(counts, repeat, streams):
    order = Order(counts, 0, streams, 7, repeat=[repeat] * len(counts))
    times = np.bincount(epoch_ids(order), minlength=sum(counts))
    assert times.max(initial=0) <= repeat and repeat * sum(counts) - times.sum() < streams


@given(counts, small, small, st.integers(1, 60), st.data())
def test_substitute_is_of_the_same_stream(counts, streams, window, attempt, data):
    order = Order(counts, 3, streams, window)
    if not order.length:
        return
    position = data.draw(st.integers(0, order.length - 1))
    epoch = order.epoch(2)
    found = epoch.substitute(position, attempt)
    assert found == order.epoch(2).substitute(position, attempt)
    assert found in epoch_ids(order, 2)[position % streams :: streams]


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    order = Order([1000] * 10, 0, 64, 128)
    first, second = epoch_ids(order, 0), epoch_ids(order, 1)
    assert (first == second).mean() < 0.01
    assert (first == epoch_ids(Order([1000] * 10, 1, 64, 128), 0)).mean() < 0.01
    assert first[:4].tolist() == [
        103,
        209,
        413,
        496,
    ]  # older checkpoints go on with these


def test_neighbours_are_mixed():
    order = Order([1000] * 10, 0, 64, 4096)
    ids = epoch_ids(order)
    assert len(np.unique(ids[:64] // 100)) > 30  # a batch holds many places of class-sorted data


@given(st.lists(st.integers(0, 2**40), max_size=50), st.integers(1, 8), st.randoms())
def test_digest_does_not_depend_on_order_or_ranks(ids, world, random):
    whole = digest(np.array(ids, dtype=np.int64))
    random.shuffle(ids)
    parts = [digest_parts(torch.tensor(ids[r::world], dtype=torch.int64)) for r in range(world)]
    assert int(digest_hex(torch.stack(parts).sum(0)), 16) == whole
    if ids:
        assert digest(np.array(ids[1:], dtype=np.int64)) != whole


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 2**31))
def test_restart_is_immediate_for_a_billion_samples(seed):
    import time

    order = Order([10_000] * 100_000, seed, 1024, 4096)
    start = time.perf_counter()
    order.epoch(3).ids(np.arange(900_000_000, 900_004_096))
    assert time.perf_counter() - start < 5
