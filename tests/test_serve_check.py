"""The check of a server asks it as a client does, and finds an answer that is not the evaluation's."""

import importlib.util
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from data.sums import SYSTEM_PROMPT
from eval.serve_check import NEEDED, chat, main
from loop.recipe import ROOT
from tests.serving import serving
from tests.test_export import LINEAR, write_run

asked: list[dict[str, Any]] = []


class StandIn(BaseHTTPRequestHandler):
    """Speaks the OpenAI chat protocol and answers everything with the same words."""

    def do_POST(self) -> None:
        asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": "no sum"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


def stand_in(folder: Path, log: Path) -> AbstractContextManager[str]:
    return serving(HTTPServer(("127.0.0.1", 0), StandIn))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(ROOT / "data" / "tiny_base", tmp_path / "run", LINEAR)


def test_it_asks_greedily_through_the_chat_protocol(tmp_path: Path) -> None:
    asked.clear()
    messages = [{"role": "user", "content": "8="}]
    with stand_in(tmp_path, tmp_path) as address:
        assert chat(address, "mine", messages, 5) == "no sum"
    body = {"model": "mine", "messages": messages, "temperature": 0, "max_tokens": 5}
    assert asked == [body | {"path": "/v1/chat/completions"}]


def test_another_answer_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.clear()
    monkeypatch.setattr("eval.serve_check.served", stand_in)
    monkeypatch.setattr("eval.serve_check.NEEDED", ())
    with pytest.raises(SystemExit) as leaving:
        main(["--run", str(run), "--limit", "2", "--max-new-tokens", "4"])
    assert leaving.value.code == 1
    assert "2 of 2 answers of transformers serve are not those of the evaluation" in capsys.readouterr().err
    assert asked[0]["messages"][0] == {"role": "system", "content": SYSTEM_PROMPT}


def test_what_is_missing_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.serve_check.NEEDED", ("no_such_package",))
    with pytest.raises(SystemExit) as leaving:
        main(["--run", str(run)])
    assert leaving.value.code == 2
    assert "needs no_such_package. Install them: pip install -e '.[serve]'" in capsys.readouterr().err


@pytest.mark.launches
@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in NEEDED), reason="pip install -e '.[serve]' is needed"
)
def test_transformers_serve_answers_as_the_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter is of random weights, so the answers are not those of the base model."""
    main(["--run", str(run), "--limit", "5", "--max-new-tokens", "16"])
    assert "all 5 answers of transformers serve are those of the evaluation" in capsys.readouterr().out
