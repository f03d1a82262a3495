"""docs/guarantees.md: each command that checks a promise writes its own section there, and leaves the others alone."""

import platform
import re
import time
from importlib.metadata import version

import torch

from tests.distributed.launching import ROOT

PAGE = ROOT / "docs" / "guarantees.md"


def write_section(title: str, command: str, text: str) -> None:
    """Replaces the section `title` by `text`, with the date, the machine and the versions that it was found with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "accelerate", "peft"))
    device = (
        f"{torch.cuda.get_device_name()}, NCCL" if torch.cuda.is_available() else f"{platform.machine()} CPUs, gloo"
    )
    said = f"Written by `{command}` on {time.strftime('%Y-%m-%d')}, {device}; {versions}."
    section = f"## {title}\n\n{said}\n\n{text.strip()}\n"
    page = PAGE.read_text(encoding="utf-8")
    old = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    if old is None:
        page = f"{page.rstrip()}\n\n{section}"
    else:
        page = f"{page[: old.start()]}{section}\n{page[old.end() :]}".rstrip() + "\n"
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE}: {title}")
