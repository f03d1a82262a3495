"""What a run tells, to whom: no secrets, no outside, nothing listening beyond what brings its processes together."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import CONFIGS, DEBUG, EXTENSIONS, ROOT, Run, Running, launch, start
from tests.hostile import EVIL

SECRETS = {
    name: f"planted-{name.lower()}-7f3a9c"
    for name in ("HF_TOKEN", "SWANLAB_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD")
}
PASSWORD = "planted-in-the-remote-7f3a9c"
# Python imports this first in every process; the launcher, the ranks and what they start write down where they turn to.
AUDIT = """
import json, os, sys
def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        host = address[0] if isinstance(address, tuple) else address
        with open(os.environ["AUDIT_FILE"], "a") as file:
            file.write(json.dumps([event, str(host)]) + "\\n")
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run on two processes with SwanLab, as it is by default, and the folder of all that it could write to."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "home").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(AUDIT)
    env = SECRETS | {
        "GIT_CONFIG_COUNT": "1",  # gives every repository this remote
        "GIT_CONFIG_KEY_0": "remote.origin.url",
        "GIT_CONFIG_VALUE_0": f"https://oauth2:{PASSWORD}@example.org/o/r.git",
        "HOME": str(folder / "home"),
        "TORCH_EXTENSIONS_DIR": EXTENSIONS,
        "PYTHONPATH": str(folder / "site"),
        "AUDIT_FILE": str(folder / "audit.jsonl"),
    }
    swanlab = ("--tracker", "swanlab", "--log_every", "1")
    run = launch(CONFIGS / "zero3.yaml", *DEBUG, *swanlab, folder=folder / "run", env=env)
    assert run.code == 0, run.output
    assert "warning: the tracker" not in run.output
    return run, folder


def test_secrets_of_the_environment_are_written_nowhere(watched: tuple[Run, Path]) -> None:
    run, folder = watched
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("swanlog" in path.parts for path in files), "the tracker has written"
    for name, secret in {**SECRETS, "git remote": PASSWORD}.items():
        assert secret not in run.output, name
        for path in files:
            assert secret.encode() not in path.read_bytes(), (name, path)


def test_nobody_outside_is_called(watched: tuple[Run, Path]) -> None:
    calls = [json.loads(line) for line in (watched[1] / "audit.jsonl").read_text().splitlines()]
    assert calls, "the hook saw how the launcher looks for a port"
    own = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", "None", os.uname().nodename}
    # A socket whose address begins with / or a zero byte is none of a network.
    assert [call for call in calls if call[1] not in own and not call[1].startswith(("/", "\0"))] == []


def listening(pid: int) -> set[tuple[str, int]]:
    """Address, in the kernel's hexadecimal, and port of each TCP socket on which the process waits for others."""
    held = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:
                address, port = local.split(":")
                found.add((address, int(port, 16)))
    return found


@pytest.mark.parametrize("launcher", [False, True])
def test_nothing_listens_but_what_brings_the_processes_together(launcher: bool, tmp_path: Path) -> None:
    """Without a launcher gloo alone, on the loopback interface; with one also torch's store, of which there is one."""
    run = Running(tmp_path / "run", launcher)
    everywhere = [
        socket for pid in (run.process.pid, *run.ranks) for socket in listening(pid) if socket[0] != "0100007F"
    ]
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait()
    assert len({port for _, port in everywhere}) == (1 if launcher else 0), everywhere


def test_a_pickle_for_an_adapter_is_not_opened(watched: tuple[Run, Path], tmp_path: Path) -> None:
    """What cannot be read is one message of the evaluation too."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "recipe.yaml").write_text((watched[0].folder / "recipe.yaml").read_text())
    (adapter / "adapter_config.json").write_text((watched[0].folder / "adapter" / "adapter_config.json").read_text())
    command = [sys.executable, "-m", "eval.run", "--run", str(tmp_path)]
    for file, said in (
        ("adapter_model.bin", "no adapter/adapter_model.safetensors"),
        ("adapter_model.safetensors", "cannot be read"),
    ):
        (adapter / file).write_bytes(EVIL)
        run = start(command, tmp_path)
        assert run.code == 2, run.output
        assert run.output.count("error: ") == 1
        assert said in run.output
        assert "Traceback" not in run.output
        assert not list(ROOT.glob("plainloop-was-here")), "and no code of it ran"
