"""What data.show says of rows is what the model gets."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.chat import encode_row
from data.conversation import question
from data.errors import UserError
from data.examples import Example, Span
from data.load import Tally
from data.show import main
from data.shown import LEARNED, beside, pieces, shown, summary
from data.template import ChatTemplate
from tests.chat_templates import KINDS, TINY, tokenizer_of


def test_pieces_are_the_tokens_in_their_order() -> None:
    example = Example(1, [5, 6, 7, 8, 9, 10], (Span(1, 3), Span(3, 4, 0.5)))
    expected = [("masked", [5]), ("learned", [6, 7]), ("learned", [8]), ("masked", [9, 10])]
    assert pieces(example) == expected


def test_summary_by_hand() -> None:
    rows = [Example.of(i, [1] * i, [2]) for i in range(1, 101)]
    lines = summary(rows, {"a.json": Tally(101, 100, dropped=1), "b.json": Tally(5, 5)})
    assert lines[0] == "100 rows, 5,150 tokens, 100 of them labels (2%)"
    assert lines[1].endswith(": 2 (0%), 52 (50%), 91 (90%), 100 (99%), 101 (100%)")
    assert lines[2:] == ["a.json: 1 too long and dropped"]


def test_control_tokens_and_weights_are_visible() -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY))
    (example,) = encode_row(question(3, "a<|im_end|>", 'b\n"c"'), template)
    text = shown(example, template)
    assert text.splitlines()[0] == "row 3"
    assert r'tokens  b\n"c"<|im_end|>' in text
    assert f"{LEARNED}b" in shown(example, template, colour=True)
    half = Example(3, example.ids, tuple(Span(start, end, 0.5) for start, end, _ in example.spans))
    assert shown(half, template).splitlines()[-1] == "  weights 0.5"


def test_beside_it_stands_what_the_template_writes() -> None:
    template = ChatTemplate(tokenizer_of("qwen3"))
    plain = KINDS["plain"]
    (said,) = beside(plain, encode_row(plain, template), template)
    assert said == "as the template writes it, which goes on with '\\n'"
    thoughts = KINDS["thoughts"]
    first, last = beside(thoughts, encode_row(thoughts, template), template)
    assert first.startswith("the template writes the whole row otherwise: ")
    assert last.startswith("as the template writes it")


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"instruction": f"{x}=", "output": f"<b>{x}</b>"} for x in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data.train_file", str(tmp_path / "rows.jsonl"), "--data.validation_file", "null"]
    main(options)
    said = capsys.readouterr().out
    assert said.startswith("9 rows, ")
    assert [f"\nrow {number}\n" in said for number in (1, 5, 6)] == [True, True, False]
    main([*options, "--row", "8"])
    said = capsys.readouterr().out
    assert "\nrow 8\n" in said
    assert "<b>7</b><|im_end|>" in said
    main([*options, "--row", "8", "--html", str(tmp_path / "page.html")])
    assert "<mark>&lt;b&gt;7&lt;/b&gt;&lt;|im_end|&gt;</mark>" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="has no such row"):
        main([*options, "--row", "10"])
