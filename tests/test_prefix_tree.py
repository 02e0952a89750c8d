"""The tree itself: every prefix once, packs within budget, tiles that cover the row; hypothesis over random trees."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlme.prefix_tree import KEY_COST, batch_tiles, build_row, plan_packs, plan_tiles, shared_length, tile_mask

# Few different tokens, so that prefixes coincide often.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


def prefixes(sequence):
    return {tuple(sequence[:n]) for n in range(1, len(sequence) + 1)}


@given(sequences)
def test_every_distinct_prefix_is_one_token_of_the_row(given_sequences):
    row = build_row(given_sequences)
    assert len(row.tokens) == len(set().union(*map(prefixes, given_sequences)))
    for sequence, path in zip(given_sequences, row.paths, strict=True):
        assert row.tokens[path].tolist() == sequence
        assert row.positions[path].tolist() == list(range(len(sequence)))
        assert all(np.diff(path) > 0)  # ancestors come before their descendants


@given(sequences)
def test_a_token_attends_to_its_own_prefix_and_to_nothing_else(given_sequences):
    row = build_row(given_sequences)
    attended = {}
    for tile in plan_tiles(row.runs):
        mask = tile_mask(tile)
        for query in range(tile.start, tile.stop):
            assert query not in attended
            attended[query] = tile.keys[mask[query - tile.start]].tolist()
    for path in row.paths:
        for depth, query in enumerate(path.tolist()):
            assert attended[query] == path[: depth + 1].tolist()
    assert sorted(attended) == list(range(len(row.tokens)))


@given(sequences, st.sampled_from([0, 10, 1000]))
def test_batches_hold_every_tile_once_with_bounded_padding(given_sequences, spare):
    tiles = plan_tiles(build_row(given_sequences).runs)
    batches = batch_tiles(tiles, spare)
    assert len(batches) <= len(batch_tiles(tiles))
    assert sorted(t.start for batch in batches for t in batch) == sorted(t.start for t in tiles)
    for batch in batches:
        work = sum((t.stop - t.start) * len(t.keys) for t in batch)
        padded = len(batch) * max(t.stop - t.start for t in batch) * max(len(t.keys) for t in batch)
        assert padded <= 1.15 * work + spare or len(batch) == 1


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=6))
def test_no_other_way_of_cutting_a_row_into_tiles_costs_less(branches):
    context = [0] * 60  # every sequence leaves it somewhere and goes on for a while
    row = build_row([context[:shared] + [10 + i] * own for i, (shared, own) in enumerate(branches)])

    def cost(tiles):
        return sum((stop - start + KEY_COST) * keys for start, stop, keys in tiles)

    def keys(runs):
        return len(set().union(*(run.path.tolist() for run in runs)))

    n = len(row.runs)
    # A bit for each run that begins a tile; the first always does.
    ways = [[0, *(i for i in range(1, n) if cuts >> i & 1), n] for cuts in range(0, 2**n, 2)]
    cheapest = min(
        cost((row.runs[a].start, row.runs[b - 1].stop, keys(row.runs[a:b])) for a, b in pairwise(way)) for way in ways
    )
    assert cost((tile.start, tile.stop, len(tile.keys)) for tile in plan_tiles(row.runs)) == cheapest


@settings(max_examples=200)
@given(sequences, st.integers(1, 40))
def test_packs_hold_every_sequence_once_within_the_budget(given_sequences, budget):
    packs = plan_packs(given_sequences, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(given_sequences)))
    for pack in packs:
        tokens = len(build_row([given_sequences[i] for i in pack]).tokens)
        assert tokens <= budget or len({tuple(given_sequences[i]) for i in pack}) == 1


def test_a_full_pack_is_cut_between_groups():
    prompts = [[1] * 50, [2] * 50]
    rows = [prompt + [10 + i] * 20 for prompt in prompts for i in range(4)]  # a group takes 130 tokens
    packs = plan_packs(rows, 200)
    assert sorted(map(sorted, packs)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_group_larger_than_the_budget_is_split_and_a_single_long_row_stands_alone():
    rows = [[1] * 50 + [10 + i] * 20 for i in range(4)]
    assert [len(pack) for pack in plan_packs(rows, 95)] == [2, 2]
    assert sorted(plan_packs([[1] * 100, [2] * 3], 10)) == [[0], [1]]


def test_long_runs_are_cut_so_that_half_of_their_square_is_skipped():
    tiles = plan_tiles(build_row([list(range(2000))]).runs)
    assert [len(t.keys) for t in tiles] == [512, 1024, 1536, 2000]


def test_questions_about_one_answer_attend_together_and_long_answers_apart():
    prompt, answers = [1] * 150, [[10 + i] * 96 for i in range(2)]
    apart = plan_tiles(build_row([prompt + answer for answer in answers]).runs)
    assert len(apart) == 2
    context = prompt + answers[0]
    together = plan_tiles(build_row([context + [20 + k] * 12 for k in range(8)]).runs)
    assert len(together[-1].runs) > 1


def test_bad_input():
    with pytest.raises(ValueError, match="empty"):
        build_row([[1], []])
    with pytest.raises(ValueError, match="token_budget"):
        plan_packs([[1]], 0)
    assert shared_length([1, 2, 3], [1, 2]) == 2
    assert shared_length([], [1]) == 0
