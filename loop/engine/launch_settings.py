"""What each setting of a launch does here: what `accelerate config` can write, the options of `accelerate launch`, the
environment variables that accelerate reads, and the launchers. Each is obeyed, or named and refused.

docs/launching.md shows these lists; tests/test_launch_settings.py walks them, and fails when accelerate has a setting
that no list names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from data.errors import UserError
from loop.internals.accelerate_internals import Asked

DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")
OFF = ("", "0", "false", "no", "none")  # values of an environment variable that ask for nothing


def _never(_: object) -> None:
    """What is asked for is done."""


@dataclass(frozen=True)
class Named:
    """Settings of one kind; `*` in a name stands for any text."""

    names: tuple[str, ...]
    here: str  # what they do, for the table in the docs

    def covers(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.names)


@dataclass(frozen=True)
class Setting(Named):
    """A key of an accelerate file and the options of the same meaning."""

    refused: Callable[[Asked], str | None] = _never  # what is asked for and not done, with the fix


@dataclass(frozen=True)
class Variable(Named):
    """Environment variables."""

    refused: Callable[[Mapping[str, str]], str | None] = _never  # the same


def _given(*patterns: str, fix: str) -> Callable[[Asked], str | None]:
    """Refuses these settings wherever they are given a value."""

    def refused(asked: Asked) -> str | None:
        given = sorted(name for name in asked.given if any(fnmatchcase(name, pattern) for pattern in patterns))
        return f"{', '.join(given)}: {fix}" if given else None

    return refused


def _distributed_type(asked: Asked) -> str | None:
    if asked.distributed_type not in DISTRIBUTED_TYPES:
        return (
            f"distributed_type: {asked.distributed_type} is not supported. Use DEEPSPEED, whose ZeRO-3 shares out "
            f"weights, gradients and optimizer, or {', '.join(DISTRIBUTED_TYPES[:-1])}."
        )
    if asked.options["cpu"] and asked.distributed_type in ("DEEPSPEED", "MULTI_GPU"):
        return "--cpu makes the launcher start one process without the file's distributed_type. Leave it out."
    return None


def _use_cpu(asked: Asked) -> str | None:
    wanted = asked.options["cpu"] or asked.options["use_cpu"]
    if wanted and torch.cuda.is_available() and asked.distributed_type != "MULTI_CPU":
        return "use_cpu: true, but there is a GPU. Hide it with CUDA_VISIBLE_DEVICES= in front of the command."
    return None


def _num_processes(asked: Asked) -> str | None:
    processes, machines = asked.options["num_processes"], asked.options["num_machines"]
    if asked.distributed_type == "NO" and (processes > 1 or machines > 1):
        return (
            f"num_processes: {processes} on {machines} machines, but distributed_type: NO starts one process. "
            "Use DEEPSPEED, MULTI_GPU or MULTI_CPU."
        )
    if processes % machines:
        return f"num_processes: {processes} is no multiple of num_machines: {machines}, so some would not be started."
    return None


def _several_machines(asked: Asked) -> str | None:
    launcher = asked.options["deepspeed_multinode_launcher"] or "pdsh"
    if asked.distributed_type == "DEEPSPEED" and asked.options["num_machines"] > 1 and launcher != "standard":
        return (
            f"num_machines: {asked.options['num_machines']} with DeepSpeed's launcher {launcher}, which starts every "
            "machine alone where it finds no hostfile, and writes the whole environment to .deepspeed_env. Give "
            "deepspeed_multinode_launcher: standard, as accel_configs/two_machines.yaml does, and start it on each "
            "machine."
        )
    return None


def _deepspeed_block(asked: Asked) -> str | None:
    block = sorted(asked.given & DEEPSPEED_BLOCK)
    if block and asked.distributed_type != "DEEPSPEED":
        return f"{', '.join(block)}: read only with distributed_type: DEEPSPEED, but it is {asked.distributed_type}."
    return None


def _dynamo(asked: Asked) -> str | None:
    backend = str(asked.options["dynamo_backend"])
    if asked.distributed_type == "DEEPSPEED" and backend.lower() not in OFF:
        return f"dynamo_backend: {backend}: accelerate does not compile under DeepSpeed. Remove dynamo_config."
    return None


def _fp8(asked: Asked) -> str | None:
    if asked.options["mixed_precision"] == "fp8":
        return "mixed_precision: fp8 is not supported. Use bf16."
    return _given("fp8_*", fix="8-bit floating point is not supported. Remove it.")(asked)


def _main_function(asked: Asked) -> str | None:
    if (name := asked.options["main_training_function"]) not in (None, "main"):
        return f"main_training_function: {name}: the launcher reads it on TPUs only. Remove it."
    return None


def _compute_environment(asked: Asked) -> str | None:
    if asked.compute_environment != "LOCAL_MACHINE":
        return f"compute_environment: {asked.compute_environment} is not supported. Use LOCAL_MACHINE."
    return None


def _unread(asked: Asked) -> str | None:
    if asked.unread:
        name, value = next(iter(asked.unread.items()))
        option = f"--{name}" if value is True else f"--{name} {value}"
        return f"{name}: {value}: accelerate does not read it from the file. Give the option {option}."
    return None


DEEPSPEED_BLOCK = frozenset(
    {
        *("zero_stage", "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path"),
        *("offload_param_nvme_path", "gradient_accumulation_steps", "gradient_clipping", "zero3_init_flag"),
        *("zero3_save_16bit_model", "deepspeed_config_file", "deepspeed_hostfile", "deepspeed_exclusion_filter"),
        *("deepspeed_inclusion_filter", "deepspeed_multinode_launcher", "deepspeed_moe_layer_cls_names"),
    }
)

SETTINGS = (
    Setting(("compute_environment", "aws_*"), "LOCAL_MACHINE; anything else is refused", _compute_environment),
    Setting(
        ("distributed_type", "use_deepspeed", "multi_gpu"),
        "DEEPSPEED; MULTI_GPU: DDP; MULTI_CPU: DDP over gloo, with as many processes as num_processes says, which the "
        "loop itself starts, because accelerate starts one; NO: one process. All others are refused",
        _distributed_type,
    ),
    Setting(
        ("use_cpu", "cpu"),
        "obeyed where there is no GPU and with MULTI_CPU; refused where a GPU would be used all the same. --cpu with "
        "another file than NO or MULTI_CPU is refused",
        _use_cpu,
    ),
    Setting(("mixed_precision",), "bf16, no, and fp16 on a GPU; fp8 is refused"),
    Setting(("fp8_*",), "refused", _fp8),
    Setting(
        ("num_processes", "num_machines"),
        "obeyed; num_processes counts those of all machines. Refused where it is no multiple of num_machines, and "
        "where distributed_type: NO would start one process only",
        _num_processes,
    ),
    Setting(("machine_rank", "main_process_ip", "main_process_port"), "obeyed"),
    Setting(("same_network",), "makes no difference: both values reach main_process_ip at main_process_port"),
    Setting(("gpu_ids",), "obeyed"),
    Setting(("debug",), "obeyed: accelerate checks its collectives"),
    Setting(
        ("main_training_function",),
        "main, which nothing reads on GPUs and CPUs; another one is refused",
        _main_function,
    ),
    Setting(
        ("dynamo_config", "dynamo_*"),
        "obeyed without DeepSpeed; refused with it, because accelerate does not pass it on",
        _dynamo,
    ),
    Setting(
        ("deepspeed_config", "zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_init_flag"),
        "obeyed; the whole block is refused where distributed_type is not DEEPSPEED",
        _deepspeed_block,
    ),
    Setting(
        ("offload_optimizer_nvme_path", "offload_param_nvme_path"),
        "refused: accelerate does not pass them on. Say them in a deepspeed_config_file",
        _given("offload_*_nvme_path", fix="accelerate does not pass it on. Say it in a deepspeed_config_file."),
    ),
    Setting(
        ("gradient_accumulation_steps", "gradient_clipping"), "the recipe owns them; another number than its is refused"
    ),
    Setting(("zero3_save_16bit_model",), "makes no difference: a run saves the adapter and never the base model"),
    Setting(("deepspeed_config_file",), "obeyed; a block optimizer or scheduler in it is refused"),
    Setting(("deepspeed_moe_layer_cls_names",), "obeyed at stage 3: accelerate gathers such a layer at once"),
    Setting(
        ("deepspeed_multinode_launcher",),
        "standard; the others are refused on several machines and make no difference on one",
        _several_machines,
    ),
    Setting(
        ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter"),
        "refused: only DeepSpeed's own launchers read them",
        _given("deepspeed_hostfile", "deepspeed_*clusion_filter", fix="only DeepSpeed's own launchers read it."),
    ),
    Setting(
        ("fsdp_config", "fsdp_*", "use_fsdp"),
        "refused; ZeRO-3 shares out the same things",
        _given("fsdp_*", "use_fsdp", fix="FSDP is not supported. Use distributed_type: DEEPSPEED and zero_stage: 3."),
    ),
    Setting(
        ("megatron_lm_config", "megatron_lm_*", "use_megatron_lm"),
        "refused",
        _given("megatron_lm_*", "use_megatron_lm", fix="Megatron-LM is not supported. Remove it."),
    ),
    Setting(
        ("parallelism_config", "parallelism_config_*", "use_parallelism_config"),
        "refused",
        _given("parallelism_config*", "use_parallelism_config", fix="only data parallelism is supported. Remove it."),
    ),
    Setting(
        ("mpirun_config", "mpirun_*"),
        "refused; MULTI_CPU starts its processes without it",
        _given("mpirun_*", fix="mpirun is not supported. Remove it; MULTI_CPU starts its processes without it."),
    ),
    Setting(
        ("downcast_bf16", "tpu", "tpu_*", "commands", "command_file", "vm", "env"),
        "refused",
        _given("downcast_bf16", "tpu", "tpu_*", "commands", "command_file", "vm", "env", fix="TPUs are not supported."),
    ),
    Setting(
        ("rdzv_backend", "rdzv_conf", "enable_cpu_affinity"),
        "obeyed as options. In a file accelerate does not read them, so any value but the default is refused there",
        _unread,
    ),
    Setting(
        ("num_cpu_threads_per_process", "max_restarts", "monitor_interval", "role", "tee", "log_dir", "quiet"),
        "obeyed by the launcher",
    ),
    Setting(
        ("config_file", "module", "no_python", "training_script", "training_script_args"), "obeyed by the launcher"
    ),
)


def check_settings(asked: Asked) -> None:
    """Raises UserError for the first setting that is asked for and would not be done."""
    for setting in SETTINGS:
        if told := setting.refused(asked):
            raise UserError(f"the launch says {told}")


def _on(*names: str, fix: str) -> Callable[[Mapping[str, str]], str | None]:
    """Refuses these variables with a value other than "off"."""

    def refused(environment: Mapping[str, str]) -> str | None:
        given = [name for name in names if environment.get(name, "").lower() not in OFF]
        return f"{given[0]}={environment[given[0]]}: {fix}" if given else None

    return refused


def _owned_by_the_recipe(environment: Mapping[str, str]) -> str | None:
    """Under DeepSpeed deepspeed_config() compares them with the recipe."""
    names = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")
    given = [name for name in names if name in environment]
    if (
        given
        and environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true"
        and "ACCELERATE_MIXED_PRECISION" in environment
    ):
        return f"{given[0]}: it is read under DeepSpeed only, and the recipe owns the number. Unset it."
    return None


def _one_of_many(environment: Mapping[str, str]) -> str | None:
    """Refuses to be one of several tasks that started a Python each, instead of a launcher on each machine."""
    machines = environment.get("GROUP_WORLD_SIZE", "1")
    for name in TASKS:
        tasks = environment.get(name, "1")
        if tasks.isdigit() and tasks not in ("1", machines):
            return (
                f"{name}={tasks}: this is one of {tasks} tasks, but the launch has {machines} machines, so each would "
                f"train alone. Start `accelerate launch --num_machines {tasks} --machine_rank …` in each task."
            )
    return None


def _unconnected(environment: Mapping[str, str]) -> str | None:
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and "RANK" not in environment:
        return (
            "MASTER_ADDR without RANK: accelerate was told several processes and has started one. Use a file in "
            "accel_configs/."
        )
    return None


def _deepspeeds_launcher(environment: Mapping[str, str]) -> str | None:
    if "CROSS_SIZE" in environment and "TORCHELASTIC_RUN_ID" not in environment:
        return (
            "CROSS_SIZE: DeepSpeed's own launcher has started this process, and it starts every machine alone where it "
            "finds no hostfile. Give deepspeed_multinode_launcher: standard in the accelerate file, as "
            "accel_configs/two_machines.yaml does. accelerate has written the whole environment, passwords included, "
            "to .deepspeed_env; delete that file."
        )
    return None


def _compiled(environment: Mapping[str, str]) -> str | None:
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return None
    return _on("ACCELERATE_DYNAMO_BACKEND", fix="nothing compiles under DeepSpeed here. Unset it.")(environment)


TASKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # mpirun's and srun's
NVME = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH")
TPU = ("ACCELERATE_IN_TPU_POD", "ACCELERATE_DOWNCAST_BF16")
# The first entry that names a variable is the one that counts for it.
VARIABLES = (
    Variable(
        ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"), "obeyed, as in the file"
    ),
    Variable(NVME, "refused: say it in a deepspeed_config_file", _on(*NVME, fix="say it in a deepspeed_config_file.")),
    Variable(("ACCELERATE_DEEPSPEED_*", "ACCELERATE_CONFIG_DS_FIELDS"), "obeyed, as in the file"),
    Variable(
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"),
        "the recipe owns them; another number than its is refused, and without DeepSpeed any number",
        _owned_by_the_recipe,
    ),
    Variable(("ACCELERATE_DYNAMO_*",), "obeyed without DeepSpeed, refused with it", _compiled),
    Variable(("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL"), "obeyed by accelerate"),
    Variable(
        ("ACCELERATE_TORCH_DEVICE",),
        "refused",
        _on("ACCELERATE_TORCH_DEVICE", fix="choose GPUs with CUDA_VISIBLE_DEVICES or gpu_ids."),
    ),
    Variable(
        ("ACCELERATE_USE_FSDP", "FSDP_*"),
        "refused; FSDP_* alone are read by nobody",
        _on("ACCELERATE_USE_FSDP", fix="FSDP is not supported. Use distributed_type: DEEPSPEED and zero_stage: 3."),
    ),
    Variable(
        ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM_*"),
        "refused; MEGATRON_LM_* alone are read by nobody",
        _on("ACCELERATE_USE_MEGATRON_LM", fix="Megatron-LM is not supported. Use distributed_type: DEEPSPEED."),
    ),
    Variable(
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_*", "ACCELERATE_ALLOW_CP_STANDALONE"),
        "refused; the others alone are read by nobody",
        _on("ACCELERATE_USE_PARALLELISM_CONFIG", fix="only data parallelism is supported. Remove parallelism_config."),
    ),
    Variable(("ACCELERATE_FP8_*",), "read with mixed_precision: fp8 only, which is refused"),
    Variable(
        ("ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_*"),
        "refused",
        _on("ACCELERATE_USE_SAGEMAKER", fix="Amazon SageMaker is not supported. Use LOCAL_MACHINE."),
    ),
    Variable(TPU, "refused", _on(*TPU, fix="TPUs are not supported.")),
    Variable(
        (
            *("ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_INIT_INCLUDE_BUFFERS", "ACCELERATE_ENABLE_RICH"),
            *("ACCELERATE_DEBUG_RDV_FILE", "ACCELERATE_NUM_PROCESSES"),
        ),
        "make no difference: read by parts of accelerate that no training here uses",
    ),
    Variable(
        TASKS,
        "the number of tasks that mpirun or srun has started: 1 or the number of machines, otherwise refused",
        _one_of_many,
    ),
    Variable(("CROSS_SIZE", "CROSS_RANK"), "set by DeepSpeed's own launchers: refused", _deepspeeds_launcher),
    Variable(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_*", "MASTER_ADDR", "MASTER_PORT"),
        "set by the launcher. Refused where no ACCELERATE_* variable says how to train (torchrun alone), and where "
        "fewer processes find each other than the launcher was told",
        _unconnected,
    ),
)

LAUNCHERS = {
    "`accelerate launch`": "obeyed, on one machine and on several (DEEPSPEED: deepspeed_multinode_launcher: standard)",
    "`accelerate launch` with pdsh, openmpi, mvapich, mpich, nossh or slurm": "refused on several machines",
    "`deepspeed`, `torchrun`, `mpirun`": "refused",
    "`srun`": "obeyed where each task is one `accelerate launch` of as many machines as there are tasks; otherwise "
    "refused",
    "`python loop/train.py`": "one process with ZeRO-3, for the debugger",
}


def check_variables(environment: Mapping[str, str]) -> None:
    """Raises UserError for the first variable that asks for what would not be done."""
    for variable in VARIABLES:
        if told := variable.refused(environment):
            raise UserError(f"the environment says {told}")


def tables() -> str:
    """The three lists as tables, for docs/launching.md."""

    def table(head: str, rows: Mapping[str, str]) -> list[str]:
        return [f"| {head} | here |", "|---|---|", *(f"| {name} | {here} |" for name, here in rows.items()), ""]

    def quoted(names: tuple[str, ...]) -> str:
        return " ".join(f"`{name}`" for name in names)

    lines = table("launcher", LAUNCHERS)
    lines += table("key of an accelerate file, or option", {quoted(one.names): one.here for one in SETTINGS})
    lines += table("environment variable", {quoted(one.names): one.here for one in VARIABLES})
    return "\n".join(lines)
