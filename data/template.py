"""Asks a tokenizer's chat template what a server sends, and what the model then has to generate.

Nothing here knows a template by its name. What has to be known is found out by trying, once for a tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.errors import UserError

# Characters for private use; they stand for the user's text and for the assistant's in a rendering.
USER, ANSWER = "\ue000", "\ue001"
# Variables that templates understand. With the later ones a template begins no thought that the answer does not have.
VARIABLES: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
SHOWN = 40  # characters that a message shows of a rendering, on both sides of a place
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


class ChatTemplate:
    """A tokenizer's chat template, with what it needs to know about it.

    `variables` are given to each rendering, `as_parts` says that it wants a content as a list of parts, and `end` is
    what it writes behind an answer, up to the token with which a server ends the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str = "") -> None:
        """Raises UserError when the tokenizer has no chat template or no end token, when the template fails, and when
        an answer would not stand where a server has the model generate it."""
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.name = tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise UserError(f"{self.name}: the tokenizer has no chat template. Use an Instruct model.")
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: the tokenizer has no end token. Set its eos_token.")
        self.control = control_tokens(tokenizer)
        prompt, whole = self._try()
        self.before, _, self.after = prompt.partition(USER)
        self.lead, _, self.tail = whole[len(prompt) :].partition(ANSWER)  # what it writes around an answer
        self.end = self._end(self.tail)
        # What a tokenizer has to see before an answer: it cuts a text at control tokens before anything else.
        last = max((self.after.rfind(token) for token in self.control), default=-1)
        self.context = self.after[last:] if last >= 0 else ""

    def _try(self) -> tuple[str, str]:
        """Finds the way to ask the template; returns a prompt, and the conversation with an answer behind it."""
        problem = None
        for as_parts in (False, True):
            for variables in VARIABLES:
                self.as_parts, self.variables = as_parts, variables
                try:
                    prompt, whole = self.prompt(USER), self._render(USER, {"content": ANSWER})
                    self._check(prompt, whole)
                    return prompt, whole
                except UserError as error:
                    problem = problem or error
        assert problem is not None
        raise problem

    def _check(self, prompt: str, whole: str) -> None:
        if prompt.count(USER) != 1 or whole.count(USER) != 1:
            raise UserError(f"{self.name}: its chat template does not show what the user says once. Correct it.")
        if whole.count(ANSWER) != 1:
            raise UserError(f"{self.name}: its chat template does not show what the assistant says once. Correct it.")
        self._check_begin(prompt, whole)

    def _check_begin(self, prompt: str, whole: str) -> None:
        if not whole.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
            shown = slice(max(0, at - SHOWN), at + SHOWN)
            raise UserError(
                f"{self.name}: its chat template has the model answer behind {prompt[shown]!r}, but writes the answer "
                f"behind {whole[shown]!r}, so it would be learned where nobody asks for it. Correct the template."
            )

    def _end(self, tail: str) -> str:
        """What of `tail` the model has to generate: up to its first control token, and those that follow at once.

        A server stops at the tokenizer's end token, where it is among these. Where there is no control token, as in
        templates whose next turn ends the answer, it is the end token alone.
        """
        one = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True)))
        found = re.search(rf"(?:{one})+", tail) if one else None
        if found is None:
            return str(self.tokenizer.eos_token)
        run, eos = found[0], str(self.tokenizer.eos_token)
        return tail[: found.start()] + (run[: run.index(eos) + len(eos)] if eos in run else run)

    @property
    def stop_token(self) -> int:
        """The id of the token with which a trained answer ends."""
        return int(self.tokenizer(self.end, add_special_tokens=False)["input_ids"][-1])

    def prompt(self, user: str) -> str:
        """The conversation up to where the assistant begins to answer what `user` says."""
        return self._render(user, None)

    def turn(self, user: str, output: str) -> tuple[str, str]:
        """The prompt, and what the model has to generate behind it, with the token that ends the answer.

        A thought at the beginning of `output`, between <think> and </think>, is given to the template as a thought,
        where <think> is a control token. Raises UserError when the template does not show the answer as it is.
        """
        message: dict[str, str] = {"content": output}
        thought = THOUGHT.fullmatch(output) if "<think>" in self.control else None
        if thought:
            message = {"content": thought[2], "reasoning_content": thought[1].strip()}
        whole = self._render(user, message)
        prompt = f"{self.before}{user}{self.after}"
        if not whole.startswith(prompt):  # the template changes what the user says; it may strip blanks
            prompt = self.prompt(user)
            self._check_begin(prompt, whole)
        rest = whole[len(prompt) :]
        missing = [text for text in message.values() if text.strip() not in rest]
        if missing or not rest.endswith(self.tail):
            raise UserError(
                f"the chat template does not show {(missing or [output])[0].strip()[:SHOWN]!r}, but makes "
                f"{rest[: 2 * SHOWN]!r} of the answer; change the answer or the template"
            )
        return prompt, rest[: len(rest) - len(self.tail)] + self.end

    def _render(self, user: str, assistant: Mapping[str, str] | None) -> str:
        turns: list[dict[str, Any]] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        turns.append({"role": "user", "content": user})
        if assistant is not None:
            turns.append({"role": "assistant", **assistant})
        if self.as_parts:
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=assistant is None, **self.variables
            )
        except Exception as error:  # the template is a program that comes with the model, and may raise anything
            raise UserError(
                f"{self.name}: its chat template fails: {error}. Correct it; if it wants no system turn, "
                "leave data.system_prompt empty."
            ) from error
        return str(text)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that can begin or end a turn.

    They are all special tokens, and those of the other added tokens that the chat template writes and that are more
    than white space.
    """
    template = str(tokenizer.chat_template)
    added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    return [token.content for token in added if token.special or token.content in template]


def plain_parts(text: str, control: Sequence[str]) -> list[str]:
    """Cuts `text` after the first character of each control token, so that a tokenizer never sees one."""
    cuts = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in control)
    return re.split(cuts, text) if cuts else [text]
