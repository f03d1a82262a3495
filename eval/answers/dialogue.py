"""Holds a conversation with one model, or with the base and the tuned model at once."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from data.chat import prompt_ids
from data.conversation import Row, Turn
from data.errors import UserError
from data.template import ChatTemplate
from eval.answers.settings import Settings
from eval.answers.stream import stream
from loop.model.build import build_template
from loop.model.limits import positions_of
from loop.recipe import Recipe

BEGIN, END = "<think>", "</think>"  # the marks of a thought
ADVICE = "/undo drops the exchange before, and /reset begins a new conversation."

Write = Callable[[str], object]


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    begins_thought: bool  # whether the template itself begins the thought that the model continues


class Dialogue:
    """A conversation with one or more models, each of which remembers its own answers.

    All answers come from the same weights. `adapted` says of each model, by its label, whether the adapter takes part.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        adapted: Mapping[str, bool],
        settings: Settings,
    ) -> None:
        self.model, self.recipe, self.tokenizer, self.settings = model, recipe, tokenizer, settings
        self.adapted = adapted
        self.template = build_template(recipe, tokenizer)
        self.positions = positions_of(model.config.get_text_config())
        self.turns: dict[str, tuple[Turn, ...]] = dict.fromkeys(adapted, ())

    def begin(self, system_prompt: str) -> None:
        """Begins a new conversation behind this system prompt; '' is none. Raises UserError where the template fails
        with it, and then the conversation stays as it is."""
        recipe = replace(self.recipe, data=replace(self.recipe.data, system_prompt=system_prompt))
        self.template = build_template(recipe, self.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forgets what has been said."""
        self.turns = dict.fromkeys(self.turns, ())

    def undo(self) -> None:
        """Forgets the last exchange. Raises UserError where there is none."""
        if not all(self.turns.values()):
            raise UserError("nothing has been said yet.")
        self.turns = {label: turns[:-2] for label, turns in self.turns.items()}

    def say(self, text: str, write: Write) -> None:
        """Has each model answer `text`, and writes the answers while they grow. KeyboardInterrupt ends one answer.

        Raises UserError where a model cannot be asked this; then nothing has been said.
        """
        said = Turn("user", text)
        prompts = {label: self._prompt((*turns, said)) for label, turns in self.turns.items()}
        answers = {label: self._answer(label, prompt, write) for label, prompt in prompts.items()}
        self.turns = {label: (*turns, said, answers[label]) for label, turns in self.turns.items()}

    def _prompt(self, turns: Sequence[Turn]) -> _Prompt:
        row = Row(1, (*turns, Turn("assistant", "")))
        try:
            ids, text = prompt_ids(row, self.template), self.template.prompt(row)
        except UserError as error:
            raise UserError(f"this cannot be asked: {error}. {ADVICE}") from error
        if self.positions is not None and len(ids) >= self.positions:
            raise UserError(
                f"this cannot be asked: the conversation would have {len(ids):,} tokens, and the model was made for "
                f"{self.positions:,}. {ADVICE}"
            )
        if max(ids) >= (known := self.model.get_input_embeddings().num_embeddings):
            raise UserError(
                f"this cannot be asked: it has a token with the id {max(ids):,}, but the model has embeddings for "
                f"{known:,}. {ADVICE}"
            )
        return _Prompt(ids, text.rstrip().endswith(BEGIN))

    def _answer(self, label: str, prompt: _Prompt, write: Write) -> Turn:
        begun = BEGIN if prompt.begins_thought else ""
        write(f"{label}: {begun}")
        room = self.settings.max_new_tokens
        if self.positions is not None:
            room = min(room, self.positions - len(prompt.ids))
        stops = self.template.stop_tokens(self.model.generation_config)
        settings = replace(self.settings, max_new_tokens=room)
        try:
            with self._model_of(label):
                answer = stream(self.model, self.tokenizer, prompt.ids, stops, settings, write)
        except torch.cuda.OutOfMemoryError as error:
            write("\n")
            raise UserError(f"the answer does not fit into the GPU's memory. {ADVICE}") from error
        write("\n")
        if answer.cut_off:
            more = "--max-new-tokens gives it more" if room == self.settings.max_new_tokens else ADVICE
            write(f"({label} was cut off after {answer.num_tokens} tokens; {more})\n")
        return Turn("assistant", as_remembered(f"{begun}{answer.text}", self.template))

    def _model_of(self, label: str) -> AbstractContextManager[None]:
        """The context in which self.model is the model with this label."""
        if not self.adapted[label] and isinstance(self.model, PeftModel):
            return self.model.disable_adapter()
        return nullcontext()


def as_remembered(answer: str, template: ChatTemplate) -> str:
    """Returns an answer as the next prompt has it: a thought that was cut off ends where it was cut off."""
    knows_thoughts = template.parse and (template.shows_thoughts or BEGIN in template.control)
    unfinished = answer.lstrip().startswith(BEGIN) and END not in answer
    return f"{answer}{END}" if knows_thoughts and unfinished else answer
