"""Says what a run will need, without weights, without a GPU and without starting anything.

python -m loop.plan --config RECIPE [--accel YAML …] [--gpus 2 --gpu-memory 32GB --host-memory 180GB] [--card NAME]
"""

import argparse
import json
import math
import re
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from data.errors import UserError
from data.examples import Example
from data.layout import Layout
from data.rows import count_rows
from loop.batch_arithmetic import BatchArithmetic, settle_accumulation
from loop.engine.environment import set_up_environment
from loop.guard.process import exit_codes
from loop.model.attention import IN_LINE
from loop.model.build import WEIGHT_DTYPES, Data, add_adapters, set_layout
from loop.model.operators import use_fused_operators
from loop.planning.batching import choose_layout
from loop.planning.dry_run import Findings, contradictions, open_tokenizer, read_data, shown_rows
from loop.planning.estimate import Hardware, Subject, Work, estimate
from loop.planning.gpus import CARDS
from loop.planning.launch_file import Launch, read_launch
from loop.planning.page import as_json, page
from loop.recipe import DEFAULT_RECIPE, ROOT, Recipe, data_files, find_data, find_model, parse_recipe

UNITS = {"": 1, "mb": 2**20, "mib": 2**20, "gb": 2**30, "gib": 2**30, "tb": 2**40, "tib": 2**40}


def memory(text: str) -> float:
    """The bytes of a memory, with the units in which memory is sold: 32GB are 32 x 2^30 bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in UNITS or not (value := float(found[1]) * UNITS[found[2]]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size. Give one as 32GB")
    return value


def rate(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} has to be above 0")
    return value


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into the plan's own options and those of the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m loop.plan", description=__doc__, epilog="Every other option is the recipe's: --optim.lr 3e-5."
    )
    parser.add_argument("--config", default=str(DEFAULT_RECIPE), help="recipe (default loop/recipes/tiny.yaml)")
    parser.add_argument("--accel", nargs="+", help="accelerate YAMLs (default: all of accel_configs/, but NVMe)")
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of GPUs (default 1 2 4 8, or each YAML's own)")
    parser.add_argument("--card", choices=sorted(CARDS), help="a known GPU: its memory and speeds")
    parser.add_argument("--gpu-memory", type=memory, help="memory of one GPU, as 32GB (of 2^30 bytes)")
    parser.add_argument("--host-memory", type=memory, help="memory of the machine, as 180GB")
    parser.add_argument("--gpu-flops", type=rate, help="dense bf16 FLOP/s of one GPU, as 165e12")
    parser.add_argument("--interconnect", type=rate, help="bytes a second between GPUs, one way, as 32e9")
    parser.add_argument("--host-bus", type=rate, help="bytes a second between a GPU and the host, as 32e9")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args, rest = parser.parse_known_args(argv)
    if args.gpus and min(args.gpus) < 1:
        raise UserError(f"--gpus {min(args.gpus)}: has to be at least 1.")
    return args, rest


def hardware(args: argparse.Namespace) -> Hardware:
    """The hardware of the options; what they leave out comes from --card, and a GPU's memory from this machine."""
    card = CARDS.get(args.card)
    here = float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    return Hardware(
        gpu_memory=args.gpu_memory or (card.memory if card else here),
        host_memory=args.host_memory,
        flops=args.gpu_flops or (card.flops if card else None),
        interconnect=args.interconnect or (card.interconnect if card else None),
        host_bus=args.host_bus or (card.host_bus if card else None),
    )


def model_without_weights(recipe: Recipe, precision: str) -> Any:
    """Builds the adapted model on the meta device from the config.json of a folder, of an earlier download, or of
    loop/shapes/. Raises UserError where there is none of the three.
    """
    name = find_model(recipe.model.name_or_path)
    ours = ROOT / "loop" / "shapes" / Path(name).name
    try:
        config = AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds for a file that is missing or damaged
        if Path(name).is_dir() or not ours.is_dir():
            raise UserError(
                f"model.name_or_path {name}: no config.json on this machine that can be read: {str(error)[:200]}\n"
                f"Give a checkpoint's folder, or download it: hf download {name} --include '*.json'"
            ) from error
        config = AutoConfig.from_pretrained(ours)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=WEIGHT_DTYPES[precision],
                attn_implementation="sdpa",
                trust_remote_code=recipe.model.trust_remote_code,
            )
            return add_adapters(model, recipe).to(WEIGHT_DTYPES[precision])  # PEFT makes fp32 adapters on this device
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.name_or_path {name}: its config.json makes no model: {error}") from error


def launches(args: argparse.Namespace, recipe: Recipe, model: Any, found: Findings) -> list[Launch]:
    """Reads every configuration for every number of GPUs. One that contradicts the recipe becomes a problem."""
    ours = ROOT / "accel_configs"
    names = [*sorted(ours.glob("*.yaml")), *sorted((ours / "reference").glob("*.yaml"))]
    files = args.accel or [str(path) for path in names if path.stem != "two_machines"]  # which needs what zero3 needs
    numbers = args.gpus or ([None] if args.accel else usual_numbers(recipe, found))
    result: list[Launch] = []
    for file in files:
        for gpus in numbers:
            launch = found.attempt(partial(read_launch, file, recipe, model, gpus))
            if launch is None:
                break
            if launch not in result:
                result.append(launch)
    return result


def usual_numbers(recipe: Recipe, found: Findings) -> list[int]:
    """The usual numbers of GPUs, without those that cannot share the rows of a step; notes say which and why."""
    possible = []
    for gpus in (1, 2, 4, 8):
        try:
            settle_accumulation(recipe, gpus)
            possible.append(gpus)
        except UserError as error:
            found.notes.append(f"{gpus} GPUs are left out: {error}")
    return possible


def measure_work(recipe: Recipe, base: Any, found: Findings) -> tuple[Work | None, str, str, Data | None]:
    """Returns the rows to plan for, the layout and the reason for it, the first rows as text, and the data.

    The rows are None after a problem. Without a tokenizer every row is assumed to have max_length tokens, of which all
    but the first are learned.
    """
    tokenizer = open_tokenizer(recipe, found)
    data = read_data(recipe, tokenizer, found)
    if data is not None and tokenizer is not None:
        chosen = found.attempt(lambda: choose_layout(recipe, data.train, base, 1, data.validation))
        layout: Layout
        layout, why = chosen or ("padded", "")
        return Work(data.train, layout, real=True), why, shown_rows(data), data
    files = data_files(recipe.data.train_file).items() if tokenizer is None else ()
    rows = found.attempt(lambda: sum(times * count_rows(find_data(file), recipe.data.columns) for file, times in files))
    if not rows:
        return None, "", "", None
    return Work(_as_long_as_allowed(recipe, rows), "padded", real=False), "padded, without a tokenizer", "", None


def _as_long_as_allowed(recipe: Recipe, rows: int) -> list[Example]:
    """So many rows of max_length tokens."""
    answer = [0] * (recipe.data.max_length - 1)  # all rows share this list
    return [Example.of(number, [0], answer) for number in range(1, rows + 1)]


@exit_codes()
def main(argv: Sequence[str]) -> None:
    """Prints the plan. Raises UserError where contradictions would keep the training from starting."""
    args, rest = parse(argv)
    given = hardware(args)
    _, recipe = parse_recipe(["--config", args.config, *rest])
    set_up_environment()
    transformers.utils.logging.set_verbosity_error()
    found = Findings()
    model = model_without_weights(recipe, "bf16")
    base = model.get_base_model()
    work, batching, rows_shown, data = measure_work(recipe, base, found)
    if work:
        set_layout(base, work.layout, IN_LINE)
        use_fused_operators(base)
    subject = Subject(recipe, model, work or Work(_as_long_as_allowed(recipe, 1), "padded", real=False))
    planned = launches(args, recipe, model, found)
    estimates = [estimate(subject, launch, given) for launch in planned] if work else []
    if work:
        num_rows, processes = len(work.examples), planned[0].processes if planned else 1
        batch = found.attempt(lambda: BatchArithmetic.of(recipe, processes, num_rows))
        if batch:
            found.attempt(batch.check_schedule)
            contradictions(recipe, data, model, batch.total_steps, num_rows, found)
    found.problems[:] = dict.fromkeys(found.problems)
    if args.json:
        print(json.dumps(as_json(recipe, subject, batching, estimates, given, found), indent=2, ensure_ascii=False))
    else:
        print(page(recipe, subject, batching, estimates, given, found, rows_shown))
    if found.problems:
        raise UserError(f"{len(found.problems)} contradictions would keep this training from starting (above).")


if __name__ == "__main__":
    main(sys.argv[1:])
