"""Measures how fast the loop trains beside what a user could take instead: `python -m benchmarks.train_throughput`

It compares our loop with the reference's way (HF Trainer, rows padded to 51, all logits) and with TRL's SFTTrainer.
Each of them is one process and has the same model, rows, precision, LoRA and rows a step. The command needs the extra
`bench` (pip install -e '.[bench]').
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.launching import CONFIGS, launch_command
from benchmarks.train_worker import as_reference, rows_at_once
from benchmarks.turns import Measured, spread, take_turns, write_results
from benchmarks.workload import RECIPE, load_rows, write_compute_bound, write_tiny
from data.batch import windows
from data.errors import UserError
from eval.peak import matmul_peak, usable_cores
from eval.reporting.markdown import markdown_table
from loop.guard.process import exit_codes
from loop.measure.flops import Batch, count_computed, matrix_products
from loop.plan import model_without_weights
from loop.recipe import parse_recipe

MICRO = 16
STEPS = {"compute_bound": 1, "tiny": 16}  # in a turn, so that it takes some seconds
TITLES = {
    "compute_bound": "80 M parameters (hidden 768, 8 layers), rows of 20 shared tokens, 10 of prompt and 19 of answer",
    "tiny": "The embedded model's shape, the reference's rows",
}
ABOUT = """One process, bf16, random weights, 16 rows a step, the reference's LoRA. *trainer* is the reference's way: HF
Trainer, every row padded to 51 tokens, all logits, padding in the loss; *trl* is TRL's SFTTrainer, padded to
the longest row, and packed. *ours* is `accelerate launch` with `accel_configs/one_process.yaml`. Activations
are *checkpointed* or *kept*; *auto* is the recipe's default. Every contender has a process of its own and
they take turns; median and range of the turns, ratios within each. GFLOP/s are of what is computed, padding
and recomputation included, against a bf16 matrix product measured in the same call."""
AGAINST = ("trainer checkpointed", "trainer kept", "trl checkpointed", "trl kept")


@dataclass(frozen=True)
class Contender:
    """Describes one of the trainings that take turns: a kind of benchmarks/train_worker.py, and its options."""

    kind: str
    checkpointing: str
    more: tuple[str, ...] = ()
    config: str = "one_process"  # names a file of accel_configs/; only ours reads it
    processes: int = 1

    @property
    def name(self) -> str:
        kept = {"none": "kept", "non_reentrant": "checkpointed", "auto": "auto"}[self.checkpointing]
        return " ".join((self.kind, *(word for word in self.more if not word.startswith("--")), kept))

    def command(self, folder: Path, steps: int) -> list[str]:
        """Returns the command that trains the model in `folder`, with `steps` steps in a turn."""
        launch = [sys.executable, "-m"]
        if self.kind == "ours":
            launch = launch_command(CONFIGS / f"{self.config}.yaml")
            launch += ["--num_processes", str(self.processes), "--module"]
        return [*launch, "benchmarks.train_worker", self.kind, str(folder), str(steps), self.checkpointing, *self.more]


def contenders() -> list[Contender]:
    layouts = ("padded", "packed", "shared_prefix")
    found = []
    for checkpointing in ("non_reentrant", "none"):
        found += [Contender(kind, checkpointing) for kind in ("trainer", "trl")]
        found += [Contender("ours", checkpointing, ("--batching", layout)) for layout in layouts]
    return [*found, Contender("trl_packing", "none"), Contender("ours", "auto")]


def computed(one: Contender, folder: Path) -> Batch:
    """Counts what `one` computes in a step, padding included."""
    examples, rows = load_rows(folder), rows_at_once(one.more)
    if one.kind == "trainer":
        tokens = len(as_reference(examples)[0]["input_ids"])
        return Batch(rows, rows * tokens, rows * tokens, rows * tokens**2)
    if one.kind != "ours":
        longest = max(example.length for example in examples[:rows])
        return Batch(rows, rows * longest, rows * longest, rows * longest**2)
    layout: Any = one.more[one.more.index("--batching") + 1] if "--batching" in one.more else "shared_prefix"
    window = next(windows(examples, range(rows), rows, 1, 1, 0, layout, 0))
    return count_computed(window.micro_batches[0])


def table(found: dict[str, Measured], chosen: Sequence[Contender], folder: Path, steps: int, peak: float) -> list[Any]:
    """Works out the figures of each contender in `chosen`; `peak` is what a matrix product reaches, in FLOP/s."""
    recipe = parse_recipe(["--model.name_or_path", str(folder)])[1]
    products = matrix_products(model_without_weights(recipe, "bf16"))
    rows = []
    for one in chosen:
        measured, batch = found[one.name], computed(one, folder)
        speeds = [MICRO * steps / seconds for seconds in measured.seconds]
        flops = products.computed_flops(batch, recomputes=one.checkpointing == "non_reentrant")
        rows.append(
            {
                "contender": one.name,
                "samples_per_second": speeds,
                "tokens_per_row": batch.tokens / MICRO,
                "flops_per_second": flops * steps / measured.median,
                "share_of_peak": flops * steps / measured.median / peak,
                "loss": measured.notes["loss"],
            }
        )
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Turns the `rows` of `table` into Markdown.

    A ratio compares two contenders in the same round; the table shows its median and range over the rounds.
    """
    speeds = {row["contender"]: row["samples_per_second"] for row in rows}
    head = ["", "samples/s", *(f"× {other}" for other in AGAINST), "tokens a row", "GFLOP/s", "of peak", "loss"]
    body = []
    for row in rows:
        own = row["samples_per_second"]
        ratios = [
            spread([a / b for a, b in zip(own, speeds[other], strict=True)]) if other in speeds else "–"
            for other in AGAINST
        ]
        cells = [row["contender"], spread(own), *ratios, f"{row['tokens_per_row']:.1f}"]
        cells += [f"{row['flops_per_second'] / 1e9:.0f}", f"{row['share_of_peak']:.0%}", f"{row['loss']:.3f}"]
        body.append(cells)
    return markdown_table(head, body)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, for each contender")
    parser.add_argument("--model", choices=("compute_bound", "tiny", "both"), default="both")
    parser.add_argument("--only", nargs="+", help="names of the contenders to measure")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("trl") is None:
        raise UserError("trl is not installed. Run: pip install -e '.[bench]'")
    results: dict[str, Any] = {"recipe": asdict(RECIPE)}
    text = [ABOUT]
    for name, write in (("compute_bound", write_compute_bound), ("tiny", write_tiny)):
        if args.model not in (name, "both"):
            continue
        chosen = [one for one in contenders() if not args.only or one.name in args.only]
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory) / "model"
            write(folder)
            commands = {one.name: one.command(folder, STEPS[name]) for one in chosen}
            peak = next(iter(matmul_peak().values()))
            found = take_turns(commands, args.rounds, usable_cores())
            results[name] = {"peak_flops": peak, "rows": table(found, chosen, folder, STEPS[name], peak["bf16"])}
        products = " and ".join(f"{flops / 1e9:.0f} GFLOP/s in {dtype}" for dtype, flops in peak.items())
        heading = f"### {TITLES[name]}\n\nA matrix product reaches {products}."
        text.append(f"{heading}\n\n{as_markdown(results[name]['rows'])}")
        print(text[-1], flush=True)
    if not args.only:
        write_results("train_throughput", "Training beside others", results, "\n\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
