"""Everything that accelerate's launcher can be asked for is in a list, and what would not be done is refused."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.constants import DEEPSPEED_MULTINODE_LAUNCHERS

from data.errors import UserError
from loop.engine import launcher
from loop.engine.launch_settings import SETTINGS, VARIABLES, check_settings, check_variables, tables
from loop.internals.accelerate_internals import resolve_launch
from loop.recipe import ROOT

WRITTEN = ROOT / "tests" / "accel_configs"

ONE_PROCESS = yaml.safe_load((ROOT / "accel_configs" / "one_process.yaml").read_text())
ZERO3 = yaml.safe_load((ROOT / "accel_configs" / "zero3.yaml").read_text())
DDP = yaml.safe_load((WRITTEN / "ddp_gpus.yaml").read_text())
MANY_CPUS = ONE_PROCESS | {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}
MACHINES = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500}


def refusal(file: dict[str, Any], folder: Path, *options: str) -> str:
    """What is said against a launch; nothing where it is obeyed."""
    (folder / "accel.yaml").write_text(yaml.safe_dump(file))
    try:
        check_settings(resolve_launch(["--config_file", str(folder / "accel.yaml"), *options, "train.py"]))
    except UserError as error:
        return str(error)
    return ""


KEYS = {field.name for field in dataclasses.fields(ClusterConfig)}
OPTIONS = {action.dest for action in launch_command_parser()._actions} - {"help"}


@pytest.mark.parametrize("name", sorted(KEYS | OPTIONS))
def test_every_setting_is_in_the_list_once(name: str) -> None:
    assert sum(setting.covers(name) for setting in SETTINGS) == 1


def test_every_name_in_the_list_exists() -> None:
    """A pattern that fits nothing would be a setting that accelerate no longer has."""
    known = KEYS | OPTIONS | {"aws_access_key_id", "mpirun_ccl"}
    for setting in SETTINGS:
        for name in setting.names:
            assert any(dataclasses.replace(setting, names=(name,)).covers(one) for one in known), name


def variables_in_accelerate() -> set[str]:
    """Every environment variable of these families that accelerate's source names."""
    sources = Path(accelerate.__file__).parent.rglob("*.py")
    families = re.compile(r"\b(?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]*[A-Z0-9]\b")
    return {name for source in sources for name in families.findall(source.read_text())}


def test_every_variable_is_in_the_list() -> None:
    found = variables_in_accelerate()
    assert len(found) > 50
    assert not [name for name in found if not any(variable.covers(name) for variable in VARIABLES)]


@pytest.mark.parametrize("file", [ONE_PROCESS, ZERO3, DDP, MANY_CPUS], ids=lambda file: file["distributed_type"])
def test_what_is_supported_is_obeyed(file: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(file, tmp_path) == ""


@pytest.mark.parametrize("path", [*WRITTEN.glob("*.yaml"), *ROOT.glob("accel_configs/**/*.yaml")], ids=lambda p: p.stem)
def test_no_file_of_ours_is_refused(path: Path) -> None:
    options = ["--machine_rank", "0", "--main_process_ip", "10.0.0.1"] if path.stem == "two_machines" else []
    check_settings(resolve_launch(["--config_file", str(path), *options, "train.py"]))


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "FSDP": (DDP | {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, (), "FSDP is not supported"),
    "FSDP by option": (ONE_PROCESS, ("--use_fsdp",), "FSDP is not supported"),
    "a block of FSDP beside DDP": (DDP | {"fsdp_config": {"fsdp_offload_params": True}}, (), "fsdp_offload_params: "),
    "a short key of FSDP": (ZERO3 | {"fsdp_config": {"version": 2}}, (), "fsdp_version: FSDP is not"),
    "Megatron": (DDP | {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {}}, (), "MEGATRON_LM is not"),
    "a block of Megatron": (DDP | {"megatron_lm_config": {"megatron_lm_tp_degree": 2}}, (), "megatron_lm_tp_degree: "),
    "parallelism": (ZERO3 | {"parallelism_config": {"parallelism_config_sp_size": 2}}, (), "only data parallelism"),
    "TPU": (ONE_PROCESS | {"distributed_type": "XLA"}, (), "XLA is not supported"),
    "TPU by option": (ONE_PROCESS, ("--tpu",), "XLA is not supported"),
    "a name of a TPU": (ONE_PROCESS | {"tpu_name": "x"}, (), "tpu_name: TPUs are not"),
    "commands of a TPU": (ONE_PROCESS | {"commands": ["ls"]}, (), "commands: TPUs are not"),
    "downcast": (ZERO3 | {"downcast_bf16": "yes"}, (), "downcast_bf16: TPUs are not"),
    "NPUs": (DDP | {"distributed_type": "MULTI_NPU"}, (), "MULTI_NPU is not supported"),
    "XPUs": (DDP | {"distributed_type": "MULTI_XPU"}, (), "MULTI_XPU is not supported"),
    "fp8": (ZERO3 | {"mixed_precision": "fp8"}, (), "mixed_precision: fp8"),
    "fp8 by option": (ZERO3, ("--mixed_precision", "fp8"), "mixed_precision: fp8"),
    "a block of fp8": (ZERO3 | {"fp8_config": {"backend": "TE"}}, (), "fp8_backend: 8-bit"),
    "a compiler under DeepSpeed": (ZERO3 | {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, (), "does not compile"),
    "the same by option": (ZERO3, ("--dynamo_backend", "eager"), "dynamo_backend: eager: accelerate does not"),
    "a block of DeepSpeed beside DDP": (
        DDP | {"deepspeed_config": {"zero_stage": 3}},
        (),
        "zero_stage: read only with",
    ),
    "a stage by option without DeepSpeed": (ONE_PROCESS, ("--zero_stage", "3"), "zero_stage: read only with"),
    "offload to NVMe without a JSON": (
        ZERO3 | {"deepspeed_config": {"zero_stage": 3, "offload_param_nvme_path": "/nvme"}},
        (),
        "offload_param_nvme_path: ",
    ),
    "mpirun": (MANY_CPUS | {"mpirun_config": {"mpirun_hostfile": "hosts"}}, (), "mpirun_hostfile: mpirun is not"),
    "another function": (ZERO3 | {"main_training_function": "train"}, (), "main_training_function: train"),
    "a binding to cores in the file": (ZERO3 | {"enable_cpu_affinity": True}, (), "the option --enable_cpu_affinity."),
    "another rendezvous in the file": (ZERO3 | {"rdzv_backend": "c10d"}, (), "the option --rdzv_backend c10d."),
    "two processes without a kind": (ONE_PROCESS | {"num_processes": 2}, (), "distributed_type: NO starts one process"),
    "two machines without a kind": (ONE_PROCESS | MACHINES, (), "2 machines, but distributed_type: NO"),
    "three processes on two machines": (DDP | MACHINES | {"num_processes": 3}, (), "is no multiple of num_machines: 2"),
    "the CPU by option": (ZERO3, ("--cpu",), "--cpu makes the launcher start one process"),
    "a hostfile": (ZERO3, ("--deepspeed_hostfile", "hosts"), "deepspeed_hostfile: only DeepSpeed's own"),
    "a filter": (ZERO3, ("--deepspeed_inclusion_filter", "a:0"), "deepspeed_inclusion_filter: only DeepSpeed's own"),
    **{
        f"two machines with {name}": (
            ZERO3 | MACHINES,
            ("--deepspeed_multinode_launcher", name),
            f"DeepSpeed's launcher {name}, which starts every machine alone",
        )
        for name in DEEPSPEED_MULTINODE_LAUNCHERS
        if name != "standard"
    },
    "two machines with the launcher that is taken": (ZERO3 | MACHINES, (), "DeepSpeed's launcher pdsh"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_done_is_refused(case: str, tmp_path: Path) -> None:
    file, options, said = REFUSED[case]
    assert said in refusal(file, tmp_path, *options)


def test_every_refusal_is_tried(tmp_path: Path) -> None:
    """Each setting that can be refused is refused in one of the cases above, or below."""
    never = SETTINGS[-1].refused
    can_be_refused = {setting.names for setting in SETTINGS if setting.refused is not never}
    tried = set()
    for file, options, _ in REFUSED.values():
        (tmp_path / "accel.yaml").write_text(yaml.safe_dump(file))
        asked = resolve_launch(["--config_file", str(tmp_path / "accel.yaml"), *options, "train.py"])
        tried |= {setting.names for setting in SETTINGS if setting.refused(asked)}
    assert {names[0] for names in can_be_refused - tried} == {"compute_environment", "use_cpu"}


def test_sagemaker_is_refused() -> None:
    asked = dataclasses.replace(
        resolve_launch(["--config_file", str(ROOT / "accel_configs" / "zero3.yaml"), "train.py"]),
        compute_environment="AMAZON_SAGEMAKER",
    )
    with pytest.raises(UserError, match="AMAZON_SAGEMAKER is not supported"):
        check_settings(asked)
    assert "compute_environment" in {field.name for field in dataclasses.fields(SageMakerConfig)}


def test_the_cpu_beside_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "Hide it with CUDA_VISIBLE_DEVICES=" in refusal(ONE_PROCESS | {"use_cpu": True}, tmp_path)
    assert refusal(MANY_CPUS, tmp_path) == "", "its processes see no GPU"


RANK = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "bf16"}
ENVIRONMENTS = {
    "FSDP": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP is not supported"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not"),
    "parallelism": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "only data parallelism"),
    "SageMaker": ({"ACCELERATE_USE_SAGEMAKER": "true"}, "SageMaker is not"),
    "a TPU pod": ({"ACCELERATE_IN_TPU_POD": "1"}, "TPUs are not"),
    "downcast": ({"ACCELERATE_DOWNCAST_BF16": "1"}, "TPUs are not"),
    "a device": ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "choose GPUs with"),
    "a compiler under DeepSpeed": (
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        "compiles under DeepSpeed",
    ),
    "NVMe": ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/x"}, "deepspeed_config_file"),
    "accumulation without DeepSpeed": (RANK | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "the recipe owns"),
    "clipping without DeepSpeed": (RANK | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "the recipe owns"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, "one of 4 tasks, but the launch has 1 machines"),
    "Intel MPI": ({"PMI_SIZE": "2"}, "one of 2 tasks"),
    "MVAPICH": ({"MV2_COMM_WORLD_SIZE": "2"}, "one of 2 tasks"),
    "srun": (RANK | {"SLURM_STEP_NUM_TASKS": "4", "GROUP_WORLD_SIZE": "1"}, "one of 4 tasks"),
    "DeepSpeed's launcher": ({"CROSS_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1"}, "DeepSpeed's own launcher"),
    "unconnected": ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.1"}, "MASTER_ADDR without RANK"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_a_variable_that_asks_for_what_would_not_be_done(case: str) -> None:
    environment, said = ENVIRONMENTS[case]
    with pytest.raises(UserError, match="the environment says") as refused:
        check_variables(environment)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        RANK,
        RANK | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2", "PMI_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"},
        RANK | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        RANK | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "false"},
    ],
)
def test_variables_that_ask_for_nothing_else(environment: dict[str, str]) -> None:
    check_variables(environment)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["accelerate", "launch", "--config_file", "x", "train.py"], ["--config_file", "x", "train.py"]),
        ([sys.executable, "/venv/bin/accelerate", "launch", "train.py"], ["train.py"]),
        ([sys.executable, "-m", "accelerate.commands.launch", "train.py"], ["train.py"]),
        ([sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "train.py"], ["train.py"]),
        (["accelerate-launch", "train.py"], ["train.py"]),
        (["accelerate", "test"], None),
        (["bash", "-c", "accelerate launch train.py"], None),
        ([sys.executable, "train.py"], None),
    ],
)
def test_the_launchers_words_are_found(command: list[str], words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ancestor:
        def __init__(self, words: list[str]) -> None:
            self.words = words

        def cmdline(self) -> list[str]:
            return self.words

    class Process:
        def parents(self) -> list[Ancestor]:
            return [Ancestor([sys.executable, "-m", "torch.distributed.run"]), Ancestor(command)]

    monkeypatch.setattr("loop.engine.launcher.psutil.Process", Process)
    assert launcher.launcher_words() == words


def test_the_docs_show_the_lists() -> None:
    assert tables() in (ROOT / "docs" / "launching.md").read_text(), "run python -m tests.launch_table"


def test_nothing_secret_is_kept_by_git() -> None:
    done = subprocess.run(["git", "check-ignore", ".deepspeed_env"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
