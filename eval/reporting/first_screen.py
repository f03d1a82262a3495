"""Answers the three questions on the first screen: did it get better, what did it cost, is anything wrong?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.judging.statistics import LEVEL, Interval
from eval.reporting.evaluation import Difference, Evaluation
from eval.reporting.run_summary import Run, measured
from eval.reporting.warning_signs import points

VERDICTS = {"good": "Yes.", "bad": "No, it got worse.", "plain": "Not clearly: the difference may be chance."}
AT_WORK = ("forward", "backward", "update")


@dataclass(frozen=True)
class Card:
    """Holds the answer to one question: a large figure, a sentence, and further lines."""

    question: str
    figure: str
    sentence: str
    lines: Sequence[str] = field(default=())
    mood: str = "plain"  # good, bad or plain: the colour of the card's edge

    def told(self) -> str:
        """Returns all that the card says, for a page without cards."""
        return " ".join([f"{self.question} {self.figure}.", self.sentence, *self.lines]).strip()


def cards(run: Run, signs: Sequence[str]) -> list[Card]:
    """Returns the three cards of a run; `signs` are the sentences of warning_signs()."""
    return [better(run), cost(run), wrong(signs)]


def better(run: Run) -> Card:
    """Compares the accuracy before and after the training or, where nobody has judged answers, val/loss."""
    question, found = "Did it get better?", run.evaluation
    accuracies = {label: score["accuracy"] for label, score in found.scores.items() if "accuracy" in score}
    if "tuned" not in accuracies:
        return _by_validation(question, run)
    after = accuracies["tuned"]
    said = f"The tuned model answers {_share(found, 'tuned', after)}."
    if "base" not in accuracies:
        return Card(question, percent(after), said, ["Nobody has asked the base model."])
    before = accuracies["base"]
    mood = {1: "good", 0: "plain", -1: "bad"}[_direction(found, before, after)]
    lines = [f"The base model answers {_share(found, 'base', before)}."]
    lines += _difference(found.first_judge) if found.first_judge else []
    return Card(question, f"{percent(before)} → {percent(after)}", f"{VERDICTS[mood]} {said}", lines, mood)


def _by_validation(question: str, run: Run) -> Card:
    asked = "Nobody has judged the answers." if run.answers else f"Nobody has asked the models. {how_to_ask(run)}"
    losses = points(run.metrics, "val/loss")
    if not losses:
        return Card(question, "not known", asked)
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    if len(losses) == 1:
        return Card(question, f"val/loss {last:.4g}", f"val/loss was computed once, at step {last_step:,}.", [asked])
    lowest = min(loss for _, loss in losses)
    said = f"val/loss went from {first:.4g} at step {first_step:,} to {last:.4g} at step {last_step:,}."
    said += f" Its lowest value was {lowest:.4g}." if lowest < last else ""
    return Card(question, f"val/loss {first:.4g} → {last:.4g}", said, [asked])


def how_to_ask(run: Run) -> str:
    return f"python -m eval.run --run {run.name} asks base and tuned model."


def _share(found: Evaluation, label: str, accuracy: float) -> str:
    count, interval = found.num_questions.get(label, 0), found.intervals.get(label)
    text = f"{percent(accuracy)} right"
    right = accuracy * count
    if count and abs(right - round(right)) < 1e-6:
        text = f"{right:,.0f} of {count:,} questions right"
    return f"{text} (95 % interval {interval_text(interval)})" if interval else text


def _difference(found: Difference) -> list[str]:
    lines = [f"{found.better:,} answers became better, {found.worse:,} became worse."]
    if found.difference is not None:
        text = f"The difference is {signed(found.difference)} points"
        text += f" (95 % interval {signed(found.interval[0])} to {signed(found.interval[1])}" if found.interval else ""
        text += f", p = {found.p_value:.2g}" if found.interval and found.p_value is not None else ""
        lines.append(text + (")." if found.interval else "."))
    return lines


def _direction(found: Evaluation, before: float, after: float) -> int:
    """Returns 1 where the tuned model is better, -1 where it is worse, and 0 where the difference may be chance."""
    compared = found.first_judge
    if compared is not None and compared.interval is not None:
        return int(compared.interval[0] > 0) - int(compared.interval[1] < 0)
    if compared is not None and compared.p_value is not None and compared.difference is not None:
        return (compared.p_value < LEVEL) * (1 if compared.difference > 0 else -1)
    low, high = found.intervals.get("base", (before, before)), found.intervals.get("tuned", (after, after))
    return int(high[0] > low[1]) - int(high[1] < low[0])  # intervals that do not overlap


def cost(run: Run) -> Card:
    """Says what the training took: time, memory, tokens a second and utilisation."""
    question, seconds = "What did it cost?", run.figure("wall_seconds")
    if seconds is None:
        return Card(question, "not known yet", "A run writes its costs into usage.json when it ends.")
    ranks = run.usage["ranks"]
    where = "process" if len(ranks) == 1 else "processes"
    said = f"On {len(ranks)} {where} ({ranks[0].get('device', 'an unknown device')})."
    lines = []
    if peak := run.figure("peak_bytes"):
        lines.append(f"Memory: {amount(peak)} at the peak of a rank ({run.memory_of}).")
    if tokens := run.figure("tokens_per_second"):
        lines.append(f"Throughput: {tokens:,.0f} tokens a second in a steady step.")
    lines.append(utilisation(run, seconds))
    return Card(question, duration(seconds), said, lines)


def utilisation(run: Run, wall_seconds: float) -> str:
    """Says which share of the time the steps take, and how fast they compute."""
    ranks: Sequence[dict[str, Any]] = run.usage["ranks"]
    spent = [
        sum(measured(rank["phases"].get(phase, {}).get("seconds") for phase in AT_WORK)) / wall_seconds
        for rank in ranks
    ]
    text = f"Utilisation: {100 * min(1.0, sum(spent) / len(spent)):.0f} % of the time in forward, backward and update"
    if (mfu := run.figure("mfu")) is not None:
        return f"{text}, {100 * mfu:.1f} % of the device's FLOPs in a step."
    speed = run.figure("flops_per_second")
    return f"{text}, {speed / 1e9:,.3g} GFLOP/s in a steady step." if speed else f"{text}."


def wrong(signs: Sequence[str]) -> Card:
    question = "Is anything wrong?"
    if not signs:
        looked = "Looked for: overfitting, loss spikes, a loss that does not fall, rows left out, ranks that wait."
        return Card(question, "nothing found", looked, mood="good")
    figure = "1 warning" if len(signs) == 1 else f"{len(signs)} warnings"
    return Card(question, figure, signs[0], signs[1:], "bad")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def interval_text(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def duration(seconds: float) -> str:
    """Returns a time as a reader says it, for example "2 min 31 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def amount(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
