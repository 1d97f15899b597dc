"""The evaluation script, in this process and against a server of the same protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from tests.examples.scripts import load_script


@pytest.fixture
def script():
    return load_script("evaluate_hotpotqa")


def make_args(script, directory, **settings):
    common = {"model_name_or_path": "mini_wiki", "datasets": ["mini_wiki"], "output_dir": str(directory)}
    return script.Arguments(**{**common, "max_questions": 4, "response_length": 40, "num_passages": 1, **settings})


def read_lines(directory):
    return [json.loads(line) for line in (directory / "mini_wiki.jsonl").read_text().splitlines()]


def test_questions_that_were_answered_are_not_played_again(script, tmp_path, monkeypatch):
    script.main(make_args(script, tmp_path / "whole"))
    whole = read_lines(tmp_path / "whole")
    assert len({line["id"] for line in whole}) == 4
    assert all(set(script.SCORES) < set(line) and line["steps"] >= 1 for line in whole)

    script.main(make_args(script, tmp_path / "parts", max_questions=2))
    played = []
    play = script.LocalModel.play
    monkeypatch.setattr(
        script.LocalModel, "play", lambda self, rows, make: played.extend(rows) or play(self, rows, make)
    )
    script.main(make_args(script, tmp_path / "parts", batch_size=1))
    assert [row["id"] for row in played] == [line["id"] for line in whole[2:]]
    assert read_lines(tmp_path / "parts") == whole
    for name in ("whole", "parts"):
        (summary,) = json.loads((tmp_path / name / "scores.json").read_text()).values()
        assert summary["questions"] == 4
        assert summary["f1"] == pytest.approx(sum(line["f1"] for line in whole) / 4)


def test_other_settings_are_refused(script, tmp_path):
    script.check_settings(make_args(script, tmp_path))
    script.check_settings(make_args(script, tmp_path, max_questions=9, batch_size=1))
    with pytest.raises(SystemExit, match="other settings"):
        script.check_settings(make_args(script, tmp_path, num_passages=2))


def test_the_chat_template_gets_its_arguments(script, tmp_path):
    asked = make_args(script, tmp_path, chat_template_kwargs='{"enable_thinking": true}')
    assert script.read_template_kwargs(asked) == {"enable_thinking": True}
    assert script.LocalModel(asked).template_kwargs == {"enable_thinking": True}
    for wrong in ("enable_thinking", "[1]"):
        with pytest.raises(SystemExit, match="JSON"):
            script.read_template_kwargs(make_args(script, tmp_path, chat_template_kwargs=wrong))


# -- a server ---------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Searches, makes a mistake, then answers what it was told is right; or writes its calls as text."""

    asked: ClassVar[list] = []
    as_text = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.asked.append(body)
        step = sum(message["role"] == "assistant" for message in body["messages"])
        calls = [("search", '{"query": "Paris"}'), ("search", "{"), ("answer", '{"text": "nowhere"}')][step]
        if Handler.as_text:
            text = f'<tool_call>{{"name": "{calls[0]}", "arguments": {calls[1]}}}</tool_call>'
            message = {"role": "assistant", "content": text}
        else:
            call = {"id": f"c{step}", "type": "function", "function": {"name": calls[0], "arguments": calls[1]}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args): ...


@pytest.fixture
def server():
    pytest.importorskip("openai")
    Handler.asked, Handler.as_text = [], False
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("as_text", [False, True])
def test_a_server_plays_the_same_episodes(script, tmp_path, server, as_text):
    Handler.as_text = as_text
    kwargs = None if as_text else '{"enable_thinking": true}'
    args = make_args(script, tmp_path, base_url=server, model_name_or_path="served", chat_template_kwargs=kwargs)
    args.max_questions = 2
    script.main(args)
    for line in read_lines(tmp_path):
        assert (line["steps"], line["tool_errors"], line["answered"], line["exact_match"]) == (3, 1, 1.0, 0.0)
    last = max(Handler.asked, key=lambda body: len(body["messages"]))
    assert (last["temperature"], last["max_tokens"], last["model"]) == (0.0, 40, "served")
    assert last.get("chat_template_kwargs") == (None if as_text else {"enable_thinking": True})
    assert [tool["function"]["name"] for tool in last["tools"]] == ["answer", "search"]
    roles = ["system", "user", *["assistant", "user" if as_text else "tool"] * 2]
    assert [message["role"] for message in last["messages"]] == roles
    assert "malformed tool call" in last["messages"][-1]["content"]


def test_a_question_that_the_server_failed_is_asked_again(script, tmp_path, server):
    closed = "http://127.0.0.1:9/v1"
    args = make_args(script, tmp_path, base_url=closed, model_name_or_path="served", max_questions=1)
    with pytest.raises(SystemExit, match="every question failed"):
        script.main(args)
    assert "error" in read_lines(tmp_path)[0]
    (tmp_path / "settings.json").unlink()
    args.base_url = server
    script.main(args)
    assert "error" not in read_lines(tmp_path)[1]
