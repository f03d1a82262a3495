"""Launches that accelerate carries out in part: several machines, several CPU processes, settings that it drops."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.utils.other import get_free_port

from eval.comparing.launch import AS_TYPED
from tests.distributed.launching import CONFIGS, DEBUG, ROOT, TIMEOUT, TRAIN, Run, launch, without_clock
from tests.warm import clean_environment, cold_popen


def same(one: Run, other: Run) -> None:
    """To the bit."""
    assert len(one.metrics) > 1
    assert without_clock(one) == without_clock(other)
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (one.folder / adapter).read_bytes() == (other.folder / adapter).read_bytes()


def on_machines(
    options: Sequence[Sequence[str]], folder: Path, cwd: Path, *arguments: str, apart: bool = False
) -> list[tuple[int, str]]:
    """Starts `accelerate launch` once for each list of options, all at once; returns exit codes and outputs.

    The machines work in `cwd`, or `apart`, each in its own folder there, which its rank names."""
    environment = clean_environment() | {"GLOO_SOCKET_IFNAME": "lo"}
    outputs = [folder.with_name(f"{folder.name}-{rank}.txt") for rank in range(len(options))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, (words, output) in enumerate(zip(options, outputs, strict=True)):
            command = [
                sys.executable,
                "-m",
                *AS_TYPED,
                *words,
                str(TRAIN),
                *DEBUG,
                "--run_dir",
                str(folder),
                *arguments,
            ]
            processes.append(cold_popen(command, cwd / str(rank) if apart else cwd, environment, output))
        codes = [process.wait(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]


def test_two_machines_train_as_two_processes_of_one(tmp_path: Path) -> None:
    """The commands of README, both on this machine. They share the run folder, as machines do on a network's disk."""
    shared = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(get_free_port())]
    each = [["--config_file", str(CONFIGS / "two_machines.yaml"), *shared, "--machine_rank", str(r)] for r in (0, 1)]
    told = on_machines(each, tmp_path / "two", tmp_path)
    assert [code for code, _ in told] == [0, 0], told
    assert "processes               2" in told[0][1]
    same(Run(tmp_path / "two", 0, told[0][1]), launch(CONFIGS / "zero3.yaml", *DEBUG, folder=tmp_path / "one"))
    assert not (tmp_path / ".deepspeed_env").exists(), "the environment of the launch, secrets included"


@pytest.mark.slow  # the second launcher waits a minute for a message of the first one
def test_machines_with_other_rows_are_refused(tmp_path: Path) -> None:
    """Each machine has its own file under the same name."""
    rows = (ROOT / "data" / "math" / "debug.jsonl").read_text().splitlines(keepends=True)
    shared = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(get_free_port())]
    each = [["--config_file", str(CONFIGS / "two_machines.yaml"), *shared, "--machine_rank", str(r)] for r in (0, 1)]
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "rows.jsonl").write_text("".join(rows[rank:]))
    told = on_machines(each, tmp_path / "run", tmp_path, "--data.train_file", "rows.jsonl", apart=True)
    assert all(code != 0 for code, _ in told)
    assert "the ranks [1] have read other rows than rank 0" in told[0][1]
    assert not (tmp_path / "run").exists()


def written(folder: Path, base: str = "one_process.yaml", **changes: Any) -> Path:
    """An accelerate file: one of ours with `changes`."""
    path = folder / "accel.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((CONFIGS / base).read_text()) | changes))
    return path


def test_multi_cpu_runs_as_many_processes_as_it_says(tmp_path: Path) -> None:
    file = written(tmp_path, distributed_type="MULTI_CPU", num_processes=2, use_cpu=True)
    ((code, output),) = on_machines([["--config_file", str(file)]], tmp_path / "cpus", tmp_path)
    assert code == 0, output
    assert "processes               2" in output
    assert "PyTorch DDP" in output
    ddp = written(tmp_path, distributed_type="MULTI_GPU", num_processes=2)
    same(Run(tmp_path / "cpus", 0, output), launch(ddp, *DEBUG, folder=tmp_path / "ddp"))


def test_what_accelerate_would_do_by_half_is_refused(tmp_path: Path) -> None:
    """FSDP on CPUs, which accelerate starts as plain DDP. tests/test_launch_settings.py has all the other cases."""
    file = written(tmp_path, distributed_type="FSDP", num_processes=2, use_cpu=True, fsdp_config={"fsdp_version": 2})
    ((code, output),) = on_machines([["--config_file", str(file)]], tmp_path / "run", tmp_path)
    assert code != 0
    assert output.count("error: ") == 1, output
    assert "FSDP is not supported" in output
    assert not (tmp_path / "run").exists()


def test_two_machines_that_would_not_find_each_other_are_refused(tmp_path: Path) -> None:
    """DeepSpeed's own launcher, which accelerate takes where the file names none, starts every machine alone."""
    shared = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(get_free_port())]
    words = ["--config_file", str(CONFIGS / "zero3.yaml"), "--num_machines", "2", "--num_processes", "2", *shared]
    ((code, output),) = on_machines([[*words, "--machine_rank", "1"]], tmp_path / "run", tmp_path)
    assert code != 0
    assert output.count("error: ") == 1, output
    assert "deepspeed_multinode_launcher: standard" in output
    assert "passwords included, in plain text" in output
    assert (tmp_path / ".deepspeed_env").exists(), "so the note has a reason"
    assert not (tmp_path / "run").exists()
