"""A fork server for Python commands: it has imported the third-party libraries, and what it forks need not do so again.

Three quarters of what a training of the debug recipe takes are imports of torch, transformers, PEFT and DeepSpeed. The
server imports these, and nothing of this project. It opens no thread, no file of a run and no process group before it
forks, so a forked process is what `python …` would be a moment after its imports. Everything else is real: processes,
signals, gloo, and `accelerate launch` itself, whose own code runs in a forked process and starts its ranks by forking
instead of by executing Python once more.

tests/warm.py is the other side. One request is one JSON object: the words behind `python`, the whole environment,
the working directory and the file for the output.
"""

import atexit
import builtins
import gc
import importlib
import inspect
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

LAUNCHER = "accelerate.commands.launch"
DEEPSPEED_LAUNCHER = "deepspeed.launcher.runner"  # which accelerate's imports where DeepSpeed is used
LIBRARIES = (
    *("torch.distributed.run", "torch.utils.cpp_extension", "accelerate.tracking", "deepspeed"),
    *("transformers.models.auto", "transformers.models.qwen2.modeling_qwen2", "transformers.integrations"),
    *("transformers.models.qwen2.tokenization_qwen2", "peft.tuners.lora", "safetensors.torch", "jsonargparse"),
    *("pydantic_settings", "swanlab", "tqdm", "yaml", "psutil", "pynvml"),
    *("jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg"),
)
SET_BY_IMPORT: dict[str, dict[str, str]] = {}  # environment variables that a launcher's modules set when imported
POLL = 0.02  # seconds


def import_libraries() -> None:
    """Imports LIBRARIES and loads DeepSpeed's C++ extensions, of which each process keeps the copy that it inherits."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where ninja is
    for name in (LAUNCHER, DEEPSPEED_LAUNCHER):
        known = dict(os.environ)
        importlib.import_module(name)
        SET_BY_IMPORT[name] = {key: value for key, value in os.environ.items() if key not in known}
    for name in LIBRARIES:
        importlib.import_module(name)
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    for builder in (CPUAdamBuilder(), ShareMemCommBuilder()):
        builder.load(verbose=False)
    gc.collect()
    gc.freeze()  # a collection in a forked process leaves these pages shared


def serve(channel: socket.socket) -> None:
    """Answers requests until the other side is gone. Each request comes with a socket for its own process alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 2**20, 1)
        if not message:
            return
        reply = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            channel.close()
            supervise(json.loads(message), reply)
        reply.close()


def supervise(request: dict[str, Any], reply: socket.socket) -> NoReturn:
    """Forks the process, tells its id, waits for its end and tells its exit code; kills it when nobody listens."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        reply.close()
        become(request)
    reply.send(str(pid).encode())
    ended = 0
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended and select.select([reply], [], [], POLL)[0]:  # the other side is closed
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(0)
    reply.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict[str, Any]) -> NoReturn:
    """Makes this forked process what `python WORDS` would be, and ends it."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    os.chdir(request["cwd"])
    set_environment(request["env"])
    words: list[str] = request["words"]
    if words[:2] == ["-m", LAUNCHER]:
        fork_ranks_ahead(words[2:])
    run_python(words)


def set_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


class Rank:
    """A process that was forked ahead and waits for its command; its parent is the launcher, as a rank's has to be."""

    def __init__(self, others: Sequence["Rank"]) -> None:
        reading, self.writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(reading)
            return
        for descriptor in (self.writing, *(other.writing for other in others)):
            os.close(descriptor)
        with open(reading, encoding="utf-8") as pipe:
            command = pipe.read()
        if not command:  # the launcher ended without it
            os._exit(0)
        values = json.loads(command)
        if values["new_session"]:
            os.setsid()
        set_environment(values["env"])
        run_python(values["words"])

    def begin(self, words: Sequence[str], env: dict[str, str], new_session: bool) -> None:
        with open(self.writing, "w", encoding="utf-8") as pipe:
            json.dump({"words": list(words), "env": env, "new_session": new_session}, pipe)


def fork_ranks_ahead(words: list[str]) -> None:
    """Forks as many ranks as the launcher will start, and lets it start these instead of executing Python.

    They are forked before the launcher has a thread. subprocess.Popen stays what it is otherwise: only its
    _execute_child, which forks and executes, takes a waiting rank where the program is this Python.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    os.environ.update(SET_BY_IMPORT[LAUNCHER] | (SET_BY_IMPORT[DEEPSPEED_LAUNCHER] if args.use_deepspeed else {}))
    ranks: list[Rank] = []
    for _ in range(args.num_processes if args.use_deepspeed or args.multi_gpu else 1):
        ranks.append(Rank(ranks))
    execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def begin_rank(self: Any, args: Any, *others: Any) -> None:
        given = inspect.signature(execute).bind(self, args, *others).arguments
        if isinstance(args, str) or args[0] != sys.executable or not ranks:
            execute(self, args, *others)
            return
        rank = ranks.pop(0)
        rank.begin(args[1:], dict(given["env"] or os.environ), given["start_new_session"])
        self.pid, self._child_created = rank.pid, True

    subprocess.Popen._execute_child = begin_rank  # type: ignore[attr-defined]


def run_python(words: Sequence[str]) -> NoReturn:
    """`python WORDS`: a script, -m module or -c code with its arguments; ends the process with its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    if words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # DeepSpeed's launcher sets it for its ranks
    sys.path[1:1] = [path for path in given if path and path not in sys.path]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # where pickle and multiprocessing look for its classes
    code: object = 0
    try:
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            sys.path[0] = os.getcwd()
            runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]  # what `python -m` calls
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path[0] = ""
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = list(words)
            sys.path[0] = str(Path(words[0]).resolve().parent)
            main.__file__ = words[0]
            exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    import_libraries()
    threads = len(os.listdir("/proc/self/task"))
    channel.send(str(threads).encode())
    sys.stdout.flush()  # or each forked process would say it again
    serve(channel)


if __name__ == "__main__":
    main()
