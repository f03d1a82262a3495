"""Turns texts into token ids. A control token that a text only spells becomes the tokens of its characters."""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from data.errors import UserError
from data.markup import NAMES, RESERVED, Masks


class Encoder:
    """Tokenizes texts with a tokenizer, as they are: no token is added, and none is cut at a mask."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]) -> None:
        self.tokenizer, self.masks = tokenizer, Masks(control)
        self._names = {token: chr(NAMES + i) for i, token in enumerate(control)}
        # A tokenizer cuts a text at these tokens before anything else, so that what stands before and behind one can be
        # tokenized apart; but where a token takes the blanks before it with it, this is not so.
        known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        cut = control and not any(known[token].lstrip or known[token].single_word for token in control)
        self._before = re.compile(f"(?={self.masks.any.pattern})") if cut else None
        self._plain: Tokenizer | None = None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text. Raises UserError for a mask under a tokenizer that is written in Python."""
        # Most pieces between control tokens are the same in many texts, and are tokenized once.
        pieces = [[text] if self._before is None or RESERVED.search(text) else self._cut(text) for text in texts]
        unique = dict.fromkeys(piece for each in pieces for piece in each)
        plain = [piece for piece in unique if not RESERVED.search(piece)]
        found = dict(zip(plain, self._ids(plain), strict=True))
        found |= {piece: self._ids_of_masked(piece) for piece in unique if piece not in found}
        return [found[each[0]] if len(each) == 1 else list(chain(*map(found.__getitem__, each))) for each in pieces]

    def _cut(self, text: str) -> list[str]:
        """The text in pieces, each of which begins with a control token; the first may begin otherwise."""
        assert self._before is not None
        return [piece for piece in self._before.split(text) if piece] or [text]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        backend: Tokenizer | None = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and not getattr(self.tokenizer, "split_special_tokens", False):
            backend.no_padding()  # a call of the tokenizer sets both anew
            backend.no_truncation()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = self.tokenizer(texts, **options)["input_ids"]
        return ids

    def _ids_of_masked(self, text: str) -> list[int]:
        """Tokenizes a text with a copy of the tokenizer that knows each control token by another name.

        So the characters of a control token are characters like others to it, and all else is as in the original: how
        a text is normalized and cut, and which blanks a control token takes with it.
        """
        if self._plain is None:
            self._plain = renamed(self.tokenizer, self._names)
        named = self.masks.any.sub(lambda found: self._names[found[0]], text)
        ids: list[int] = self._plain.encode(self.masks.show(named), add_special_tokens=False).ids
        return ids


def renamed(tokenizer: PreTrainedTokenizerBase, names: dict[str, str]) -> Tokenizer:
    """Returns a copy of a tokenizer in which each token of `names` has another name, and the same id.

    Raises UserError for a tokenizer that is written in Python, because it cannot be copied so.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "a text spells a control token, and this model's tokenizer is written in Python, so that the two cannot be "
            "told apart; take it out of the text"
        )
    parts: dict[str, Any] = json.loads(backend.to_str())
    parts["post_processor"] = None
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = parts["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): place for token, place in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    return Tokenizer.from_str(json.dumps(parts))
