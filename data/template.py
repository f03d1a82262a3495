"""Asks a tokenizer's chat template what a server sends, and what the model then has to generate.

Nothing here knows a template by its name. What has to be known is found out by trying, once for a tokenizer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from data.conversation import Row, Turn
from data.errors import UserError
from data.markup import Masks, read_markup
from data.tokens import Encoder

# The template of most models without a well-known one of their own. Its control tokens have to be the tokenizer's.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Characters for private use; they stand for the user's text, the assistant's and a thought in a rendering.
USER, ANSWER, THOUGHT = "\ue000", "\ue001", "\ue002"
# Variables that templates understand. With the first that fits a row, no prompt has a thought that the row does not
# have, and none is closed before the row's own thought.
VARIABLES: tuple[Mapping[str, Any], ...] = (
    *({}, {"enable_thinking": False}, {"thinking": False}),
    *({"enable_thinking": True}, {"thinking": True}),
)
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
SHOWN = 40  # characters that a message shows of a rendering, on both sides of a place


@dataclass(frozen=True)
class Rendering:
    """Holds a text that the model reads, and the places of its characters that are learned: (start, end, weight).

    The text up to a start is exactly what a server sends before the model generates, and an end lies behind the token
    at which the server stops. The text ends with the last place.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...]


class ChatTemplate:
    """A tokenizer's chat template, with what it needs to know about it.

    `variables` are given to a rendering where the row's answers fit them, and `as_parts` says that the template wants a
    content as a list of parts. `end` is what it writes behind an answer, up to the token with which a server ends it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str = "",
        parse: bool = True,
        today: date | None = None,
    ) -> None:
        """`parse` says that a thought and tool calls in the text of an answer are read as such. `today` is the day that
        a template writes which asks for it; None is the day of the call.

        Raises UserError when the tokenizer has no chat template or no end token, when the template fails, and when an
        answer would not stand where a server has the model generate it.
        """
        self.tokenizer, self.parse = tokenizer, parse
        self.name = tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise UserError(
                f"{self.name}: the tokenizer has no chat template. Use an Instruct model, or set data.chat_template."
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: the tokenizer has no end token. Set its eos_token.")
        self.text = str(tokenizer.chat_template) if today is None else on_day(str(tokenizer.chat_template), today)
        self.eos = str(tokenizer.eos_token)
        self.control = control_tokens(tokenizer)
        self.encoder = Encoder(tokenizer, self.control)
        self.masks: Masks = self.encoder.masks
        self.system_prompt: str = self.masks.hide(system_prompt)
        self.begin = _begin_of_texts(tokenizer)  # the tokens with which a text begins that no template writes
        self.longest_token = max(map(len, tokenizer.get_vocab()))  # characters
        self.arguments_as_text = False
        prompt, whole = self._try()
        self.before, _, self.after = prompt.partition(USER)
        self.tail = whole[len(prompt) :].partition(ANSWER)[2]  # what it writes behind an answer
        self.end = self._end(self.tail)
        self.ends_itself = self.tail.startswith(self.end)  # False where the next turn ends an answer
        self.beyond = self.tail[len(self.end) :] if self.ends_itself else ""  # no label
        self.arguments_as_text = self._wants_arguments_as_text()
        self.call_marks = self._marks_of_a_call()
        self.shows_thoughts = self._shows_thoughts()

    def _try(self) -> tuple[str, str]:
        """Finds the way to ask the template; returns a prompt, and the conversation with an answer behind it."""
        problem = None
        user, answer = Turn("user", USER), Turn("assistant", ANSWER)
        for as_parts in (False, True):
            for variables in VARIABLES[:3]:
                self.as_parts, self.variables = as_parts, variables
                try:
                    prompt = self._render(self._with_system([user]), (), True, variables)
                    whole = self._render(self._with_system([user, answer]), (), False, variables)
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
        try:
            _check_begin(prompt, whole)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def _end(self, tail: str) -> str:
        """What of `tail` the model has to generate: up to its first control token, and those that follow at once.

        A server stops at the tokenizer's end token, where it is among these. Where there is no control token, as in
        templates whose next turn ends the answer, it is the end token alone.
        """
        found = re.search(f"(?:{self.masks.any.pattern})+", tail)
        if found is None:
            return self.eos
        run = found[0]
        return tail[: found.start()] + (run[: run.index(self.eos) + len(self.eos)] if self.eos in run else run)

    def _shows_thoughts(self) -> bool:
        """Whether the template has a place for a thought, with one of the variables."""
        turns = self._with_system([Turn("user", USER), Turn("assistant", ANSWER, reasoning=THOUGHT)])
        for variables in VARIABLES:
            try:
                if THOUGHT in self._render(turns, (), False, variables):
                    return True
            except UserError:
                continue
        return False

    def last_control(self, text: str, start: int, end: int) -> int:
        """The place of the last control token in text[start:end]; 0 where it has none."""
        return max((found.start() for found in self.masks.any.finditer(text, start, end)), default=0)

    def control_at_end(self, text: str) -> str:
        """The control token with which `text` ends; nothing where it ends otherwise."""
        if not text.endswith(tuple(self.control)):
            return ""
        return max((token for token in self.control if text.endswith(token)), key=len)

    def _wants_arguments_as_text(self) -> bool:
        """Whether the template writes the arguments of a tool call as Python writes them, unless it gets JSON."""
        call = {"name": "f", "arguments": {USER: ANSWER}}
        turns = [Turn("user", USER), Turn("assistant", "", tool_calls=(call,))]
        try:
            return f"'{USER}'" in self._render(turns, (), False, self.variables)
        except UserError:
            return False

    def _marks_of_a_call(self) -> list[str]:
        """The control tokens that the template writes around a tool call, and not in an answer without one."""
        call = {"name": "f", "arguments": {}}
        turns = [[Turn("user", USER), Turn("assistant", ANSWER)]]
        turns.append([turns[0][0], Turn("assistant", "", tool_calls=(call,))])
        try:
            plain, with_call = (self._render(each, (), False, self.variables) for each in turns)
        except UserError:
            return []
        return [token for token in self.control if token in with_call and token not in plain]

    @property
    def stop_token(self) -> int:
        """The id of the token with which a trained answer ends."""
        return int(self.tokenizer(self.end, add_special_tokens=False)["input_ids"][-1])

    def stop_tokens(self, config: GenerationConfig | None) -> frozenset[int]:
        """The ids of the tokens with which an answer ends: the one with which every trained answer ends, the
        tokenizer's end token, and those of the model's generation_config.json, with which a server ends an answer."""
        found = config.eos_token_id if config is not None else None
        others = found if isinstance(found, list) else [] if found is None else [found]
        return frozenset({self.stop_token, int(self.tokenizer.eos_token_id), *map(int, others)})

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns, behind the recipe's system turn where they have none of their own."""
        own = not self.system_prompt or (turns and turns[0].role == "system")
        return [*([] if own else [Turn("system", self.system_prompt)]), *turns]

    def _prepared(self, row: Row) -> Row:
        """The row as the template gets it: with the recipe's system turn, the structure in its answers read, and a mask
        for each control token that is only text."""
        turns = list(row.turns)
        if self.parse:
            calls = "<tool_call>" in self.control
            turns = [
                read_markup(turn, self.shows_thoughts, calls) if turn.role == "assistant" else turn for turn in turns
            ]
            for turn in turns:
                if turn.role == "assistant" and (marks := [mark for mark in self.call_marks if mark in turn.content]):
                    raise UserError(
                        f"an answer has {marks[0]!r} in its text, with which this model calls tools; put the call into "
                        "the field tool_calls, or set data.assistant_markup: plain to learn it as plain text"
                    )
        in_content = self.parse and not self.shows_thoughts and "<think>" in self.control
        masked = self.masks.in_row(Row(row.number, tuple(turns), row.tools), in_content)
        return Row(row.number, tuple(self._with_system(masked.turns)), masked.tools)

    def prompt(self, row: Row) -> str:
        """What a server sends to have the row's last answer generated.

        The variables are those that fit this answer; where the template cannot show it, they are those of a plain one.
        """
        row = self._prepared(row)
        for variables in self._candidates(row):
            try:
                return self._turn(row, len(row.turns) - 1, variables)[0]
            except UserError:
                continue
        return self._render(row.turns[:-1], row.tools, True, self.variables)

    def own_rendering(self, row: Row) -> str:
        """What the template writes of the row as it is, with the recipe's system turn and no mask. Raises UserError."""
        return self._render(self._with_system(row.turns), row.tools, False, self.variables)

    def renderings_of(self, rows: Sequence[Row]) -> list[list[Rendering] | UserError]:
        """What the model reads and learns of each row; an error stands in the place of a row that cannot be shown.

        The rows of a single question are rendered all at once, which takes a third of the time.
        """
        simple: dict[int, Row] = {}
        for i, row in enumerate(rows):
            try:
                if self._is_one_question(row):
                    simple[i] = self._prepared(row)
            except UserError:
                continue
        texts = dict(zip(simple, self._render_all([row.turns for row in simple.values()]), strict=True))
        found: list[list[Rendering] | UserError] = []
        for i, row in enumerate(rows):
            one = self._of_one_question(simple[i], texts[i]) if i in simple else None
            try:
                found.append([one] if one is not None else self.renderings(row))
            except UserError as error:
                found.append(error)
        return found

    def _is_one_question(self, row: Row) -> bool:
        return len(row.turns) == 2 and not row.tools and not row.turns[1].tool_calls

    def renderings(self, row: Row) -> list[Rendering]:
        """What the model reads and learns of the row's conversation.

        It is one text, unless the template writes an answer otherwise once later turns are there: then there are as
        many as it takes for each answer to stand behind the text that a server sends for it. Raises UserError when the
        template does not show what the row says, or writes an answer where no server asks for it.
        """
        row = self._prepared(row)
        problem = None
        for variables in self._candidates(row):
            try:
                return self._all(row, variables)
            except UserError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _candidates(self, row: Row) -> list[Mapping[str, Any]]:
        others = VARIABLES if any(turn.reasoning for turn in row.turns) else VARIABLES[:3]
        return [self.variables, *(each for each in others if each != self.variables)]

    def _of_one_question(self, row: Row, whole: str | None) -> Rendering | None:
        """The rendering of a single question and answer; None where it takes more than a look at the text `whole`."""
        user, answer = row.turns[-2:]
        prompt = f"{self.before}{user.content}{self.after}"
        if whole is None or not whole.startswith(prompt):  # the template changes what the user says: it may strip it
            return None
        try:
            learned = self._learned(prompt, whole, answer)
        except UserError:
            return None
        return Rendering(prompt + learned, ((len(prompt), len(prompt) + len(learned), answer.weight),))

    def _all(self, row: Row, variables: Mapping[str, Any]) -> list[Rendering]:
        found: list[Rendering] = []
        for place in reversed([place for place, turn in enumerate(row.turns) if turn.weight]):
            prompt, learned = self._turn(row, place, variables)
            text, span = prompt + learned, (len(prompt), len(prompt) + len(learned), row.turns[place].weight)
            for i, later in enumerate(found):
                if later.text.startswith(text):
                    found[i] = replace(later, spans=(span, *later.spans))
                    break
            else:
                found.append(Rendering(text, (span,)))
        return found[::-1]

    def _turn(self, row: Row, place: int, variables: Mapping[str, Any]) -> tuple[str, str]:
        """The prompt of the assistant's turn at `place`, and what the model has to generate behind it."""
        prompt = self._render(row.turns[:place], row.tools, True, variables)
        whole = self._render(row.turns[: place + 1], row.tools, False, variables)
        self._check_shown(row.turns[:place], row.tools, prompt)
        _check_begin(prompt, whole)
        return prompt, self._learned(prompt, whole, row.turns[place])

    def _learned(self, prompt: str, whole: str, turn: Turn) -> str:
        """What of `whole`, behind the prompt, the model has to generate, up to the token at which a server stops."""
        rest = whole[len(prompt) :]
        wanted = [turn.content, turn.reasoning, *(text for call in turn.tool_calls for text in _texts(call))]
        missing = [text for text in wanted if not _shown(text, rest)]
        learned = rest.removesuffix(self.beyond) if self.ends_itself else rest + self.eos
        ended = not self.ends_itself or learned.endswith(tuple(self.control))
        if missing or not ended:
            raise UserError(
                f"the chat template does not show {(missing or [turn.content])[0].strip()[:SHOWN]!r}, but makes "
                f"{rest[: 2 * SHOWN]!r} of the answer; change the answer or the template"
            )
        return learned

    def _check_shown(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], prompt: str) -> None:
        """Raises UserError where the prompt leaves out what a turn before the answer says. Thoughts may be left out."""
        for turn in turns:
            for text in (turn.content, *(text for call in turn.tool_calls for text in _texts(call))):
                if not _shown(text, prompt):
                    raise UserError(
                        f"the chat template does not show the {turn.role}'s {text.strip()[:SHOWN]!r} in front of an "
                        f"answer, but writes {prompt[-2 * SHOWN :]!r}; change the turn or the template"
                    )
        for tool in tools:
            if not _shown(name := tool["function"]["name"], prompt):
                raise UserError(f"the chat template does not show the tool {name!r}; remove it or change the template")

    def _render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]],
        generation: bool,
        variables: Mapping[str, Any],
    ) -> str:
        for as_text in (self.arguments_as_text, not self.arguments_as_text):
            try:
                messages = [self._message(turn, as_text) for turn in turns]
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) or None,  # type: ignore[arg-type]
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **variables,
                )
                self.arguments_as_text = as_text
                return str(text)
            except Exception as error:  # the template is a program that comes with the model, and may raise anything
                if any(turn.tool_calls for turn in turns) and as_text == self.arguments_as_text:
                    continue
                raise UserError(
                    f"{self.name}: its chat template fails: {error}. Correct it; if it wants no system turn, "
                    "leave data.system_prompt empty."
                ) from error
        raise AssertionError("one of both ways returns or raises")

    def _render_all(self, conversations: Sequence[Sequence[Turn]]) -> list[str | None]:
        """The text of each conversation; None for all where the template fails for one."""
        messages = [[self._message(turn, False) for turn in turns] for turns in conversations]
        try:
            texts: Any = self.tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, **self.variables
            )
        except Exception:  # the caller asks for one after the other, and names the one that fails
            return [None] * len(messages)
        return list(texts)

    def _message(self, turn: Turn, arguments_as_text: bool) -> dict[str, Any]:
        """The turn as templates take it."""
        content: Any = [{"type": "text", "text": turn.content}] if self.as_parts else turn.content
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning  # transformers gives it other names too
        if turn.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"], ensure_ascii=False)
                        if arguments_as_text
                        else call["arguments"],
                    },
                    **({"id": call["id"]} if call.get("id") else {}),
                }
                for call in turn.tool_calls
            ]
        if turn.role == "tool":
            message |= {"name": turn.name} if turn.name else {}
            message |= {"tool_call_id": turn.call_id} if turn.call_id else {}
        return message


def _begin_of_texts(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of a text, as a server's tokenizer does: most often <s>, or none."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
    return list(whole[: next(places, 0)])


def on_day(template: str, today: date) -> str:
    """The chat template with the day in the place of each call of strftime_now, which would give that of the call."""

    def write(found: re.Match[str]) -> str:
        return json.dumps(today.strftime(found[2]), ensure_ascii=False)

    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", write, template)


def parting(one: str, other: str) -> int:
    """The place at which two texts part: how many characters they have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _check_begin(prompt: str, whole: str) -> None:
    """Raises UserError, with both texts at the place where they part, when `whole` does not begin with the prompt."""
    if not whole.startswith(prompt):
        at = parting(prompt, whole)
        shown = slice(max(0, at - SHOWN), at + SHOWN)
        raise UserError(
            f"its chat template has the model answer behind {prompt[shown]!r}, but writes the answer "
            f"behind {whole[shown]!r}, so it would be learned where nobody asks for it. Correct the template."
        )


def _texts(value: Any) -> list[str]:
    """The texts of a tool call: its name, and all texts in its arguments."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key != "id" for text in _texts(inner)]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list) else []


def _shown(text: str, rendering: str) -> bool:
    """Whether a rendering shows a text, as it is or as JSON writes it."""
    text = text.strip()
    return text in rendering or json.dumps(text, ensure_ascii=False)[1:-1] in rendering


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that can begin or end a turn.

    They are all special tokens, and those of the other added tokens that the chat template writes and that are more
    than white space. The tokens that stand for a single byte, as <0x0A> does, are none.
    """
    template = str(tokenizer.chat_template)
    added = [token for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1]
    found = [token.content for token in added if token.special or token.content in template]
    return [token for token in found if not BYTE.fullmatch(token)]


def check_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the chat template writes control tokens that the tokenizer does not have.

    They would be read as the characters with which they are written. A new token needs an embedding that is trained,
    which adapters of linear layers do not do.
    """
    written = set(re.findall(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_turn>", str(tokenizer.chat_template)))
    if missing := sorted(written - set(tokenizer.get_vocab())):
        raise UserError(
            f"data.chat_template: the tokenizer of {tokenizer.name_or_path} has no token {', '.join(missing[:3])}. "
            "Name a template that writes only tokens of this model, for example that of its Instruct model."
        )
