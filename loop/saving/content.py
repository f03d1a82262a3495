"""Knows a base model and training rows by their content, wherever their files lie."""

import hashlib
import json
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from data.files import HUB, files_of
from loop.recipe import Recipe, data_files, find_model, find_path

INPUTS = "inputs.json"  # the file of a run folder that holds the hashes
MODEL_FILES = (
    "config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
)  # fmt: skip
SAMPLES, SAMPLE = 64, 64 * 1024  # places that are read in a large file, and bytes that are read at each


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_sha256(recipe: Recipe) -> str:
    """Hashes the training files, and how many times each is used; of a data set of the model hub only its name.

    The hash of a single file that is used once is the file's own.
    """
    files = data_files(recipe.data.train_file)
    hashes = []
    for name, times in files.items():
        paths = [] if name.startswith(HUB) else files_of(find_path(name))
        hashes.append([*map(file_sha256, paths), *([name] if not paths else []), times])
    if len(hashes) == 1 and hashes[0][1:] == [1]:
        return str(hashes[0][0])
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def model_folder(recipe: Recipe) -> Path:
    """The folder with the files of the base model; for a name of the model hub it is the local copy, which has to be
    there."""
    config = cached_file(find_model(recipe.model.name_or_path), "config.json", local_files_only=True)
    assert config is not None
    return Path(config).parent


def model_sha256(recipe: Recipe) -> str:
    """Hashes the base model's configuration, its tokenizer, and samples of its weights, which are many gigabytes."""
    folder = model_folder(recipe)
    patterns = (*MODEL_FILES, "*.py") if recipe.model.trust_remote_code else MODEL_FILES
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    weights = json.loads(index.read_text())["weight_map"].values() if index.is_file() else [SAFE_WEIGHTS_NAME]
    digest = hashlib.sha256()
    for file in sorted(files | {folder / name for name in weights if (folder / name).is_file()}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                opened.seek(start)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()
