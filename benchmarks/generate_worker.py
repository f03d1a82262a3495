"""Runs one contender of the generation: python -m benchmarks.generate_worker KIND FOLDER PROMPTS MAX_NEW_TOKENS

KIND is reference (one prompt at a time, the adapter beside the weights), merged (one prompt at a time, the adapter
merged), batched (transformers' generate, left-padded batches in file order) or ours. FOLDER has a model, an adapter
and rows.json. Each turn answers the next PROMPTS prompts of rows.json.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import Turns
from benchmarks.workload import load_rows
from eval.answers.decode import decode
from eval.answers.generate import load_model
from eval.answers.settings import Choice, Settings

END, PAD, BATCH = 2, 0, 16

Answers = list[list[int]]


def by_generate(model: Any, prompts: Answers, most: int, batch_size: int) -> Answers:
    """Answers `prompts` with transformers' generate, in left-padded batches of `batch_size`."""
    answers: Answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        for answer in output[:, width:].tolist():
            answers.append(answer[: answer.index(END) + 1] if END in answer else answer)
    return answers


def ours(model: Any, prompts: Answers, most: int) -> Answers:
    """Answers `prompts` as the evaluation does."""
    return list(decode(model, prompts, None, Choice(Settings(most)), {END}))


KINDS: dict[str, Callable[[Any, Answers, int], Answers]] = {
    "reference": lambda model, prompts, most: by_generate(model, prompts, most, 1),
    "merged": lambda model, prompts, most: by_generate(model, prompts, most, 1),
    "batched": lambda model, prompts, most: by_generate(model, prompts, most, BATCH),
    "ours": ours,
}


def main(argv: list[str]) -> None:
    kind, folder, count, most = argv
    model = load_model(folder, Path(folder) / "adapter", merge=kind != "reference")
    prompts = [example.prompt_ids for example in load_rows(Path(folder))]
    turns, ends = Turns(1), [0]
    answers: Answers = []
    with torch.inference_mode():
        while True:
            turns.before_step()
            answers += KINDS[kind](model, prompts[len(answers) :][: int(count)], int(most))
            ends.append(len(answers))
            turns.after_step(answers=answers, ends=ends)


if __name__ == "__main__":
    main(sys.argv[1:])
