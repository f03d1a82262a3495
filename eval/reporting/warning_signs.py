"""Looks for what may be wrong with a run: in its metrics, its rows, the times of its ranks and its evaluation.

Each function returns whole sentences, and none where it finds nothing.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from eval.reporting.run_files import number
from eval.reporting.run_summary import Run

RISE = 0.02  # share by which val/loss has to stand above its lowest value
BEFORE, AFTER = 6, 3  # number of logged losses before a loss, and after it, that say what is normal there
SPIKE_DEVIATIONS, SPIKE_SHARE = 8.0, 0.25  # a spike exceeds the normal by both: deviations of the noise, and a share
ENOUGH_LOGS = 10  # number of logged losses; with fewer, what is normal is not known
WAITING = 0.1  # share of the steps' time by which ranks differ in one phase
UNEVEN = ("data", "forward", "backward")  # phases in which a rank does its own work

Metrics = Sequence[Mapping[str, float | None]]


def warning_signs(run: Run) -> list[str]:
    """Returns all that may be wrong with a run."""
    epochs = run.recipe.get("epochs")
    return [
        *unfinished(run),
        *not_finite(run.metrics),
        *overfitting(run.metrics, steps_of_an_epoch(run.usage, epochs)),
        *loss_spikes(run.metrics),
        *no_progress(run.metrics),
        *rows_left_out(run.tallies),
        *waiting_ranks(run.usage.get("ranks", [])),
        *unstable_answers(run.evaluation.scores),
        *cut_off_answers(run.evaluation.scores),
    ]


def unfinished(run: Run) -> list[str]:
    if run.usage:
        return []
    return [f"{run.name} has no usage.json: it has not come to its end, or is older than such files."]


def steps_of_an_epoch(usage: Mapping[str, Any], epochs: Any) -> float | None:
    """Returns the optimizer steps of an epoch, where the run has come to its end; otherwise None."""
    if not usage.get("last_step") or not isinstance(epochs, int) or epochs < 1:
        return None
    return float(usage["last_step"]) / epochs


def points(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """Returns the step and the value of each line that has a finite value of `key`."""
    return [(int(number(line["step"])), value) for line in metrics if (value := line.get(key)) is not None]


def not_finite(metrics: Metrics) -> list[str]:
    steps = [line["step"] for line in metrics if line.get("train/loss", 0.0) is None]
    return [f"train/loss is not finite at step {steps[0]:,.0f}."] if steps else []


def overfitting(metrics: Metrics, steps_an_epoch: float | None = None) -> list[str]:
    """Says after which step val/loss rises. It has risen when it ends above its lowest value by the share RISE."""
    losses = points(metrics, "val/loss")
    if len(losses) < 2:
        return []
    step, lowest = min(losses, key=lambda point: (point[1], point[0]))
    last_step, last = losses[-1]
    if last <= lowest * (1 + RISE):
        return []
    epoch = f"epoch {step / steps_an_epoch:.3g} (step {step:,})" if steps_an_epoch else f"step {step:,}"
    return [
        f"Overfitting after {epoch}: val/loss was {lowest:.4g} there and is {last:.4g} at step {last_step:,}, "
        f"{100 * (last / lowest - 1):.0f} % higher. Train for less time, or use the checkpoint of that step."
    ]


def spikes(losses: Sequence[float]) -> list[int]:
    """Returns the places of the losses that stand far above those around them.

    What is normal at a place is the median of the BEFORE losses before it and the AFTER losses after it. The noise is
    the median absolute deviation from that, times 1.4826, which for a normal distribution is the standard deviation.
    """
    if len(losses) < ENOUGH_LOGS:
        return []
    values = np.array(losses)
    around = [np.r_[max(0, i - BEFORE) : i, i + 1 : min(len(values), i + 1 + AFTER)] for i in range(len(values))]
    normal = np.array([np.median(values[places]) for places in around])
    above = values - normal
    noise = 1.4826 * float(np.median(np.abs(above)))
    high = (above > SPIKE_DEVIATIONS * noise) & (above > SPIKE_SHARE * np.abs(normal))
    high[:BEFORE] = False  # a loss that falls from its start is no spike
    return [int(place) for place in np.flatnonzero(high)]


def loss_spikes(metrics: Metrics) -> list[str]:
    """Names the highest spike of train/loss, and says how many there are; neighbours count as one."""
    losses = points(metrics, "train/loss")
    found = spikes([loss for _, loss in losses])
    if not found:
        return []
    count = 1 + sum(later - earlier > 1 for earlier, later in pairwise(found))
    step, loss = losses[max(found, key=lambda place: losses[place][1])]
    before = losses[found[0] - 1][1]
    if count == 1:
        return [f"train/loss has a spike at step {step:,}: {loss:.4g}, after {before:.4g}."]
    return [f"train/loss has {count} spikes; the highest is {loss:.4g} at step {step:,}."]


def no_progress(metrics: Metrics) -> list[str]:
    """Says where the last fifth of train/loss is not below the first fifth."""
    losses = [loss for _, loss in points(metrics, "train/loss")]
    if len(losses) < ENOUGH_LOGS:
        return []
    fifth = len(losses) // 5
    first, last = float(np.median(losses[:fifth])), float(np.median(losses[-fifth:]))
    return [f"train/loss has not fallen: {first:.4g} at first, {last:.4g} at the end."] if last >= first else []


def rows_left_out(tallies: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Says for each file how many rows were dropped or cut."""
    said = {
        "dropped": "were too long and dropped",
        "cut": "were cut",
        "unlabelled": "had no label after the cut",
    }
    return [
        f"{name}: {count:,.0f} of {max(tally.get('rows', 0), tally.get('examples', 0)):,.0f} rows {what}."
        for name, tally in tallies.items()
        for key, what in said.items()
        if (count := tally.get(key, 0.0))
    ]


def waiting_ranks(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names the slowest and the fastest rank in the phase where the ranks differ most.

    A rank that is done early waits in the next collective, and the phase of that collective has its waiting time.
    """
    if len(ranks) < 2:
        return []
    seconds = {
        phase: {int(rank["rank"]): number(rank["phases"].get(phase, {}).get("seconds", 0.0)) for rank in ranks}
        for phase in UNEVEN
    }
    whole = max(sum(seconds[phase][int(rank["rank"])] for phase in UNEVEN) for rank in ranks)
    phase = max(seconds, key=lambda each: max(seconds[each].values()) - min(seconds[each].values()))
    spent = seconds[phase]
    slow, fast = max(spent, key=lambda rank: spent[rank]), min(spent, key=lambda rank: spent[rank])
    if spent[slow] - spent[fast] <= WAITING * whole:
        return []
    share = 100 * (spent[slow] - spent[fast]) / whole
    return [
        f"Ranks wait for each other: in {phase} rank {slow} takes {spent[slow]:.1f} s and rank {fast} "
        f"{spent[fast]:.1f} s, a difference of {share:.0f} % of the steps' time."
    ]


def unstable_answers(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Says where an answer differs when its question is asked alone."""
    return [
        f"{label}: {score['different']:.0f} of {score.get('verified', 0):.0f} answers differ when their questions are "
        "asked one at a time."
        for label, score in scores.items()
        if score.get("different")
    ]


def cut_off_answers(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Says how many answers of the tuned model have ended because they might have no more tokens."""
    count = scores.get("tuned", {}).get("cut_off", 0)
    return [f"{count:,.0f} answers of the tuned model were cut off; --max-new-tokens gives them more."] if count else []
