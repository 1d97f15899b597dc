"""The page that renews itself: what it asks, what it keeps, and what it takes up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.synthetic import TOKEN_PPO, write_run
from trl_steppo.cli import main
from trl_steppo.errors import ConfigurationError
from trl_steppo.report import page as page_module
from trl_steppo.report import runs as runs_module
from trl_steppo.report.files import read_json
from trl_steppo.report.live import LivePage, LiveServer


@pytest.fixture
def serve() -> Iterator[object]:
    """Starts a server of some places; its page looks at the files whenever it is asked."""
    servers = []

    def start(*places: Path | str) -> LiveServer:
        server = LiveServer(LivePage(places, {}, look_interval_s=0.0, rest=0.0), port=0)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server: LiveServer, path: str = "", **headers: str) -> str:
    request = urllib.request.Request(server.url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@pytest.fixture
def plain(monkeypatch):
    """Pages without charts, which take seconds to draw."""
    monkeypatch.setattr(page_module, "charts_of", lambda methods: [])


def cut(run: Path, size: int) -> None:
    """A file that is being written."""
    file = run / "trainer_state.json"
    file.write_bytes(file.read_bytes()[:size])


def test_the_page_is_made_again_only_where_something_changed(tmp_path, serve, plain, monkeypatch):
    run = write_run(tmp_path / "runs" / "a", episodes=0, updates=2)
    server = serve(tmp_path / "runs")
    made = []
    monkeypatch.setattr("trl_steppo.report.live.page_of", lambda content, version: made.append(version) or "page")
    versions = [get(server, "version") for _ in range(2)]
    assert [get(server), get(server)] == ["page", "page"]
    assert made == [versions[0]] == [versions[1]]
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"].append({"step": 3, "episode": 24, "env/exact_match": 0.75})
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert get(server, "version") != versions[0]
    get(server)
    assert len(made) == 2


def test_a_page_reads_each_run_once(tmp_path, serve, plain, monkeypatch):
    for name in "ab":
        write_run(tmp_path / name, episodes=0, updates=2)
    read = []
    monkeypatch.setattr(runs_module, "read_json", lambda file: read.append(file) or read_json(file))
    assert "Report of 2 runs" in get(serve(tmp_path))
    assert len(read) == len(set(read)) == 4, "settings and state of two runs"


def test_runs_that_appear_later_are_taken_up(tmp_path, serve, plain):
    server = serve(tmp_path / "runs", str(tmp_path / "more" / "*"))
    assert "Waiting for runs" in get(server)
    write_run(tmp_path / "runs" / "a" / "seed_1", episodes=0, updates=2)
    assert "Report of 1 run<" in get(server)
    write_run(tmp_path / "more" / "b", episodes=0, updates=2, **TOKEN_PPO)
    assert "<title>StepPO · token PPO" in get(server)


@pytest.mark.parametrize("size", [0, 40, 200])
def test_a_half_written_file_costs_nothing(tmp_path, serve, plain, size):
    runs = [write_run(tmp_path / name, episodes=0, updates=2, seed=seed) for seed, name in enumerate("ab", 1)]
    server = serve(*runs)
    assert "Report of 2 runs" in get(server)
    whole = (runs[0] / "trainer_state.json").read_bytes()
    cut(runs[0], size)
    assert "Report of 1 run<" in get(server)
    cut(runs[1], size)
    assert "Waiting for runs" in get(server)
    (runs[0] / "trainer_state.json").write_bytes(whole)
    assert "Report of 1 run<" in get(server)


def test_where_no_page_can_be_made_the_last_one_stays(tmp_path, serve, plain, monkeypatch, capsys):
    run = write_run(tmp_path / "a", episodes=0, updates=2)
    server = serve(run)
    before = get(server)
    monkeypatch.setattr("trl_steppo.report.live.page_of", lambda content, version: 1 / 0)
    (run / "metrics.jsonl").write_text("{}\n")
    after = get(server)
    version = get(server, "version")
    assert after != before
    assert f'data-version="{version}"' in after, "so it is not loaded again and again"
    assert "Report of 1 run" in after
    assert "the page could not be made: ZeroDivisionError" in capsys.readouterr().err


def test_only_this_machines_browsers_are_answered(tmp_path, serve):
    server = serve(tmp_path)
    assert server.server_address[0] == "127.0.0.1"
    assert "Waiting for runs" in get(server, Host=f"localhost:{server.server_port}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(server, Host="elsewhere.example")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server, "../etc/passwd")


def test_a_taken_port_is_named(tmp_path, serve, capsys):
    taken = serve(tmp_path).server_port
    with pytest.raises(ConfigurationError, match=rf"--port {taken}: .*; name another"):
        LiveServer(LivePage([tmp_path], {}), port=taken)
    assert main(["report", str(tmp_path), "--port", "1"]) == 1
    assert "--port has an effect with --watch only" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--watch", "--output", "a.html"]) == 1
    assert "--output a.html has no effect with --watch" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_at_once(tmp_path):
    words = [sys.executable, "-m", "trl_steppo.cli", "report", "--watch", str(tmp_path / "later"), "--port", "0"]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began it with `&`
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert process.stdout is not None
    line = process.stdout.readline()
    url = line.split()[2]
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert b"Waiting for runs" in answer.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
