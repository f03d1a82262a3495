"""Publishes folders that exist whole or not at all, with a manifest that tells whether they are what was written."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from data.errors import UserError
from loop.guard.process import RunError

MANIFEST = "manifest.json"
PARTIAL, OLD = ".partial", ".old"  # ends of names that begin with a dot: half written, and about to be replaced


def publish(
    folder: Path,
    write: Callable[[Path], None],
    otherwise: str = "Earlier checkpoints are intact",
    then: str = "go on with --resume",
) -> None:
    """Writes a folder beside `folder`, syncs it to the disk and renames it to `folder`.

    Raises RunError when that fails: `otherwise` says what is left, and `then` what to do once there is space. A
    RunError or a UserError of `write` passes unchanged. In each case what was written is removed.
    """
    beside, old = (folder.with_name(f".{folder.name}{end}") for end in (PARTIAL, OLD))
    try:
        shutil.rmtree(beside, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)  # a run folder that has vanished stays an error
        beside.mkdir()
        write(beside)
        for path in (*beside.iterdir(), beside, folder.parent.parent):
            sync(path)
        if folder.exists():  # the adapter of a run that had come to its end before
            folder.rename(old)
        beside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # safetensors has an exception of its own for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        if isinstance(error, RunError | UserError):
            raise
        free = f"{shutil.disk_usage(existing(folder)).free / 1e6:,.0f} MB are free there"
        raise RunError(
            f"{folder} could not be written: {error}. {otherwise}; {free}. Free space or make it writable, then {then}."
        ) from error


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest folder around it that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.exists())


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path) -> None:
    """Writes manifest.json, which has the size and the SHA-256 of every other file in the folder."""
    manifest = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def file_fingerprint(file: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def damage(folder: Path, needed: Set[str], known: Set[str]) -> str | None:
    """What is wrong with the files of a folder that has a manifest, or None. It opens no file that is not named there.

    The manifest has to name the `needed` files, and the folder holds none but `known` ones.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (said["bytes"], said["sha256"]) for name, said in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"no {MANIFEST} that can be read ({error})"
    missing = needed - expected.keys()
    if missing:
        return f"{MANIFEST} does not name {', '.join(sorted(missing))}"
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    foreign = (found | expected.keys()) - known | (found - expected.keys())
    if foreign:
        return f"holds files that were not written by this program: {', '.join(sorted(foreign))}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_fingerprint(path)["sha256"] != digest:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None
