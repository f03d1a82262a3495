"""The private parts of accelerate that this project calls, and the reason."""

import contextlib
import io
from pathlib import Path

WRITTEN_AGAINST = "1.15.0"


def ask_launcher(config_file: Path, processes: int | None) -> tuple[dict[str, str] | None, int, str]:
    """What `accelerate launch` would do with `config_file`: the environment that it would give to its processes where
    they use DeepSpeed (None without it), the number of processes, and the precision (bf16, fp16, fp8 or no).

    `processes` overrides the number in the file. These are the launcher's own functions, so the plan cannot read a file
    differently than the launcher does; accelerate has no public function that does this without launching.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    words = ["--config_file", str(config_file), *(["--num_processes", str(processes)] if processes else []), "train.py"]
    with contextlib.redirect_stdout(io.StringIO()):
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        args.main_process_port, args.deepspeed_fields_from_accelerate_config = 0, ""
        environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else None
    many = args.use_deepspeed or args.multi_gpu  # otherwise the launcher starts one process, whatever number it is told
    return environment, int(args.num_processes) if many else 1, str(args.mixed_precision)
