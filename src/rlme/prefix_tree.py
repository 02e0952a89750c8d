"""Token sequences that share prefixes, laid out so that every distinct prefix is computed once.

Sort the sequences. Each one then shares its first tokens with the sequence before it (as many as with any
earlier one), and what remains is new: its *run*. The runs written one after another form a single row of
tokens in which every distinct prefix of the input occurs exactly once: a radix tree, written depth first.

    sequences   a b c d      row        a b c d | x | q r
                a b x        run        0 0 0 0   1   2 2
                q r          position   0 1 2 3   2   0 1

A model computes this row in one forward pass without padding, provided that position ids follow the tree
(`position`, above) and that a token attends to its ancestors only (`rlme.tree_attention`). Nothing here needs
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Reading one more key costs a tile about as much as this many more queries on it (gathering K and V, per-tile
# overhead). Values from 16 to 64 give the same speed within the noise.
KEY_COST = 32
# A full pack may be cut where up to this many tokens more than the minimum are shared, if that fills it
# better.
CUT_SLACK = 16
# Longer runs are cut, so that the masked upper half of their causal square is not computed.
MAX_TILE_QUERIES = 512
# Tiles of different sizes share a batch as long as padding adds at most this share of work.
MAX_PADDING = 0.15
# And as long as a batch has no more scores than this: masks of long texts are large.
MAX_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that one sequence adds to the row: row indices `start` to `stop`, below the first `shared` of
    `path`.
    """

    start: int
    stop: int
    shared: int
    path: Ints  # row index of every token of the sequence, from its first token on


@dataclass(frozen=True, slots=True)
class Tile:
    """Consecutive row indices that attend together: queries `start` to `stop`, over the row indices in
    `keys`.
    """

    start: int
    stop: int
    keys: Ints
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class TreeRow:
    """Sequences as one row of S tokens.

    `tokens[S]`, `positions[S]`: the row and its position ids. `paths[i][t]`: the row index of token t of
    input sequence i. `runs`: the row, cut where sequences branch.
    """

    tokens: Ints
    positions: Ints
    paths: list[Ints]
    runs: list[Run]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n


def build_row(sequences: Sequence[Sequence[int]]) -> TreeRow:
    """Lay out non-empty token sequences (duplicates and prefixes of each other are fine) as one row."""
    if any(len(sequence) == 0 for sequence in sequences):
        raise ValueError("a token sequence is empty")
    paths: list[Ints] = [np.empty(0, np.int64)] * len(sequences)
    tokens: list[int] = []
    positions: list[int] = []
    runs: list[Run] = []
    previous: Sequence[int] = ()
    path = np.empty(0, np.int64)
    for i in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[i]
        shared = shared_length(previous, sequence)
        start = len(tokens)
        tokens.extend(sequence[shared:])
        positions.extend(range(shared, len(sequence)))
        path = np.concatenate([path[:shared], np.arange(start, len(tokens))])
        if start < len(tokens):
            runs.append(Run(start, len(tokens), shared, path))
        paths[i], previous = path, sequence
    return TreeRow(np.array(tokens, np.int64), np.array(positions, np.int64), paths, runs)


def without_known(row: TreeRow, known: Sequence[Ints], held: int) -> TreeRow:
    """The row without the tokens whose keys and values are held elsewhere.

    `known[i]`: indices, below `held`, of the first tokens of sequence i; its other tokens are computed. In the
    result, runs and paths index what is held followed by the row.
    """
    where = np.full(len(row.tokens), -1)
    for path, places in zip(row.paths, known, strict=True):
        where[path[: len(places)]] = places
    for path, places in zip(row.paths, known, strict=True):
        where[path[len(places) :]] = -1  # what one sequence wants computed is, whatever another one knows
    new = where < 0
    where[new] = held + np.arange(int(new.sum()))
    runs = []
    for run in row.runs:
        # Known is the beginning of a sequence, but another may want a token in the middle of it computed.
        edges = np.flatnonzero(np.diff(new[run.start : run.stop].astype(np.int8), prepend=0, append=0))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            start = int(where[run.start + first])
            path = where[run.path[: run.shared + last]]
            runs.append(Run(start, start + last - first, run.shared + first, path))
    return TreeRow(row.tokens[new], row.positions[new], [where[path] for path in row.paths], runs)


def plan_packs(
    sequences: Sequence[Sequence[int]],
    token_budget: int,
    known: Sequence[int] | None = None,
    held_from: int | None = None,
) -> list[list[int]]:
    """Split sequences into packs whose rows hold at most `token_budget` tokens each.

    `known[i]`: how many of the first tokens of sequence i need no computing. Returns lists of indices into
    `sequences`, in an order where neighbours share most. A pack that is full is cut where the least is shared,
    hence between groups rather than inside one; the part shared across a cut is computed once on each side, or, where
    it has `held_from` tokens or more, only on the first. A single sequence longer than the budget gets a pack of its
    own.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, expected at least 1")
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    shared = [0] + [shared_length(sequences[a], sequences[b]) for a, b in pairwise(order)]
    free = known or [0] * len(sequences)

    def cost(place: int, below: int) -> int:
        i = order[place]
        return len(sequences[i]) - max(below, free[i])

    packs: list[list[int]] = []
    start = 0
    while start < len(order):
        held = shared[start] if held_from is not None and shared[start] >= held_from else 0
        used, stop = cost(start, held), start + 1
        while stop < len(order) and used + cost(stop, shared[stop]) <= token_budget:
            used += cost(stop, shared[stop])
            stop += 1
        if stop < len(order):
            least = min(shared[start + 1 : stop + 1])
            stop = max(cut for cut in range(start + 1, stop + 1) if shared[cut] <= least + CUT_SLACK)
        packs.append(order[start:stop])
        start = stop
    return packs


def plan_tiles(runs: Sequence[Run]) -> list[Tile]:
    """Cut a row into tiles of attention work, as cheaply as possible.

    Several short questions about one answer read its keys once, while long answers to one prompt stay separate
    instead of computing scores they must mask.
    """
    pieces = []
    for run in runs:
        for start in range(run.start, run.stop, MAX_TILE_QUERIES):
            stop = min(start + MAX_TILE_QUERIES, run.stop)
            shared = run.shared + start - run.start
            pieces.append(Run(start, stop, shared, run.path[: shared + stop - start]))

    def cost(first: Run, last: Run) -> int:
        # A run branches off from the one before it, whose path holds its ancestors: only its own keys are new.
        return (last.stop - first.start + KEY_COST) * (len(first.path) + last.stop - first.stop)

    # least[i]: the cost of the first i pieces, cut in the best way, whose last tile begins with piece begins[i].
    least, begins = [0], [0]
    earliest = 0
    for i, last in enumerate(pieces):
        while last.stop - pieces[earliest].start > MAX_TILE_QUERIES:
            earliest += 1
        best = min((least[j] + cost(pieces[j], last), j) for j in range(earliest, i + 1))
        least.append(best[0])
        begins.append(best[1])
    tiles = []
    stop = len(pieces)
    while stop:
        members = pieces[begins[stop] : stop]
        keys = np.unique(np.concatenate([piece.path for piece in members]))
        tiles.append(Tile(members[0].start, members[-1].stop, keys, tuple(members)))
        stop = begins[stop]
    return tiles[::-1]


def tile_mask(tile: Tile) -> Bools:
    """[queries, keys] of a tile: True where the key is the query itself or one of its ancestors."""
    mask = np.zeros((tile.stop - tile.start, len(tile.keys)), bool)
    for run in tile.runs:
        columns = np.searchsorted(tile.keys, run.path)
        rows = slice(run.start - tile.start, run.stop - tile.start)
        block = np.zeros((run.stop - run.start, len(run.path)), bool)
        block[:, : run.shared] = True
        block[:, run.shared :] = np.tri(run.stop - run.start, dtype=bool)
        mask[rows, columns] = block
    return mask


def batch_tiles(tiles: Sequence[Tile], spare: int = 0) -> list[list[Tile]]:
    """Group tiles of similar size into batches that waste at most `MAX_PADDING` of their work on padding, and `spare`
    scores besides."""
    batches: list[list[Tile]] = []
    work = widest = longest = 0
    for tile in sorted(tiles, key=lambda tile: (len(tile.keys), tile.stop - tile.start)):
        queries, keys = tile.stop - tile.start, len(tile.keys)
        if batches:
            padded = (len(batches[-1]) + 1) * max(widest, queries) * max(longest, keys)
            if padded <= min((1 + MAX_PADDING) * (work + queries * keys) + spare, MAX_SCORES):
                batches[-1].append(tile)
                work, widest, longest = work + queries * keys, max(widest, queries), max(longest, keys)
                continue
        batches.append([tile])
        work, widest, longest = queries * keys, queries, keys
    return batches
