"""What this project uses of other libraries beyond their documented interface: one module for each library.

Each module names the version that it was written against; each function says which private part it uses and why no
public one would do. tests/test_internals.py fails with a sentence when a library no longer has such a part.
"""
