"""How answers are generated: greedily, or drawn with a seed, and where they end."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Settings:
    """Holds what the user can set of the generation."""

    max_new_tokens: int = 64  # tokens after which an answer is cut off
    temperature: float = 0.0  # the logits are divided by it before a token is drawn; 0 takes the likeliest token
    top_p: float = 1.0  # a token is drawn among the likeliest ones that have this probability together
    top_k: int = 0  # a token is drawn among so many of the likeliest ones; 0 for all
    seed: int = 42  # of what is drawn
    samples: int = 1  # answers to each question
    stop: tuple[str, ...] = ()  # texts at which an answer ends; they are not part of it


class Choice:
    """Chooses tokens as the settings say, and knows where an answer ends."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """The tokenizer may be None where nobody asks for a text and no text ends an answer."""
        self.settings, self.tokenizer = settings, tokenizer
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)] if self.drawn else [])
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))
        # A token is at least a byte, so a text that has just been completed lies within as many tokens.
        self.reach = max((len(text.encode()) for text in settings.stop), default=0) + 1

    @property
    def drawn(self) -> bool:
        return self.settings.temperature > 0

    def draws(self, prompt: Sequence[int], sample: int) -> list[float]:
        """Returns numbers of 0..1, one for each token of an answer.

        They depend on the seed, the prompt and the number of the sample alone, and so not on the other questions, the
        size of a batch or the number of processes.
        """
        known = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
        entropy = [self.settings.seed, sample, int.from_bytes(known, "big")]
        drawn: list[float] = np.random.default_rng(entropy).random(self.settings.max_new_tokens).tolist()
        return drawn

    def tokens(self, logits: Tensor, draws: Sequence[float]) -> Tensor:
        """Returns the next token of each row, given logits [B, vocab] and a number of 0..1 for each row."""
        if not self.drawn:
            return logits.argmax(-1)
        warped = self.warpers(torch.empty(len(logits), 0, dtype=torch.long), logits.float())  # type: ignore[arg-type]
        sums = warped.double().softmax(-1).cumsum(-1)
        drawn = torch.tensor(draws, dtype=torch.double, device=logits.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    def has_ended(self, answer: Sequence[int]) -> bool:
        """Whether the last token of an answer has completed a text at which it ends."""
        if not self.settings.stop:
            return False
        end = self._decode(answer[-self.reach :])
        return any(text in end for text in self.settings.stop)

    def text(self, answer: Sequence[int]) -> str:
        """Returns the text of an answer, without special tokens and up to the first text at which it ends."""
        text = self._decode(answer)
        ends = [text.index(stop) for stop in self.settings.stop if stop in text]
        return text[: min(ends, default=len(text))]

    def _decode(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
