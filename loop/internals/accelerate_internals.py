"""The private parts of accelerate that this project calls, and the reason."""

import argparse
import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

WRITTEN_AGAINST = "1.15.0"
# Keys of a file that _validate_launch_command does not copy as they are, or whose value makes no difference.
TAKEN_APART = ("compute_environment", "distributed_type", "mixed_precision", "same_network")


@dataclass(frozen=True)
class Asked:
    """What `accelerate launch` was asked to do, by its options and by its file."""

    options: Mapping[str, Any]  # the launcher's arguments, as it has completed them from the file
    compute_environment: str
    distributed_type: str  # NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP …
    given: frozenset[str]  # the names that an option or the file gives a value that asks for something
    unread: Mapping[str, Any]  # keys of the file with a value that the launcher does not take from it

    @property
    def num_processes(self) -> int:
        """On all machines. The launcher starts one where no kind of distribution is asked for."""
        return 1 if self.distributed_type == "NO" else int(self.options["num_processes"])


def resolve_launch(words: Sequence[str]) -> Asked:
    """Reads the words behind `accelerate launch`, and the file that they name.

    These are the launcher's own functions, so nothing here can read a file differently than the launcher does;
    accelerate has no public function that does this without launching.
    """
    return _resolve(words)[1]


def ask_launcher(config_file: Path, processes: int | None) -> tuple[dict[str, str] | None, Asked]:
    """What `accelerate launch` would do with `config_file`: the environment that it would give to its processes where
    they use DeepSpeed (None without it), and what it is asked for. `processes` overrides the number in the file."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    words = ["--config_file", str(config_file), "train.py"]
    args, asked = _resolve(words)
    if processes and asked.distributed_type != "NO":  # which starts one process whatever number it is told
        args, asked = _resolve(["--num_processes", str(processes), *words])
    args.main_process_port, args.deepspeed_fields_from_accelerate_config = 0, ""
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else None, asked


def _resolve(words: Sequence[str]) -> tuple[argparse.Namespace, Asked]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    disabled = logging.root.manager.disable
    logging.disable()  # the launcher itself has said which defaults it took
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            # The launcher has asked this too. Asking it in a rank would give every rank a context on the first GPU.
            patch("accelerate.commands.launch.is_bf16_available", lambda *_: True),
        ):
            args, file, _ = _validate_launch_command(launch_command_parser().parse_args(list(words)))
    finally:
        logging.disable(disabled)
    return args, _asked(args, file)


def _asked(args: argparse.Namespace, file: Any) -> Asked:
    options, said = vars(args), dict(vars(file)) if file is not None else {}
    given = {name for name in args.nondefault if not _off(options.get(name))}
    unread = {}
    for name, value in said.items():
        if isinstance(value, dict):
            keys = {key if key.startswith(_prefix(name)) else f"{_prefix(name)}{key}" for key in value}
            given |= {key for key in keys if not _off(value.get(key, value.get(key.removeprefix(_prefix(name)))))}
        elif name not in TAKEN_APART and not _off(value):
            given.add(name)
            if name not in args.nondefault and options.get(name) != value:
                unread[name] = value
    kind = str(getattr(said.get("distributed_type"), "value", "NO"))
    flags = {"use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "use_megatron_lm": "MEGATRON_LM", "tpu": "XLA"}
    by_flag = next((name for flag, name in flags.items() if options.get(flag)), None)
    if by_flag is None and options.get("multi_gpu") and kind in ("NO", "MULTI_CPU", *flags.values()):
        by_flag = "MULTI_GPU"
    where = str(getattr(said.get("compute_environment"), "value", "LOCAL_MACHINE"))
    return Asked(options, where, by_flag or kind, frozenset(given), unread)


def _prefix(block: str) -> str:
    """What the launcher puts before the keys of this block of a file."""
    return {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}.get(block, "")


def _off(value: Any) -> bool:
    return not value or str(value).lower() in ("no", "none", "false")
