"""Exports a finished run as an ordinary model: `python -m loop.export RUN --to FOLDER`.

The folder gets the base model's weights with the adapter merged into them, tokenizer, chat template, stop tokens, a
model card and a Modelfile for Ollama. Before it is there under its name, it is opened with plain transformers, and its
logits and greedy answers are compared with those of the base model with the adapter. With --adapter the folder gets the
adapter alone, for PEFT and vLLM.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data.errors import UserError
from loop.exporting.card import write_card
from loop.exporting.files import stop_tokens, write_beside_weights
from loop.exporting.merge import Update, bytes_needed, find_updates, merge
from loop.exporting.modelfile import modelfile
from loop.exporting.proof import check_adapter_opens, failure, prove
from loop.exporting.source import Source, Stored, main_dtype, name_of, open_source, stored_tensors
from loop.guard.process import RunError, end_process, exit_codes
from loop.recipe import find_model
from loop.saving.publish import existing, publish

DTYPES = {
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
    **{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16},
}
CONFIG = "adapter_config.json"
SCRATCH = ".proof"  # a folder inside the one that is written, gone before that one gets its name
IF_FULL = ("Nothing was left behind", "export once more")
NOT_PROVED = "Not proved: the export was made with --no-proof, so nobody has compared it with base + adapter."


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line. Raises UserError where they do not fit together."""
    parser = argparse.ArgumentParser(prog="python -m loop.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished training")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to write, new or empty")
    parser.add_argument("--adapter", action="store_true", help="export the adapter alone, for PEFT and vLLM")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: that of the base checkpoint")
    parser.add_argument("--prove", type=int, default=20, metavar="N", help="compare on so many rows (20)")
    parser.add_argument("--no-proof", action="store_true", help="compare nothing; the model card then says so")
    parser.add_argument("--model.name_or_path", dest="model", help="where the base model lies now, if it was moved")
    args = parser.parse_args(argv)
    if args.prove < 1:
        raise UserError(f"--prove is {args.prove}, but has to be at least 1. To compare nothing, give --no-proof.")
    if args.adapter and args.dtype != "auto":
        raise UserError("--dtype goes with merged weights, and --adapter exports none. Leave one of them out.")
    to: Path = args.to
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to}: is not an empty folder. Name another one or remove it.")
    if not to.absolute().parent.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.absolute().parent.parent}. Make it first.")
    return args


def export_merged(source: Source, args: argparse.Namespace) -> None:
    """Writes the merged model and publishes it once it is proved. Raises UserError and RunError."""
    stored = stored_tensors(source)
    dtype = main_dtype(stored) if args.dtype == "auto" else DTYPES[args.dtype]
    updates = find_updates(source, stored)
    needed, free = bytes_needed(stored, updates, dtype), shutil.disk_usage(existing(args.to)).free
    if needed > free:
        raise RunError(f"{args.to}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free. Free space.")
    print(f"merging {len(updates)} adapters into {name_of(dtype)} weights, {needed / 1e6:,.1f} MB …", flush=True)
    publish_readable(args.to, lambda beside: write_merged(source, stored, updates, dtype, args, beside))


def write_merged(
    source: Source,
    stored: dict[str, Stored],
    updates: list[Update],
    dtype: torch.dtype,
    args: argparse.Namespace,
    beside: Path,
) -> None:
    """Writes all files of a merged model into `beside`, and proves it. Raises RunError where the proof fails."""
    rounding = merge(source, stored, updates, dtype, beside)
    write_beside_weights(source, dtype, any(update.unties for update in updates), beside)
    text, problem = modelfile(source.template, stop_tokens(source))
    (beside / "Modelfile").write_text(text, encoding="utf-8")
    found = [
        f"The adapter is merged into {len(rounding.weights)} weights, in {name_of(dtype)}. Rounding keeps "
        f"{rounding.share:.1%} of its change to the weights (at worst {rounding.worst[0]:.1%}, in {rounding.worst[1]}) "
        f"and adds an error of {rounding.error:.1%} of that change."
    ]
    if args.no_proof:
        found.append(NOT_PROVED)
    else:
        print("asking base + adapter and the exported model …", flush=True)
        num_weights = sum(one.numel for one in stored.values())
        proof = prove(source, beside, num_weights, dtype, args.prove, beside / SCRATCH)
        shutil.rmtree(beside / SCRATCH)
        if not proof.holds:
            raise failure(proof, rounding)
        found += proof.told()
    found += [f"Modelfile: {problem}."] if problem else []
    write_card(
        source, "The base model with the trained adapter merged into its weights.", found, "transformers", beside
    )
    print("\n".join(found), flush=True)


def export_adapter(source: Source, args: argparse.Namespace) -> None:
    """Writes the adapter alone and publishes it once PEFT has opened it. Raises UserError and RunError."""

    def write(beside: Path) -> None:
        for file in source.adapter.iterdir():
            if file.is_file():
                shutil.copyfile(file, beside / file.name)
        config = json.loads((beside / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = find_model(source.recipe.model.name_or_path)  # it may have moved
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        found = [NOT_PROVED]
        if not args.no_proof:
            num_weights = sum(parameter.numel() for parameter in source.model.parameters())
            found = [check_adapter_opens(source, beside, num_weights, args.prove, beside / SCRATCH)]
            shutil.rmtree(beside / SCRATCH)
        about = "The trained adapter alone, in PEFT's format. It needs the base model."
        write_card(source, about, found, "peft", beside)
        print("\n".join(found), flush=True)

    publish_readable(args.to, write)


def publish_readable(to: Path, write: Callable[[Path], None]) -> None:
    """Publishes a folder whose files have the permissions of any new file: safetensors makes files that nobody else
    may read, and a server often runs as another user. Raises the errors of publish."""

    def write_readable(beside: Path) -> None:
        write(beside)
        os.umask(umask := os.umask(0))
        for file in beside.iterdir():
            file.chmod(0o666 & ~umask)

    publish(to, write_readable, *IF_FULL)


@exit_codes()
def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    source = open_source(args.run, args.model)
    (export_adapter if args.adapter else export_merged)(source, args)
    print(f"done: {args.to}")


if __name__ == "__main__":
    end_process(main)
