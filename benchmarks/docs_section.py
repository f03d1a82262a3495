"""Writes into docs/: a command that measures or checks something replaces its own section of a page, and no other."""

import re
import time
from importlib.metadata import version

import torch

from eval.peak import machine
from loop.recipe import ROOT


def write_section(title: str, command: str, text: str, page_name: str = "guarantees.md") -> None:
    """Replaces the section `title` of the page `page_name` of docs/ by `text`, or adds it where there is none.

    The section begins with the command that wrote it, the date, the machine and the versions of the libraries.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "accelerate", "peft"))
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, NCCL"
    else:
        host = machine()
        device = f"{host['cores']} cores of {host['cpu']}, gloo"
    said = f"Written by `{command}` on {time.strftime('%Y-%m-%d')}, {device}; {versions}."
    replace_section(title, f"{said}\n\n{text}", page_name)


def replace_section(title: str, text: str, page_name: str) -> None:
    """Replaces the section `title` of the page `page_name` of docs/ by `text` alone, or adds it where there is none."""
    section = f"## {title}\n\n{text.strip()}\n"
    file = ROOT / "docs" / page_name
    page = file.read_text(encoding="utf-8")
    old = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    if old is None:
        page = f"{page.rstrip()}\n\n{section}"
    else:
        page = f"{page[: old.start()]}{section}\n{page[old.end() :]}".rstrip() + "\n"
    file.write_text(page, encoding="utf-8")
    print(f"{file}: {title}")
