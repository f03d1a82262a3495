"""Generates one answer and writes its text while it grows."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.answers.decode import decode
from eval.answers.generate import Answer, answer_of
from eval.answers.settings import Choice, Settings

HALF = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not whole yet


class _Told(Choice):
    """Chooses tokens as Choice does, and writes the text of an answer as far as later tokens cannot change it."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(settings, tokenizer)
        self.write = write
        self.ids: list[int] = []
        self.told = ""

    def tokens(self, logits: Tensor, draws: Sequence[float]) -> Tensor:
        tokens = super().tokens(logits, draws)
        self.ids += tokens.tolist()
        text = self.text(self.ids).rstrip(HALF)
        # The end of the text may be the beginning of a text at which the answer ends, which is no part of it.
        begun = (n for stop in self.settings.stop for n in range(len(stop)) if text.endswith(stop[:n]))
        self.tell(text[: len(text) - max(begun, default=0)])
        return tokens

    def tell(self, text: str) -> None:
        """Writes what of `text` is not written yet."""
        if new := text[len(self.told) :]:
            self.told += new
            self.write(new)


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    stops: Collection[int],
    settings: Settings,
    write: Callable[[str], object],
) -> Answer:
    """Returns the first answer that generate() returns for the tokenized `prompt`, and writes it piece by piece.

    KeyboardInterrupt ends the answer, which is then what has been written.
    """
    choice = _Told(settings, tokenizer, write)
    try:
        (ids,) = decode(model, [prompt], 1, choice, stops)
    except KeyboardInterrupt:
        return Answer(choice.told, len(choice.ids))
    answer = answer_of(ids, choice, stops)
    choice.tell(answer.text)
    return answer
