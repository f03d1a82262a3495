"""Proves that an exported model is the base model with its adapter: both are asked in fresh processes and compared."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loop.exporting.cases import TOKENS, choose_cases
from loop.exporting.files import stop_tokens
from loop.exporting.merge import Rounding
from loop.exporting.source import Source, name_of
from loop.guard.process import RunError
from loop.measure.memory import free_host_memory

LOGITS = "logits.safetensors"
STRANGER = Path(__file__).with_name("stranger.py")
NEW_TOKENS = 64
# The difference of the logits may be so large, relative to what the adapter changes in them: rounding to eight bits
# that are independent of each other leaves far less, and a lost adapter leaves 1.
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.25}
TIE = 2.0  # tolerated differences of a logit, within which two logits may change their order
NOISE = 1e-5  # of computing in fp32 itself, relative to the logits


@dataclass(frozen=True)
class Proof:
    """What was compared, and what came out. Norms are over all compared logits."""

    rows: str  # which they are, in words
    num_rows: int
    dtype: torch.dtype  # of the exported weights
    computed_in: torch.dtype
    difference: float  # norm of exported - (base + adapter), relative to the norm of base + adapter
    effect: float  # norm of (base + adapter) - base, relative to the same
    scale: float  # the root mean square of the logits of base + adapter
    num_answers: int
    equal: int  # greedy answers that are equal token by token
    ties: int  # answers that part where the two best logits are closer than twice the tolerated difference
    num_prompts: int
    same_prompts: int  # prompts that the exported chat template alone writes as the run did

    @property
    def lost(self) -> float:
        """The difference relative to what the adapter changes: 0 for none, about 1 where the adapter is lost.

        Relative to the logits where the adapter changes nothing.
        """
        return self.difference / self.effect if self.effect else self.difference

    @property
    def tolerated(self) -> float:
        """How large `lost` may be."""
        return tolerated(self.dtype, self.computed_in, self.effect)

    @property
    def holds(self) -> bool:
        """Whether the exported model is the base model with its adapter, within the tolerance of its precision."""
        answers_hold = self.equal + self.ties == self.num_answers and self.ties <= self.equal
        return self.lost <= self.tolerated and answers_hold

    def told(self) -> list[str]:
        """What was compared, in sentences."""
        typical = self.difference * self.scale
        said = [
            f"The logits of {self.num_rows} {self.rows} differ from those of base + adapter by {self.lost:.2%} of "
            f"what the adapter changes in them ({self.tolerated:.0%} is tolerated in {name_of(self.dtype)}; the root "
            f"mean square of a logit's difference is {typical:.2g}; computed in {name_of(self.computed_in)}).",
            f"{self.equal} of {self.num_answers} greedy answers are equal token by token.",
        ]
        if self.ties:
            said.append(f"{self.ties} part at a token whose two best logits are closer than twice what is tolerated.")
        if self.num_prompts:
            said.append(
                f"The chat template alone writes {self.same_prompts} of {self.num_prompts} prompts as the run did."
            )
        if self.same_prompts < self.num_prompts:
            said.append("The others need variables of the template, or the date of the run.")
        return said


def prove(source: Source, folder: Path, num_weights: int, dtype: torch.dtype, count: int, scratch: Path) -> Proof:
    """Asks base + adapter and the exported `folder` up to `count` rows of the run, and compares what they say.

    Raises RunError where one of them cannot be opened or asked.
    """
    cases, rows = choose_cases(source, count)
    device, computed_in = _where(num_weights, dtype)
    conversations = [case.messages for case in cases if case.messages is not None]
    asked = {
        "device": device,
        "dtype": name_of(computed_in),
        "trust_remote_code": source.recipe.model.trust_remote_code,
        "rows": [(case.ids, case.places) for case in cases],
        "prompts": [case.prompt for case in cases if case.prompt],
        "max_new_tokens": NEW_TOKENS,
        "pad": stop_tokens(source)[0],
    }
    reference = {"model": str(source.base), "adapter": str(source.adapter), "stops": stop_tokens(source)}
    ours = _ask("base + adapter", scratch / "reference", asked | reference | {"conversations": []})
    exported = {"model": str(folder), "adapter": None, "stops": None, "conversations": conversations}
    theirs = _ask("the exported model", scratch / "exported", asked | exported)
    difference, effect, scale = _norms(scratch / "reference", scratch / "exported", len(cases))
    close = TIE * tolerated(dtype, computed_in, effect) * (effect or 1.0) * scale
    equal, ties = compare_answers(ours["answers"], theirs["answers"], close)
    expected = [case.prompt for case in cases if case.messages is not None]
    return Proof(
        rows=rows,
        num_rows=len(cases),
        dtype=dtype,
        computed_in=computed_in,
        difference=difference,
        effect=effect,
        scale=scale,
        num_answers=len(ours["answers"]),
        equal=equal,
        ties=ties,
        num_prompts=len(expected),
        same_prompts=sum(a == b[:TOKENS] for a, b in zip(expected, theirs["prompts"], strict=True)),
    )


def check_adapter_opens(source: Source, folder: Path, num_weights: int, count: int, scratch: Path) -> str:
    """Opens an exported adapter on the base model as PEFT does, and says by how much it changes the logits.

    Raises RunError where it cannot be opened, or opens as something else than what stands in its file.
    """
    cases, rows = choose_cases(source, count)
    device, computed_in = _where(num_weights, torch.bfloat16)
    asked = {
        **{"model": str(source.base), "adapter": str(folder), "stops": None, "max_new_tokens": 1, "pad": 0},
        **{"device": device, "dtype": name_of(computed_in), "trust_remote_code": source.recipe.model.trust_remote_code},
        **{"rows": [(case.ids, case.places) for case in cases], "prompts": [], "conversations": []},
    }
    _ask("the exported adapter", scratch / "reference", asked)
    effect = _norms(scratch / "reference", None, len(cases))[1]
    return f"PEFT opens it on the base model, where it changes the logits of {len(cases)} {rows} by {effect:.2%}."


def _where(num_weights: int, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """The device to ask on and the dtype to compute in: fp32, which shows what rounding the weights has changed and
    nothing else, where that fits into memory, and otherwise the dtype of the exported weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_host_memory()
    return device, torch.float32 if 1.2 * torch.float32.itemsize * num_weights < free else dtype


def _ask(who: str, out: Path, request: dict[str, Any]) -> Any:
    """Asks a model in a fresh process; its logits are then in the folder `out`. Returns its answers."""
    out.mkdir(parents=True)
    file = out / "request.json"
    file.write_text(json.dumps({**request, "out": str(out)}), encoding="utf-8")
    command = [sys.executable, "-P", str(STRANGER), str(file)]  # -P: the files beside it are no modules for it
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed, perhaps for lack of memory"]
        raise RunError(f"{who} could not be asked: {said[-1]} (exit code {done.returncode}). Nothing was written.")
    return json.loads((out / "answers.json").read_text())


def _norms(reference: Path, exported: Path | None, count: int) -> tuple[float, float, float]:
    """The difference, the effect and the scale of the logits, as Proof has them; without `exported` the difference
    is 0."""
    difference = effect = size = 0.0
    num_logits = 0
    with safe_open(reference / LOGITS, "pt") as ours, safe_open((exported or reference) / LOGITS, "pt") as theirs:
        for i in range(count):
            tuned, base, other = (
                one.get_tensor(f"{name}.{i}").double()
                for one, name in ((ours, "tuned"), (ours, "base"), (theirs, "tuned"))
            )
            size += float(tuned.square().sum())
            effect += float((tuned - base).square().sum())
            difference += float((other - tuned).square().sum())
            num_logits += tuned.numel()
    return math.sqrt(difference / size), math.sqrt(effect / size), math.sqrt(size / num_logits)


def tolerated(dtype: torch.dtype, computed_in: torch.dtype, effect: float) -> float:
    """How large the difference of the logits may be relative to `effect`, which is what the adapter changes in them
    relative to their size; relative to that size where the adapter changes nothing."""
    noise = NOISE if computed_in == torch.float32 else 0.0
    return TOLERANCE[dtype] + noise / effect if effect else noise


def compare_answers(ours: Sequence[Any], theirs: Sequence[Any], close: float) -> tuple[int, int]:
    """How many answers are equal, and how many part at a tie: where our two best logits are `close` or closer."""
    equal = ties = 0
    for one, other in zip(ours, theirs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one["ids"], other["ids"], strict=False)) if a != b), None)
        equal += one["ids"] == other["ids"]
        ties += at is not None and one["gaps"][at] <= close
    return equal, ties


def failure(proof: Proof, rounding: Rounding) -> RunError:
    """Says with figures why an export is refused, and what to do instead."""
    name = name_of(proof.dtype)
    kept = f"rounding to {name} keeps {rounding.share:.1%} of the adapter's change to the weights"
    instead = "Keep the adapter beside the weights with --adapter"
    if proof.dtype != torch.float32:
        instead = "Export with --dtype float32, or keep the adapter beside the weights with --adapter"
    return RunError(
        f"the exported model is not the base model with its adapter ({kept}, in {rounding.worst[1]} "
        f"{rounding.worst[0]:.1%}). {' '.join(proof.told())} Nothing was written. {instead}."
    )
