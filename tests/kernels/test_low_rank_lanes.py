"""Lanes' low-rank products against the same layer for each lane alone: values, gradients, dropout, and numbers gone wrong."""

import pytest
import torch

from deltaloom.kernels.dropout import Front, Stream, by_streams, dropout, of_lanes
from deltaloom.kernels.low_rank import low_rank_linear
from deltaloom.kernels.low_rank_lanes import Branch, low_rank_lanes
from deltaloom.tuned.adapted import DenseAffine


def parts(rows, ranks, dropouts, dtype=torch.float64, time=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(6, 4, dtype=dtype)
    layer.requires_grad_(False)
    x = torch.randn(sum(rows), time, 6, generator=generator, dtype=dtype, requires_grad=True)
    branches, start = [], 0
    for number, (count, rank, p) in enumerate(zip(rows, ranks, dropouts, strict=True)):
        if rank:
            factors = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
                       for shape in ((rank, 6), (rank,), (4, rank))]
            branches.append(Branch(f"lane-{number}", start, start + count, *factors, p))
        start += count
    return DenseAffine(layer), x, branches


def streams_of(rows, time, own, seed=9):
    return [Stream(f"lane-{number}", torch.Generator().manual_seed(seed + number), count, {time: own[number]})
            for number, count in enumerate(rows)]


@pytest.mark.parametrize(("rows", "ranks", "dropouts"), [
    ((2, 2, 2), (3, 3, 3), (0, 0, 0)), ((2, 2, 2, 2), (1, 3, 2, 2), (0.5, 0, 0.2, 0.5)),
    ((1, 3, 3, 2), (2, 1, 4, 2), (0, 0.3, 0, 0)),
    ((2, 2, 2), (2, 0, 3), (0.4, 0, 0.4)), ((4,), (2,), (0.3,))])
def test_lanes_are_what_each_lane_is_alone(rows, ranks, dropouts):
    affine, x, branches = parts(rows, ranks, dropouts)
    weight = torch.randn(sum(rows), 5, 4, dtype=x.dtype)
    with by_streams(streams_of(rows, 5, [5] * len(rows))):
        y = low_rank_lanes(affine, x, branches)
    (y * weight).sum().backward()
    found = [x.grad, *(factor.grad for branch in branches for factor in (branch.down, branch.scale, branch.up))]
    _, again, copies = parts(rows, ranks, dropouts)
    expected = affine.product(again).clone()
    for branch in copies:
        with by_streams(streams_of(rows, 5, [5] * len(rows))), of_lanes((branch.lane,)):
            span = slice(branch.start, branch.stop)
            own = low_rank_linear(affine, again[span], branch.down, branch.scale, branch.up, branch.dropout)
            expected = torch.cat((expected[:span.start], own, expected[span.stop:]))
    torch.testing.assert_close(y, expected)
    (expected * weight).sum().backward()
    for one, other in zip(found, [again.grad, *(factor.grad for branch in copies
                                                for factor in (branch.down, branch.scale, branch.up))], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [(2, 2, 2), (2, 3, 1)])
def test_a_lane_that_is_not_finite_harms_no_other(rows):
    affine, x, branches = parts(rows, (2, 3, 2), (0, 0, 0))
    with torch.no_grad():
        x[rows[0]:rows[0] + rows[1]] = torch.inf
        branches[1].up.fill_(torch.nan)
    y = low_rank_lanes(affine, x, branches)
    y.sum().backward()
    for branch in (branches[0], branches[2]):
        assert y[branch.start:branch.stop].isfinite().all() and x.grad[branch.start:branch.stop].isfinite().all()
        assert all(factor.grad.isfinite().all() for factor in (branch.down, branch.scale, branch.up))


def alone(shape, p, seed, front=None):
    """The mask of a stream that has the batch for itself."""
    with by_streams([Stream("a", torch.Generator().manual_seed(seed), shape[0])]):
        return dropout(torch.ones(shape), p, front=front)


def test_each_stream_draws_what_it_would_draw_alone_in_the_shape_that_it_would_have():
    rows, own = (2, 1, 3), (4, 7, 5)
    with by_streams(streams_of(rows, 7, own)):
        hidden, pooled = dropout(torch.ones(6, 7, 8), 0.3), dropout(torch.ones(6, 8), 0.3)
        weights = dropout(torch.ones(6, 2, 7, 7), 0.3)
    start = 0
    for number, (count, width) in enumerate(zip(rows, own, strict=True)):
        generator = torch.Generator().manual_seed(9 + number)
        with by_streams([Stream("a", generator, count)]):
            expected = [dropout(torch.ones(shape), 0.3) for shape in ((count, width, 8), (count, 8), (count, 2, width, width))]
        span = slice(start, start + count)
        assert torch.equal(hidden[span, :width], expected[0]) and torch.equal(pooled[span], expected[1])
        assert torch.equal(weights[span, :, :width, :width], expected[2])
        assert not hidden[span, width:].any() and not weights[span, :, width:].any() and not weights[span, :, :, width:].any()
        start += count


def test_a_prefix_in_front_is_drawn_as_long_as_it_is():
    seen = torch.tensor([[True, True, False], [True, True, False], [False, False, False], [True, True, True]])
    streams = [Stream(lane, torch.Generator().manual_seed(seed), rows, {4: width})
               for lane, seed, rows, width in (("a", 1, 2, 3), ("b", 2, 1, 4), ("c", 3, 1, 2))]
    with by_streams(streams):
        found = dropout(torch.ones(4, 2, 4, 3 + 4), 0.4, front=Front(3, seen))
    for span, seed, prefix, width in ((slice(0, 2), 1, 2, 3), (slice(2, 3), 2, 0, 4), (slice(3, 4), 3, 3, 2)):
        count = span.stop - span.start
        expected = alone((count, 2, width, prefix + width), 0.4, seed)
        assert torch.equal(found[span, :, :width, :prefix], expected[..., :prefix])
        assert torch.equal(found[span, :, :width, 3:3 + width], expected[..., prefix:])


def test_one_run_alone_draws_from_the_global_generator_as_before():
    torch.manual_seed(4)
    expected = dropout(torch.ones(3, 5), 0.5)
    assert torch.equal(alone((3, 5), 0.5, 4), expected)
