"""The commands of tests/ that check a promise write their sections of docs/guarantees.md with `write_section`."""

from benchmarks.docs_section import write_section

__all__ = ["write_section"]
