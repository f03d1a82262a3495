"""Writes what a run tells while it goes on: metrics.jsonl, a tracker, a progress bar."""

import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from tqdm import tqdm

from data.errors import UserError
from loop.engine.accelerator import on_main_process
from loop.guard.process import RunError, Stopped
from loop.recipe import Recipe, data_files, recipe_as_dict


class TrackerThread:
    """Runs a tracker in a thread of its own: whatever the tracker does, the run neither waits for it nor stops.

    The tracker's first exception is printed once and ends the tracker. A call in which the tracker hangs is left
    behind when the process ends.
    """

    # Seconds that the end of a run waits for the tracker:
    PATIENCE = 30.0  # in general, counted from the beginning of the tracker's present call
    HASTE = 0.5  # for a tracker that has been in its call for longer or has never started, or where the run failed
    STOP = 5.0  # where the run was asked to stop

    def __init__(self, start: Callable[[], None], finish: Callable[[], None], say: Callable[[str], None]) -> None:
        self.finish, self.say = finish, say
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.started = threading.Event()
        self.job_begun = time.monotonic()
        self.jobs.put(start)
        self.jobs.put(self.started.set)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            while job := self.jobs.get():
                self.job_begun = time.monotonic()
                job()
                self.job_begun = math.inf
            self.finish()
        except (Exception, SystemExit) as error:
            self.say(f"warning: the tracker stopped and the run goes on without it: {error}")
        finally:
            self.started.set()

    def close(self, patience: float = PATIENCE) -> None:
        """Waits until everything is handed over, at most `patience` seconds."""
        spent = max(0.0, time.monotonic() - self.job_begun)
        self.jobs.put(None)
        self.thread.join(max(self.HASTE, patience - spent) if self.started.is_set() else self.HASTE)
        if self.thread.is_alive():
            self.say("warning: the tracker did not come to an end and is left behind")


class Tracking:
    """Writes metrics on rank 0, and nothing on the other ranks, while the context is open.

    metrics.jsonl is the source of truth and is flushed at every log. The recipe's tracker gets the same numbers.
    """

    def __init__(
        self, recipe: Recipe, run_dir: Path, first_step: int, total_steps: int, accelerator: Accelerator
    ) -> None:
        self.accelerator = accelerator
        self.first_step = first_step
        self.tracker: TrackerThread | None = None
        self.backend: Any = None  # accelerate's tracker, which the tracker's thread alone makes and calls
        self.started = time.monotonic()
        self.file: TextIO | None = None
        self.bar = None
        on_main_process(partial(self._open, run_dir), accelerator)
        if not accelerator.is_main_process:
            return
        # A terminal shows a bar; a log file or a pipe gets a line for each log instead.
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        if recipe.tracker is not None:
            start = partial(self._start_tracker, recipe.tracker, recipe, run_dir)
            self.tracker = TrackerThread(start, self._finish_tracker, self.say)
            if recipe.tracker == "swanlab" and os.environ.get("SWANLAB_MODE", "offline") == "offline":
                self.tracker.started.wait(TrackerThread.PATIENCE)  # without a network it is soon ready

    def _open(self, run_dir: Path) -> None:
        try:
            self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{run_dir / 'metrics.jsonl'} cannot be written: {error}. Make it writable.") from error

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.tracker is not None:
            patience = {type(None): TrackerThread.PATIENCE, Stopped: TrackerThread.STOP}
            self.tracker.close(patience.get(type(error), TrackerThread.HASTE))
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            with contextlib.suppress(OSError):  # the failure of its last line has been reported
                self.file.close()

    def _start_tracker(self, name: str, recipe: Recipe, run_dir: Path) -> None:
        os.environ.setdefault("SWANLAB_PROBE_GIT", "false")  # a remote's URL may hold a password
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

        known = filter_trackers([name], str(run_dir))
        if not known:
            raise UserError(f"no tracker {name!r} is installed; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        init_kwargs: dict[str, Any] = {}
        if name == "swanlab":
            init_kwargs = {"name": run_dir.name, "log_dir": str(run_dir / "swanlog")}
            if "SWANLAB_MODE" not in os.environ:  # its default, online, needs an account and a network
                init_kwargs["mode"] = "offline"
            os.environ.setdefault("SWANLAB_INTERACTIVE", "false")  # it would ask for a key and wait for an answer
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = [str(run_dir)] if kind.requires_logging_directory else []
        self.backend = kind("plainloop", *folder, **init_kwargs)
        self.backend.start()
        self.backend.store_init_configuration(tracker_config(recipe))

    def _log_to_tracker(self, metrics: dict[str, float], step: int) -> None:
        self.backend.log(metrics, step=step)

    def _finish_tracker(self) -> None:
        self.backend.finish()

    def say(self, line: str) -> None:
        """Prints a line on rank 0, above the progress bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and shows the metrics of `step`; every rank enters.

        Call it once for each step, because SwanLab drops a second call. Raises RunError on every rank when the metrics
        cannot be written.
        """
        on_main_process(partial(self._write, step, metrics), self.accelerator)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self.file is not None
        self._show(step, metrics)
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # JSON has no inf
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise RunError(
                f"step {step}: {self.file.name} could not be written: {error}. Checkpoints are intact; free space "
                "there, then go on with --resume."
            ) from error
        if self.tracker is not None:
            self.tracker.jobs.put(partial(self._log_to_tracker, dict(metrics), step))

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics beside the bar in a terminal, and as a line elsewhere."""
        assert self.bar is not None
        short = {
            key.removeprefix("train/"): f"{value / 1e6:,.0f} MB" if key.endswith("_bytes") else f"{value:.4g}"
            for key, value in metrics.items()
        }
        if not self.bar.disable:
            self.bar.set_postfix(short, refresh=False)
            return
        total = int(self.bar.total or 0)
        left = (time.monotonic() - self.started) / max(step - self.first_step, 1) * (total - step)
        values = "  ".join(f"{key} {value}" for key, value in short.items())
        print(f"step {step}/{total}  {values}  {left:.0f} s left", flush=True)


def tracker_config(recipe: Recipe) -> dict[str, Any]:
    """What the reference shows of a run (model, data set and three LoRA numbers), and then all keys without nesting."""
    flat: dict[str, Any] = {
        "model": recipe.model.name_or_path,
        "dataset": ", ".join(data_files(recipe.data.train_file)),
        "lora_rank": recipe.lora.rank,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": recipe.lora.dropout,
    }
    for key, value in recipe_as_dict(recipe).items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{name}".rstrip("."): str(v) if isinstance(v, list | dict) else v for name, v in inner.items()}
    return flat
