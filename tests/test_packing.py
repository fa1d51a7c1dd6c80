"""Packing: every sequence once and within budget, every token with its target, even cuts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwopd_megatron.batch.packing import Packer, deal, plan_microbatches, round_up
from iwopd_megatron.batch.trajectory import Trajectory, mask_tokens
from iwopd_megatron.config.models import Layout
from iwopd_megatron.runtime.parallel import Axis, Parallel, zigzag_index


def mesh(layout: Layout, dp: int = 1, dp_rank: int = 0, cp_rank: int = 0) -> Parallel:
    """A mesh as one rank sees it, without process groups."""
    one = Axis(None, 0, 1)
    axes = dict.fromkeys(("tp", "pp", "ep", "etp", "dp_cp", "expert_model"), one)
    cp, dp = Axis(None, cp_rank, layout.cp), Axis(None, dp_rank, dp)
    return Parallel(layout=layout, **axes, cp=cp, dp=dp, is_last_stage=True)


def greedy_fits(lengths, budget, bins):
    """Whether filling the emptiest bin with the longest next stays within budget."""
    loads = [0] * bins
    for length in sorted(lengths, reverse=True):
        loads[loads.index(min(loads))] += length
    return max(loads) <= budget


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=50),
    spare=st.integers(0, 200),
    dp=st.integers(1, 4),
    multiple_of=st.integers(1, 4),
    attention_cost=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_plan(lengths, spare, dp, multiple_of, attention_cost):
    budget = max(lengths) + spare
    plan = plan_microbatches(lengths, budget, dp, multiple_of, attention_cost)
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    assert len(plan) == dp
    count = len(plan[0])
    assert count > 0 and all(len(rank) == count for rank in plan)
    assert count % multiple_of == 0
    loads = [sum(lengths[i] for i in batch) for rank in plan for batch in rank]
    assert max(loads) <= budget
    if count > multiple_of:  # no more micro-batches than the greedy fill of fewer needs
        assert not greedy_fits(lengths, budget, dp * (count - multiple_of))


def costs_of(plan, lengths, attention_cost):
    """[dp][micro-batch]"""
    cost = [length + attention_cost * length**2 for length in lengths]
    return [[sum(cost[i] for i in batch) for batch in rank] for rank in plan]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=50),
    dp=st.integers(1, 4),
    attention_cost=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_costs_are_spread_evenly(lengths, dp, attention_cost):
    """Where the budget leaves room: costs as even as longest-first makes them, ranks alike."""
    plan = plan_microbatches(lengths, sum(lengths), dp, 1, attention_cost)
    costs = costs_of(plan, lengths, attention_cost)
    every = sorted(c for rank in costs for c in rank)
    largest = max(lengths) + attention_cost * max(lengths) ** 2
    assert every[-1] - every[0] <= largest  # no bin is over another by more than one sequence
    ranks = [sum(rank) for rank in costs]
    assert max(ranks) - min(ranks) <= max(every) - min(every) + 1e-6


def test_attention_counts():
    """A sequence of 160 tokens costs more attention than four of 40."""
    lengths = [160, 40, 40, 40, 40, 40]
    by_tokens = plan_microbatches(lengths, 400, 2, 1)
    by_cost = plan_microbatches(lengths, 400, 2, 1, attention_cost=0.01)
    worst = [max(max(r) for r in costs_of(p, lengths, 0.01)) for p in (by_tokens, by_cost)]
    assert worst == [416 + 56, 416] and by_cost[0] == [[0]]


def test_microbatches_at_one_time_cost_alike():
    """Expert parallelism makes ranks wait at every micro-batch: 100 | 65 and 50 | 60, in the order
    that leaves their sums closest too."""
    lengths = [100, 60, 50, 20, 45]  # filled longest first: 100, 60, 50 and 45 + 20
    assert costs_of(plan_microbatches(lengths, 100, 2, 1), lengths, 0) == [[100, 50], [65, 60]]


def test_plan_refuses_a_sequence_over_budget():
    with pytest.raises(ValueError) as error:
        plan_microbatches([5, 70, 64], 64, 1, 1)
    assert str(error.value) == (
        "a sequence of 70 tokens exceeds train.microbatch_tokens=64; raise it to at least 70."
    )


LONG = Trajectory(7, [10, 11, 12], [20, 21], [-0.1, -0.2], [-1.0, -2.0])
SHORT = Trajectory(4, [30], [40, 41, 42], [-0.3, -0.4, -0.5], [-3.0, -4.0, -5.0])


@pytest.mark.parametrize(
    ("aggregation", "denominator"),
    [
        ("token_mean", [5, 5, 5, 5, 5]),
        ("seq_mean_token_mean", [4, 4, 6, 6, 6]),
        ("seq_mean_token_sum", [2, 2, 2, 2, 2]),
    ],
)
def test_pack_by_hand(aggregation, denominator):
    """Two sequences of 4 and 3 inputs, padded to 8 for tp = 2 by a segment of its own."""
    (batch,), length = Packer(mesh(Layout(tp=2)), 100)([LONG, SHORT], aggregation)
    assert length == 8
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 30, 40, 41, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert batch.num_segments == 3
    assert batch.packed.cu_seqlens_q.tolist() == [0, 4, 7, 8]
    assert batch.rows.tolist() == [2, 3, 4, 5, 6]  # input P - 1 + t predicts response token t
    assert batch.targets.tolist() == [20, 21, 40, 41, 42]
    assert batch.place.tolist() == [0, 5, 0, 3, 6]
    assert batch.owner.tolist() == [7, 7, 4, 4, 4]
    assert batch.offset.tolist() == [0, 1, 0, 1, 2]
    assert batch.denominator.tolist() == denominator
    assert batch.rollout_logp.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5])
    assert batch.teacher_logp.tolist() == [-1, -2, -3, -4, -5]


def test_no_padding_segment_where_none_is_needed():
    (batch,), length = Packer(mesh(Layout()), 100)([LONG, SHORT])
    assert length == 7 and batch.num_segments == 2 and batch.tokens.shape == (1, 7)


def test_a_rank_without_samples_gets_padding_only():
    empty, full = (Packer(mesh(Layout(), dp=2, dp_rank=rank), 100)([LONG]) for rank in (1, 0))
    assert empty[1] == full[1] == 4
    assert len(empty[0]) == len(full[0]) == 1
    assert empty[0][0].rows.tolist() == [] and empty[0][0].tokens.tolist() == [[0]]
    assert full[0][0].rows.tolist() == [2, 3]


def test_only_pipeline_stages_pad_to_one_length():
    """They exchange tensors of a known shape; without them a micro-batch has its own length."""
    for layout, expected in ((Layout(tp=2), {2, 4}), (Layout(tp=2, pp=2), {4})):
        ranks = [Packer(mesh(layout, dp=2, dp_rank=rank), 100)([LONG]) for rank in (0, 1)]
        assert {batch.tokens.shape[1] for batches, _ in ranks for batch in batches} == expected
        assert {length for _, length in ranks} == {4}


MASKED = LONG.with_scores(index=5, loss_mask=[False, True])
UNREAD = LONG.with_scores(index=6, loss_mask=[False, False])


@pytest.mark.parametrize(
    ("aggregation", "denominator"),
    [("token_mean", [4] * 4), ("seq_mean_token_mean", [2, 6, 6, 6]),
     ("seq_mean_token_sum", [2] * 4)],
)  # fmt: skip
def test_masked_tokens_count_nowhere(aggregation, denominator):
    """And a response that no loss reads is not even fed to the model."""
    (batch,), length = Packer(mesh(Layout()), 100)([MASKED, UNREAD, SHORT], aggregation)
    assert length == 7 and batch.num_segments == 2
    assert batch.rows.tolist() == [3, 4, 5, 6] and batch.targets.tolist() == [21, 40, 41, 42]
    assert batch.offset.tolist() == [1, 0, 1, 2] and batch.owner.tolist() == [5, 4, 4, 4]
    assert batch.place.tolist() == [5, 0, 3, 6]  # of the whole response
    assert batch.denominator.tolist() == denominator


def test_nothing_to_read():
    (batch,), length = Packer(mesh(Layout(tp=2, pp=2)), 100)([UNREAD])
    assert length == 2 and len(batch.rows) == 0


def test_mask_tokens():
    sample = SHORT.with_scores(truncated=True)
    assert mask_tokens(SHORT, {7}) is SHORT and mask_tokens(SHORT, set(), True) is SHORT
    assert mask_tokens(sample, {41}).loss_mask == [True, False, True]
    assert mask_tokens(sample, {41}, True).loss_mask == [False] * 3
    assert [x.loss_tokens for x in (SHORT, MASKED, UNREAD)] == [3, 1, 0]
    assert MASKED.gaps() == pytest.approx([-1.8])
    assert MASKED.with_scores(old_logp=[-0.5, -0.5]).gaps() == pytest.approx([-1.5])


def test_deal():
    assert deal([1, 2, 3, 4, 5, 6], 3) == [[1, 2], [3, 4], [5, 6]] and deal([1, 2], 1) == [[1, 2]]


def samples(seed: int = 0, count: int = 9) -> list[Trajectory]:
    g = torch.Generator().manual_seed(seed)

    def ids(low):
        number = int(torch.randint(low, 30, (1,), generator=g))
        return torch.randint(1, 500, (number,), generator=g).tolist()

    pairs = [(ids(1), ids(1)) for _ in range(count)]
    return [Trajectory(i, p, r, [-1.0] * len(r), [-2.0] * len(r)) for i, (p, r) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("layout", "dp"),
    [(Layout(), 1), (Layout(), 3), (Layout(tp=2, cp=2), 1), (Layout(cp=4), 2),
     (Layout(pp=2, vpp=2), 2)],
    ids=str,
)  # fmt: skip
def test_every_response_token_once_over_all_ranks(layout, dp):
    given_samples = samples()
    seen, lengths, counts, shapes = {}, set(), set(), set()
    for dp_rank in range(dp):
        for cp_rank in range(layout.cp):
            batches, length = Packer(mesh(layout, dp, dp_rank, cp_rank), 80)(given_samples)
            lengths.add(length)
            counts.add(len(batches))
            for batch in batches:
                shape = batch.tokens.shape
                shapes.add(shape[1] * layout.cp)
                assert batch.positions.shape == shape and batch.segments.shape == shape[1:]
                assert shape[1] * layout.cp % layout.microbatch_multiple == 0
                for row, owner, t, target in zip(
                    *(x.tolist() for x in (batch.rows, batch.owner, batch.offset, batch.targets)),
                    strict=True,
                ):
                    assert (owner, t) not in seen
                    seen[owner, t] = target
                    sample = given_samples[owner]
                    position = len(sample.prompt_ids) - 1 + t
                    assert batch.positions[0, row] == position
                    assert (
                        batch.tokens[0, row] == (sample.prompt_ids + sample.response_ids)[position]
                    )
    assert seen == {(s.index, t): x for s in given_samples for t, x in enumerate(s.response_ids)}
    assert len(lengths) == len(counts) == 1  # every rank runs as many micro-batches
    assert shapes == lengths if layout.pp > 1 else max(shapes) == lengths.pop()
    if layout.vpp > 1:
        assert counts.pop() % layout.pp == 0


def test_zigzag_by_hand():
    assert zigzag_index([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_index([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag_index([3, 2], 1, 0).tolist() == [0, 1, 2, 3, 4]


def test_context_parallel_halves_stay_equal():
    """Each rank holds two equally long chunks of every segment, as the weighting assumes."""
    for cp_rank in range(2):
        batches, _ = Packer(mesh(Layout(tp=2, cp=2), cp_rank=cp_rank), 80)(samples(1))
        for batch in batches:
            counts = torch.bincount(batch.segments, minlength=batch.num_segments)
            whole = batch.packed.cu_seqlens_q.diff()
            assert torch.equal(counts * 2, whole.long()) and (counts % 2 == 0).all()


def test_scores_and_round_up():
    assert (
        SHORT.with_scores(teacher_logp=[-9.0] * 3).teacher_logp == [-9.0] * 3
        and SHORT.teacher_logp[0] == -3.0
    )
    assert SHORT.inputs == 3 and LONG.inputs == 4
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_interleaved_stages_ask_for_a_multiple_of_pp():
    assert len(Packer(mesh(Layout(pp=3, vpp=2)), 100)([LONG])[0]) == 3
    assert len(Packer(mesh(Layout(pp=3)), 100)([LONG])[0]) == 1
