"""Cuts a process's share of a step into micro-batches, and decides whether their activations are recomputed.

The mathematics of a step does not depend on it. Of all ways that fit into memory the one that takes least time is
chosen, by an estimate that counts tokens.
"""

from collections.abc import Callable, Sequence

ENOUGH = 16_384  # tokens of a micro-batch, beyond which a larger one is no faster on any card
# What a micro-batch costs beside its tokens, in tokens: the weights are read once each way, which takes as long as
# computing about 250 tokens on an H100 (787 TFLOP/s and 3.35 TB/s), and as many kernels start as for any other.
PER_MICRO_BATCH = 512
# A micro-batch at ZeRO-3 takes at least as long as gathering all weights twice, in tokens: what PCIe 4 x16 (32 GB/s)
# carries while an H100 computes so many. Offloaded weights come the same way.
GATHERING = 8192
RECOMPUTATION = 4 / 3  # a second forward pass beside a forward and a backward pass, which takes twice its time

# What each value of gradient_checkpointing allows; the names of the kinds of checkpointing ask for it.
RECOMPUTING: dict[str, Sequence[bool]] = {"auto": (False, True), "none": (False,)}


def possible_sizes(share: int, tokens: float) -> list[int]:
    """The micro-batch sizes that divide a share of so many rows with so many tokens each, the largest of use first."""
    return [size for size in range(share, 0, -1) if share % size == 0 and (size == 1 or size * tokens <= ENOUGH)]


def choose_cut(
    sizes: Sequence[int],
    tokens: float,
    recomputing: Sequence[bool],
    fits: Callable[[int, bool], bool],
    gathers: bool = False,
) -> tuple[int, bool]:
    """The micro-batch size, of `sizes` in falling order, and whether to recompute, of what `recomputing` allows.

    `tokens` is the average number of tokens of a row. fits(size, recomputes) says whether that fits into memory; a
    smaller size needs no more. `gathers` says whether each micro-batch gathers the weights. Where nothing fits, the
    result is what needs least.
    """

    def cost_of_a_row(cut: tuple[int, bool]) -> float:
        computed = cut[0] * tokens * (RECOMPUTATION if cut[1] else 1)
        return (max(computed, GATHERING if gathers else 0) + PER_MICRO_BATCH) / cut[0]

    found = [(size, recomputes) for recomputes in recomputing if (size := _largest(sizes, fits, recomputes))]
    if not found:
        return sizes[-1], recomputing[-1]
    return min(found, key=cost_of_a_row)


def _largest(sizes: Sequence[int], fits: Callable[[int, bool], bool], recomputes: bool) -> int | None:
    """The first of the falling `sizes` that fits; None where none does."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle], recomputes):
            high = middle
        else:
            low = middle + 1
    return sizes[low] if low < len(sizes) else None
