"""`videomamba serve` as it is started and stopped."""

import signal
import socket
import subprocess
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import pytest

from configs.errors import UserError
from retrieval_eval.search import embed_corpus
from retrieval_eval.server.address import bind, is_loopback, open_address
from tests.retrieval_eval.serving import Client, command

Videomamba = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def index(run_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "index"
    embed_corpus(clips, out, run_folder, batch=5, device="cpu")
    return out


def test_it_says_where_it_is_and_stops_at_ctrl_c(index: Path) -> None:
    with command(str(index)) as (process, address):
        client = Client(address)
        assert address.startswith("http://127.0.0.1:")
        assert client.ask("/api/search?q=red").json["clips"] == 13
        held = HTTPConnection(client.host, client.port)  # an open connection does not keep it
        held.request("GET", "/api/health")
        assert held.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout.read() == "Stopped.\n"
        held.close()


def test_with_a_token_it_may_be_reached_from_elsewhere_and_stops_at_sigterm(index: Path) -> None:
    with command(str(index), "--host", "0.0.0.0", VIDEOMAMBA_TOKEN="correct-horse-battery") as (process, address):
        client = Client(address.replace("0.0.0.0", "127.0.0.1"))
        assert client.ask("/api/health").status == 401
        assert client.ask("/api/health", Authorization="Bearer correct-horse-battery").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_wrong_start_is_two_sentences(videomamba: Videomamba, index: Path, tmp_path: Path) -> None:
    for arguments, cause in (
        ([str(index), "--host", "0.0.0.0"], "0.0.0.0 is open to other machines, and there is no token."),
        ([str(tmp_path)], "is no folder of embeddings"),
    ):
        done = videomamba("serve", *arguments)
        assert done.returncode == 2, (arguments, done.stdout)
        assert cause in " ".join(done.stderr.split())
        assert "cure: " in done.stderr
        assert "Traceback" not in done.stderr


def test_an_address_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(UserError, match="The token has 5 characters"):
        open_address("127.0.0.1", 0, tmp_path / "token")
    with pytest.raises(UserError, match="cannot be read"):
        open_address("127.0.0.1", 0, tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 is taken by another program"):
            open_address("127.0.0.1", port, None)
    with pytest.raises(UserError, match="There is no address no"):
        bind("no.such.host.invalid", 0)


def test_which_hosts_are_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.evil", "2130706433")))
