"""A text is tokenized as the text it is, and a control token that it only spells is characters like others."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.chat import encode_row, prompt_ids
from data.conversation import Row, question
from data.errors import UserError
from data.examples import Span
from data.markup import MASKS, NAMES, Masks
from data.template import ChatTemplate
from data.tokens import Encoder
from tests.chat_templates import TINY

CONTROL = ["<s>", "</s>", "<|turn|>"]
CORPUS = [
    *("the ten men met then", "write <b>ten</b> and <s>ten</s>  twice", "one  two   three\n\nfour\n", "s < t > u"),
    *["a\n\n\nb x | /"] * 9,
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def unigram(scheme: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


def legacy_llama() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=fallback))
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "unigram, a blank at the beginning": lambda: unigram("first"),
    "unigram, a blank before each part": lambda: unigram("always"),
    "unigram, no blank": lambda: unigram("never"),
    "bpe of the first Llama": legacy_llama,
}


@cache
def trained(name: str) -> str:
    """A tokenizer without control tokens, as JSON. Training it once more would give other ids."""
    return MAKERS[name]().to_str()


def bare_of(name: str) -> Tokenizer:
    return Tokenizer.from_str(trained(name))


def wrapped(bare: Tokenizer, *, strips: bool = False) -> Any:
    """The tokenizer with control tokens; with `strips` they take the blanks around them."""
    bare.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=strips, lstrip=strips) for t in CONTROL]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_the_copy_is_the_tokenizer_for_a_text_without_control_tokens(name: str, strips: bool) -> None:
    """Each text of the copy has a mask, for a character that the tokenizer does not take for structure either."""
    tokenizer = wrapped(bare_of(name), strips=strips)
    encoder = Encoder(tokenizer, CONTROL)
    for text in (*CORPUS, "<|turn|> user\n ten  </s> <|turn|>", " a", "a ", "", "<s>", "\n<s>\n\n</s>"):
        assert encoder._ids_of_masked(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("said", ["write <s>ten</s>  twice", "<s>", "</s></s>", " <|turn|>x", "<s"])
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_spelled_is_characters(name: str, said: str) -> None:
    """The reference is a tokenizer that was never given the control tokens."""
    tokenizer, bare = wrapped(bare_of(name)), bare_of(name)
    control = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    template = ChatTemplate(tokenizer)
    (example,) = encode_row(question(1, said, said), template)
    structure = [tokenizer.decode([i]) for i in example.ids if i in control]
    assert structure == ["<s>", "<|turn|>", "</s>", "<|turn|>", "</s>"]
    assert example.prompt_ids == prompt_ids(question(1, said, ""), template)
    begin = len(example.ids) - 1 - example.ids[::-1].index(tokenizer.convert_tokens_to_ids("<|turn|>"))
    if name == "unigram, a blank at the beginning":  # it stands there only at the beginning of the whole text
        bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    assert example.ids[begin + 1 : -1] == bare.encode(f"assistant\n{said}").ids
    assert tokenizer.decode(example.label_ids[:-1]).strip() == said.strip()


@pytest.mark.parametrize("strips", [False, True])
def test_the_texts_of_a_conversation_are_one_text(strips: bool) -> None:
    """Ids of a conversation are those of its whole text, whichever tokenizer; a case of public reports."""
    for name in MAKERS:
        tokenizer = wrapped(bare_of(name), strips=strips)
        row = question(1, "one  two", "ten\n\nmen", [("the", "then")])
        (example,) = encode_row(row, ChatTemplate(tokenizer))
        messages = [{"role": turn.role, "content": turn.content} for turn in row.turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert example.ids == tokenizer(text, add_special_tokens=False)["input_ids"], name
        labels = [tokenizer.decode(example.ids[start:end]) for start, end, _ in example.spans]
        assert [label.strip() for label in labels] == ["then</s>", "ten\n\nmen</s>"], name


def test_an_answer_that_a_tokenizer_would_join_to_its_prompt() -> None:
    """The prompt ends with a line break and the answer begins with two, and the first two of the three are one token.

    A server sends the first and the model has to generate the others. In a later turn a server joins them, so that the
    two answers cannot stand in one text.
    """
    bare = byte_level()
    assert len(bare.encode("\n\n\nb").ids) == 3
    tokenizer = wrapped(bare)
    template = ChatTemplate(tokenizer)
    first, second = encode_row(question(1, "b", "two", [("a", "\n\nten")]), template)
    one = tokenizer("<s><|turn|>user\na</s><|turn|>assistant\n", add_special_tokens=False)["input_ids"]
    assert first.prompt_ids == one
    assert first.label_ids == tokenizer("\n\nten</s>", add_special_tokens=False)["input_ids"]
    text = "<s><|turn|>user\na</s><|turn|>assistant\n\n\nten</s><|turn|>user\nb</s><|turn|>assistant\n"
    assert second.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_masks_show_what_they_hide() -> None:
    masks = Masks(["<a>", "<a><b>"])
    nested = {"x<a>": ["<a><b>", 5, None, {"y": "<b>"}]}
    hidden = masks.hide(nested)
    assert hidden == {f"x{chr(MASKS)}": [chr(MASKS + 1), 5, None, {"y": "<b>"}]}
    assert masks.show(f"{chr(MASKS)} {chr(MASKS + 1)}") == "<a> <a><b>"


@pytest.mark.parametrize("said", [chr(NAMES), f"x{chr(MASKS + 2)}", chr(0x10FFFD)])
def test_a_text_with_a_mask_of_its_own_is_refused(said: str) -> None:
    with pytest.raises(UserError, match="a character for private use"):
        encode_row(question(1, said, "a"), ChatTemplate(AutoTokenizer.from_pretrained(TINY)))


def test_a_tokenizer_in_python_refuses_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", None)
    template = ChatTemplate(tokenizer)
    assert encode_row(question(1, "a", "b"), template)
    with pytest.raises(UserError, match="written in Python"):
        encode_row(question(1, "a<|im_end|>", "b"), template)


@pytest.mark.parametrize("begins", [False, True])
def test_a_plain_text_is_all_labels(begins: bool) -> None:
    """Without a chat template; where the tokenizer puts <s> in front of a text, so does a server."""
    tokenizer = wrapped(bare_of("byte level"))
    if begins:
        backend = tokenizer.backend_tokenizer
        one = [("<s>", tokenizer.bos_token_id)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=one)
    template = ChatTemplate(tokenizer)
    text = tokenizer("ten men", add_special_tokens=True)["input_ids"]
    assert (text[0] == tokenizer.bos_token_id) == begins
    (example,) = encode_row(Row(1, plain=("", "ten men")), template)
    assert example.ids == [*text, tokenizer.eos_token_id]
    assert example.spans == (Span(1, len(example.ids)),)
    (example,) = encode_row(Row(1, plain=("ten", " men")), template)
    prompt = tokenizer("ten")["input_ids"]
    assert prompt_ids(Row(1, plain=("ten", "")), template) == prompt == example.prompt_ids
    assert example.label_ids == [*tokenizer(" men", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with pytest.raises(UserError, match="the text has the control token '<s>'; give the conversation as messages"):
        encode_row(Row(1, plain=("", "<s>ten")), template)
    (example,) = encode_row(Row(1, plain=("", "<s>ten")), ChatTemplate(tokenizer, parse=False))
    assert tokenizer.decode(example.label_ids[-6:]).endswith("s>ten</s>")
    assert example.ids.count(tokenizer.bos_token_id) == begins


def test_a_row_of_one_token() -> None:
    """Only the end token behind an empty prompt could be one; a text of one token has the end token to learn."""
    tokenizer = wrapped(bare_of("byte level"))
    (example,) = encode_row(Row(1, plain=("", "a")), ChatTemplate(tokenizer))
    assert example.label_ids == [tokenizer.eos_token_id]
