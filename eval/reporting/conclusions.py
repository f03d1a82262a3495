"""Draws conclusions from the figures: findings in sentences, and a verdict on each conclusion of the reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.reference import STAGE0, STAGE1, STAGE2, STAGE3
from eval.reporting.run_summary import BUSY, Run

NOT_MEASURED = "not measured here"
CONFIRMED, CONTRADICTED, NOT_TESTABLE = "confirmed", "contradicted", "not testable on this machine"
ENOUGH_STEPS = 8  # number of steady steps; with fewer, their spread is not known
SAME = 0.02  # single measurements vary by this share of their value


@dataclass(frozen=True)
class Quantity:
    """Holds a number with its name; `value` is None when the number was not measured."""

    label: str
    value: float | None
    uncertainty: float = 0.0  # the true value lies within value - uncertainty and value + uncertainty

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.label}: {NOT_MEASURED}"
        spread = f" ± {self.uncertainty:.3f}" if self.uncertainty else ""
        return f"{self.label}: {self.value:.3f}{spread}"


@dataclass(frozen=True)
class Claim:
    """Holds a conclusion of the reference, and the rule by which our figures confirm or contradict it."""

    text: str
    published: str  # the numbers that the reference gives for it
    what: str  # says what the quantities are
    low: float
    high: float
    quantities: Callable[[Sequence[Run]], list[Quantity]]
    needs_gpu: str = ""  # the reason why this claim can only be tested with a GPU; empty when it can be tested without

    def rule(self) -> str:
        ends = f"at least {self.low:g}" if self.high == math.inf else f"{self.low:.4g} to {self.high:.4g}"
        return f"{self.what}: {ends}"


@dataclass(frozen=True)
class JudgedClaim:
    """Holds the verdict on a claim, and our quantities from which it follows."""

    ours: list[Quantity]
    verdict: str
    reason: str = ""  # the reason why the claim is not testable

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


def ratio(figure: str, run: Run, to: Run) -> Quantity:
    """Returns a figure of `run` divided by the same figure of `to`, with its uncertainty.

    The uncertainty of a step time comes from the spread of the steps; that of another figure is SAME.
    """
    label = " / ".join(each.name.removeprefix("reference-") for each in (run, to))
    value, base, spread = run.figure(figure), to.figure(figure), SAME
    if value is None or not base:
        return Quantity(label, None)
    if figure == "step_seconds":
        if min(run.figure("steady_steps") or 0, to.figure("steady_steps") or 0) < ENOUGH_STEPS:
            return Quantity(f"{label}, fewer than {ENOUGH_STEPS} steady steps", None)
        spread = (run.figure("step_uncertainty") or 0.0) + (to.figure("step_uncertainty") or 0.0)
    return Quantity(label, value / base, value / base * spread)


def ratios(figure: str, *pairs: tuple[str, str]) -> Callable[[Sequence[Run]], list[Quantity]]:
    """Returns a function that computes, from runs, the ratio of a figure for each pair of configurations."""

    def of(runs: Sequence[Run]) -> list[Quantity]:
        named = {run.name: run for run in runs}
        absent = sorted({name for pair in pairs for name in pair if name not in named})
        if absent:
            return [Quantity(", ".join(absent), None)]
        return [ratio(figure, named[name], named[to]) for name, to in pairs]

    return of


def gains(runs: Sequence[Run]) -> list[Quantity]:
    """Returns the gain in accuracy of each run.

    One configuration has asked the base model, and its score counts for all of them.
    """
    bases = [base for run in runs if (base := run.figure("base_accuracy")) is not None]
    tuned = [(run.name, value) for run in runs if (value := run.figure("tuned_accuracy")) is not None]
    if not bases or not tuned:
        return [Quantity("accuracy before and after", None)]
    return [Quantity(name, value - bases[0]) for name, value in tuned]


RULES = (
    "A conclusion is confirmed when all of our figures lie in its rule's range with the whole of their uncertainty, "
    "contradicted when one lies outside with the whole of it, and otherwise not testable. The uncertainty of a ratio "
    "of medians is both medians' notch, 1.57 times the distance of the quartiles by the root of the number of steps "
    f"(McGill, Tukey, Larsen 1978), and half the distance between both rounds; of what is measured once it is "
    f"{100 * SAME:.0f} %. Time is compared by the steady "
    "step: the wall time of a short run shows how long launching and loading take."
)
STEP_TIMES = "ratio of the median steady step times"
ONLY_HOST = "without a GPU the CPU does the training itself, and all memory is host memory"
NO_GPU = "it has no GPU"
# fmt: off
CLAIMS = (
    Claim("Stages 0, 1 and 2 + offload tie in time", "1 min 54 s, 1 min 52 s, 1 min 54 s: within about 2 %",
          STEP_TIMES, 0.97, 1.03,
          ratios("step_seconds", (STAGE1, STAGE0), (STAGE2, STAGE0), (STAGE2, STAGE1))),
    Claim("Stage 3 + offload takes about 6.3 times as long as stage 1", "12 min to 1 min 52 s",
          STEP_TIMES, 6.3 / 1.25, 6.3 * 1.25,
          ratios("step_seconds", (STAGE3, STAGE1))),
    Claim("The mean CPU utilisation rises with stage and offload", "7.6, 8.5, 9, 11.5 %",
          "ratio of each to the one before", 1.0, math.inf,
          ratios("cpu_percent", (STAGE1, STAGE0), (STAGE2, STAGE1), (STAGE3, STAGE2)), ONLY_HOST),
    Claim("Stage 3 + offload needs least GPU memory", "a chart",
          "ratio of the fullest GPU's memory", 0.0, 1.0,
          ratios("gpu_memory_bytes", (STAGE3, STAGE0), (STAGE3, STAGE1), (STAGE3, STAGE2)), NO_GPU),
    Claim("With offload the GPUs' utilisation has gaps", "a chart",
          f"ratio of the share of samples with a utilisation of at least {BUSY:.0f} %, while the GPUs work", 0.0, 0.95,
          ratios("gpu_busy_percent", (STAGE2, STAGE0), (STAGE2, STAGE1), (STAGE3, STAGE0), (STAGE3, STAGE1)), NO_GPU),
    Claim("Host memory is much higher with offload", "a chart",
          "ratio of the resident memory of all processes", 1.25, math.inf,
          ratios("tree_rss_bytes", (STAGE2, STAGE1), (STAGE3, STAGE1)), ONLY_HOST),
    Claim("Fine-tuning lifts the accuracy from 0 to 1", "0.0 to 1.0, of 20 prompts",
          "accuracy after less accuracy before, where one answer in 20 may be wrong", 0.95, 1.0, gains),
)
# fmt: on


def judge(claim: Claim, runs: Sequence[Run]) -> JudgedClaim:
    """Judges a claim by RULES."""
    ours = claim.quantities(runs)
    if claim.needs_gpu and not any(run.usage.get("device_type") == "cuda" for run in runs):
        return JudgedClaim(ours, NOT_TESTABLE, claim.needs_gpu)
    known = [(each.value - each.uncertainty, each.value + each.uncertainty) for each in ours if each.value is not None]
    if any(high < claim.low or low > claim.high for low, high in known):
        return JudgedClaim(ours, CONTRADICTED)
    if len(known) < len(ours):
        return JudgedClaim(ours, NOT_TESTABLE, "a figure is missing")
    if all(claim.low <= low and high <= claim.high for low, high in known):
        return JudgedClaim(ours, CONFIRMED)
    return JudgedClaim(ours, NOT_TESTABLE, "the uncertainty is too large")


def conclusions(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Returns the conclusions of the reference, each with our numbers and the verdict."""
    judged = [(claim, judge(claim, runs)) for claim in CLAIMS]
    return [
        {
            "the reference's conclusion": claim.text,
            "verdict": str(made),
            "published": claim.published,
            "ours": "; ".join(map(str, made.ours)),
            "rule": claim.rule(),
        }
        for claim, made in judged
    ]


def memory_kinds(runs: Sequence[Run]) -> dict[str, str]:
    """Returns, for each figure of memory, what a sentence calls it."""
    kinds = sorted({run.memory_of for run in runs if run.usage}) or ["memory"]
    return {
        "peak_bytes": f"{' or '.join(kinds)}, peak of a rank",
        "tree_rss_bytes": "resident host memory of all processes",
        "gpu_memory_bytes": "memory of the fullest GPU",
    }


def sentences(runs: Sequence[Run]) -> list[str]:
    """Says which configuration is fastest, which needs least memory of each kind, what offload costs, what failed."""
    return [
        fastest(runs),
        *timed_once(runs),
        *(least(runs, figure, called) for figure, called in memory_kinds(runs).items()),
        *offload_costs(runs),
        *(
            f"{run.name}: {run.result['status']}: {run.result.get('reason')}."
            for run in runs
            if run.result.get("status", "finished") != "finished"
        ),
    ]


def fastest(runs: Sequence[Run]) -> str:
    """Says which run has the shortest steps, and which others may be as fast."""
    timed = sorted((seconds, run.name, run) for run in runs if (seconds := run.figure("step_seconds")))
    if not timed:
        return f"Fastest: {NOT_MEASURED}."
    (least_seconds, name, first), *others = timed
    told = [(run.name, ratio("step_seconds", run, first)) for _, _, run in others]
    same = [name for name, times in told if times.value is None or times.value - times.uncertainty <= 1]
    text = f"Fastest: {name}, {least_seconds:.4g} s a step (median)"
    text += f", not clearly faster than {', '.join(same)}" if same else ""
    return text + (f"; slowest: {others[-1][1]}, {others[-1][0] / least_seconds:.2f} times that." if others else ".")


def timed_once(runs: Sequence[Run]) -> list[str]:
    """Names the runs of which only one round was timed, where runs are compared."""
    once = [run.name for run in runs if run.figure("step_seconds") and "step_rounds" not in run.figures]
    if len(runs) < 2 or not once:
        return []
    return [f"Timed once: {', '.join(once)}; a difference between them may be the machine's own, from run to run."]


def least(runs: Sequence[Run], figure: str, called: str) -> str:
    """Says which run needs least of a kind of memory that is `called` so."""
    needed = {run.name: value for run in runs if (value := run.figure(figure)) is not None}
    if not needed:
        return f"Least {called}: {NOT_MEASURED}."
    name = min(needed, key=lambda each: needed[each])
    same = [each for each in needed if each != name and needed[each] <= needed[name] * (1 + SAME)]
    text = f"Least {called}: {name}, {needed[name] / 1e6:,.1f} MB"
    return text + (f" (within {100 * SAME:.0f} % of it: {', '.join(same)})." if same else ".")


def offload_costs(runs: Sequence[Run]) -> list[str]:
    """Compares each configuration that offloads with the first one of the same stage that does not."""
    without = {run.stage: run for run in reversed(runs) if not run.offloaded}
    texts = []
    for run in runs:
        if not run.offloaded:
            continue
        text = f"Offload of {' and '.join(run.offloaded)} ({run.name})"
        if (base := without.get(run.stage)) is None:
            texts.append(f"{text}: nothing of stage {run.stage} without offload to compare with.")
            continue
        times = ratio("step_seconds", run, base)
        cost = f"{times.value:.2f} ± {times.uncertainty:.2f} times" if times.value else NOT_MEASURED
        memory = [f"{called} {difference(run, base, figure)}" for figure, called in memory_kinds(runs).items()]
        texts.append(f"{text} costs, against {base.name}: step time {cost}; {'; '.join(memory)}.")
    return texts


def difference(run: Run, base: Run, figure: str) -> str:
    """Says how many MB more than `base` the run needs."""
    value, other = run.figure(figure), base.figure(figure)
    return NOT_MEASURED if value is None or other is None else f"{(value - other) / 1e6:+,.1f} MB"
