"""Writes the plan as text and as JSON, with its advice."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import yaml

from data.errors import UserError
from loop.batch_arithmetic import cut_up
from loop.planning.dry_run import Findings, key_rates
from loop.planning.estimate import COMFORT, Estimate, Hardware, Subject, estimate, recommend
from loop.planning.launch_file import Launch
from loop.recipe import Recipe, recipe_as_dict

PARTS = {"compute": "computing", "interconnect": "the interconnect", "host_bus": "the host bus"}
MOST_GPUS = 64  # the largest number of GPUs that is tried when nothing fits


def memory_table(estimates: Sequence[Estimate], unit: float, given: Hardware, chosen: Estimate | None) -> str:
    """A table of memory with one line for each configuration and number of GPUs."""
    head = ["configuration", "GPUs", "weights", "adapters", "gradients", "optimizer", "buffers", "activations"]
    head += ["(checkpointed)", "(kept)", "logits", "gathered", "GPU peak", "host load", "host", "fits"]
    lines = []
    for one in estimates:
        held = one.device
        sizes = [held.base, held.adapters, held.gradients, held.optimizer, held.buffers, one.activations]
        sizes += [one.activations_recomputing, one.activations_keeping, one.logits, one.gathered, one.device_peak]
        sizes += [one.host_load, one.host_steady]
        mark = " <- take this" if one is chosen else ""
        lines.append([*_name(one), *(f"{value / unit:,.2f}" for value in sizes), one.fit(given) + mark])
    return _aligned([head, *lines])


def step_table(estimates: Sequence[Estimate], unit: float) -> str:
    """A table of traffic and time with one line for each configuration and number of GPUs."""
    head = ["configuration", "GPUs", "interconnect", "host bus", "TFLOP", "steps", "step >= s", "run >= s", "bound by"]
    lines = []
    for one in estimates:
        moved = [f"{value / unit:,.2f}" for value in (one.traffic.interconnect, one.traffic.host_bus)]
        cells = [*_name(one), *moved, f"{one.flops / 1e12:.3g}", str(one.steps)]
        if (step := one.step_seconds) is not None:
            cells += [f"{step:.3g}", f"{step * one.steps:.3g}", bound_by(one)]
        else:
            cells += ["?", "?", "say --card"]
        lines.append(cells)
    return _aligned([head, *lines])


def _name(one: Estimate) -> list[str]:
    """The first two cells of a line: the configuration and its number of GPUs."""
    return [one.launch.name, str(one.launch.processes)]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines of text whose columns stand below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def bound_by(one: Estimate) -> str:
    """The part that takes the longest time in a step."""
    seconds = one.seconds or {}
    return PARTS[max(seconds, key=lambda part: seconds[part])]


def advice(subject: Subject, estimates: Sequence[Estimate], given: Hardware, chosen: Estimate | None) -> str:
    """Says which configuration to take and why, or which one number to change so that something fits."""
    if not (given.gpu_memory or given.host_memory):
        return "What fits was not asked: give --gpu-memory and --host-memory, or --card."
    if chosen is None:
        return f"Nothing fits. {change(subject, estimates, given)}"
    n = chosen.launch.processes
    has = f" of {given.gpu_memory / 1e9:.1f}" if given.gpu_memory else ""
    why = [f"Take {chosen.launch.name} on {n} GPU{'s' if n > 1 else ''}: {chosen.device_peak / 1e9:.1f}{has} GB a GPU"]
    why += [f"{max(chosen.host_load, chosen.host_steady) / 1e9:.1f} GB of host memory at most"]
    if chosen.step_seconds:
        seconds = chosen.step_seconds * chosen.steps
        why += [f"at least {seconds:.3g} s for {chosen.steps} steps, bound by {bound_by(chosen)}"]
    elif not chosen.traffic.host_bus:
        why += ["and no weights over the host bus"]
    text = ", ".join(why) + "."
    others = [one for one in estimates if one.launch.processes == n and one is not chosen]
    tight = [one for one in others if one.fit(given) == "tight"]
    if tight and chosen.fit(given) == "yes":
        names = ", ".join(f"{one.launch.name} {one.device_peak / 1e9:.1f} GB" for one in tight)
        text += f" These fit with less than {1 - COMFORT:.0%} to spare, and a longer row would end them: {names}."
    if chosen.fit(given) == "tight":
        text += f" It leaves less than {1 - COMFORT:.0%}: a longer row would end it."
    return text


def change(subject: Subject, estimates: Sequence[Estimate], given: Hardware) -> str:
    """The one value whose change makes something fit. Tried in this order: checkpointing, micro-batch, GPUs, memory."""
    launches = [one.launch for one in estimates]
    recipe = subject.recipe
    if recipe.gradient_checkpointing == "none":  # auto would have switched it on
        saving = Subject(replace(recipe, gradient_checkpointing="non_reentrant"), subject.model, subject.work)
        best = recommend([estimate(saving, launch, given) for launch in launches], given)
        if best:
            return f"Set gradient_checkpointing to non_reentrant (it is none): then {best.launch.name} fits."
    micro = 1 if recipe.micro_batch_size == "auto" else recipe.micro_batch_size
    while (micro := micro // 2) >= 1:
        smaller = Subject(replace(recipe, micro_batch_size=micro), subject.model, subject.work)
        for one in _possible(smaller, [(launch, launch.processes) for launch in launches], given):
            return f"Set micro_batch_size to {micro} (it is {recipe.micro_batch_size}): then {one.launch.name} fits."
    by_file = {launch.file: launch for launch in launches}.values()
    n = max(launch.processes for launch in launches)
    while (n := 2 * n) <= MOST_GPUS:
        more, option = subject, ""
        if recipe.rows_per_step is not None and recipe.micro_batch_size != "auto":
            shared = cut_up(recipe.rows_per_step, n, recipe.micro_batch_size)
            if shared is None:
                continue
            if shared[0] != recipe.micro_batch_size:
                more = Subject(replace(recipe, micro_batch_size=shared[0]), subject.model, subject.work)
                option = f" --micro_batch_size {shared[0]}"
        for one in _possible(more, [(launch, n) for launch in by_file], given):
            return (
                f"Give it --gpus {n}{option}: then {one.launch.name} fits, with {one.device_peak / 1e9:.1f} GB a GPU."
            )
    least = min(estimates, key=lambda one: one.device_peak)
    return (
        f"The least is {least.launch.name} with {least.device_peak / 1e9:.1f} GB a GPU and "
        f"{max(least.host_load, least.host_steady) / 1e9:.1f} GB of host memory: give it that much."
    )


def _possible(subject: Subject, launches: Sequence[tuple[Launch, int]], given: Hardware) -> Iterator[Estimate]:
    """The estimates that fit, of these launches with these numbers of processes. Launches whose processes cannot share
    the rows of a step are left out."""
    for launch, processes in launches:
        with contextlib.suppress(UserError):
            one = estimate(subject, launch.with_processes(processes, subject.recipe), given)
            if one.fit(given) in ("yes", "tight"):
                yield one


def page(
    recipe: Recipe,
    subject: Subject,
    batching: str,
    estimates: Sequence[Estimate],
    given: Hardware,
    found: Findings,
    rows_shown: str,
) -> str:
    """The whole plan as text."""
    chosen = recommend(estimates, given)
    shown = chosen or (estimates[0] if estimates else None)
    parts = ["== recipe", yaml.safe_dump(recipe_as_dict(recipe), allow_unicode=True, sort_keys=False).strip()]
    trainable, everything = sum(subject.adapters), sum(subject.base) + sum(subject.adapters)
    work = subject.work
    parts += [
        "\n== model and data",
        f"{trainable:,} of {everything:,} parameters train ({100 * trainable / everything:.2f} %); "
        f"{len(work.examples):,} rows, the longest {work.longest} tokens, up to {work.most_labels} labels",
        f"batching {batching}",
    ]
    if estimates:
        most = "" if recipe.max_steps is None else f", but {recipe.max_steps:,} steps at most"
        parts += [f"{recipe.epochs} epochs of {estimates[0].tokens:,} tokens{most}"]
    if shown:
        where = f"{shown.launch.name} on {shown.launch.processes}"
        parts += ["\n== learning rate", f"at the {shown.steps} steps of {where}:"]
        parts += [f"  step {step:>6}  {rate:.3g}" for step, rate in key_rates(recipe, shown.steps)]
        parts += [f"\n== DeepSpeed's configuration, {where}"]
        parts += [json.dumps(shown.launch.deepspeed, indent=2) if shown.launch.deepspeed else "none: plain PyTorch"]
    if rows_shown:
        parts += ["\n== rows as the model reads them", rows_shown]
    if estimates:
        unit, name = (1e9, "GB of 10^9") if sum(subject.base) > 1e9 else (1e6, "MB of 10^6")
        parts += [f"\n== memory, {name} bytes: of one GPU, and of the host for all ranks"]
        parts += [memory_table(estimates, unit, given, chosen)]
        parts += [f"\n== a step, {name} bytes a rank; TFLOP of all ranks; seconds at least"]
        parts += [step_table(estimates, unit), "\n== advice", advice(subject, estimates, given, chosen)]
    parts += ["\n== contradictions", *(f"- {problem}" for problem in found.problems or ["none"])]
    parts += ["\n== notes", *(f"- {note}" for note in found.notes)] if found.notes else []
    return "\n".join(parts)


def as_json(
    recipe: Recipe,
    subject: Subject,
    batching: str,
    estimates: Sequence[Estimate],
    given: Hardware,
    found: Findings,
) -> dict[str, Any]:
    """The whole plan as one JSON object."""
    chosen = recommend(estimates, given)
    entries = []
    for one in estimates:
        entry = asdict(one) | {"name": one.launch.name, "processes": one.launch.processes, "fits": one.fit(given)}
        entries.append(entry | {"step_seconds": one.step_seconds})
    return {
        "recipe": recipe_as_dict(recipe),
        "base_parameters": sum(subject.base),
        "trainable_parameters": sum(subject.adapters),
        "batching": batching,
        "hardware": asdict(given),
        "estimates": entries,
        "recommended": {"name": chosen.launch.name, "processes": chosen.launch.processes} if chosen else None,
        "advice": advice(subject, estimates, given, chosen) if estimates else None,
        "learning_rates": key_rates(recipe, (chosen or estimates[0]).steps) if estimates else [],
        "contradictions": found.problems,
        "notes": found.notes,
    }
