"""Models of a hub, and a hub that does not hand them out: one line, at once. The hub is a small server on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from transformers.utils.hub import hf_api

from avsr.config import EncoderConfig, LLMConfig
from avsr.errors import UserError
from avsr.models import sources
from avsr.models.llm import load_llm
from avsr.models.wavlm import WavLMEncoder
from avsr.models.whisper import Whisper
from avsr.tools.analysis.inputs import ModelOptions, load_text_subject
from avsr.tools.estimate.outlines import outline_encoder, outline_llm

pytestmark = pytest.mark.integration

KEY = "model.llm.name"
NAME, COMMIT = "somebody/model", "1" * 40


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves the files of ``folder`` as the model NAME, or answers everything with ``status`` and ``headers``."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.status, self.headers = folder, 200, {}
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        file = hub.folder / path.rpartition("/")[2]
        if hub.status != 200:
            self.answer(hub.status, hub.headers)
        elif path.startswith(f"/{NAME}/resolve/") and file.is_file():
            self.answer(200, {"ETag": f'"{_digest(file)}"'}, file.read_bytes())
        elif path == f"/api/models/{NAME}":
            self.answer(200, {}, json.dumps({"id": NAME, "sha": COMMIT, "siblings": [], "tags": []}).encode())
        elif path == f"/api/models/{NAME}/tree/main":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
                for file in hub.folder.iterdir()
            ]
            self.answer(200, {}, json.dumps(tree).encode())
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound" if NAME in path else "RepoNotFound"})

    def answer(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``at(address)`` is where the hub is; its cache is empty."""

    def move(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hf_api(), "endpoint", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    return move


@pytest.fixture
def hub(tiny_llm: Path, at: Callable[[str], None]) -> Iterator[Hub]:
    found = Hub(tiny_llm)
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    at(f"http://127.0.0.1:{found.server_port}")
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


READERS = {
    "model.llm.name": lambda: load_llm(LLMConfig(NAME)),
    "model.audio.encoder.name": lambda: Whisper(EncoderConfig("whisper", NAME)),
    "model.audio.encoder.name, WavLM": lambda: WavLMEncoder(EncoderConfig("wavlm", NAME)),
    "": lambda: load_text_subject(NAME, ["a text"], ModelOptions(), torch.device("cpu")),
}
NOWHERE = "http://127.0.0.1:1"  # nobody listens
WAYS = ("hf auth login", f"hf download {NAME} --local-dir FOLDER", "HF_HUB_OFFLINE=1", "package:")


@pytest.fixture
def refusal(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The message of what must fail at once, with nothing else shown."""

    def run(read: Callable[[], Any], key: str = KEY) -> str:
        capfd.readouterr()
        began = time.monotonic()
        with pytest.raises(UserError) as caught:
            read()
        assert time.monotonic() - began < 6
        assert capfd.readouterr() == ("", "")
        message = str(caught.value)
        assert message.startswith(f"{key}: {NAME} " if key else f"{NAME} ") and "\n" not in message
        return message

    return run


@pytest.mark.parametrize("key", READERS)
def test_every_reader_ends_at_once_without_a_hub(
    at: Callable[[str], None], refusal: Callable[..., str], key: str
) -> None:
    at(NOWHERE)
    key, read = key.partition(",")[0], READERS[key]
    message = refusal(read, key)
    assert f"{NOWHERE} cannot be reached" in message and all(way in message for way in WAYS)
    assert (f"{key}=FOLDER" if key else "name FOLDER in its place") in message


@pytest.mark.parametrize("listening", [True, False])
def test_a_hub_that_never_answers_is_not_waited_for(
    at: Callable[[str], None], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, listening: bool
) -> None:
    """As with a firewall that drops packets; or with a name resolution that hangs, which has no timeout."""
    monkeypatch.setattr(sources, "_PATIENCE", 1.0)
    if not listening:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(20))
    with socket.create_server(("127.0.0.1", 0)) as server:
        at(f"http://127.0.0.1:{server.getsockname()[1]}")
        message = refusal(READERS[KEY])
    assert ("does not answer" in message or "timed out" in message) and all(way in message for way in WAYS)


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, ["its terms must be accepted at", f"/{NAME}", "hf auth login"]),
        (401, {"X-Error-Code": "GatedRepo"}, ["its terms must be accepted at", "hf auth login"]),
        (404, {"X-Error-Code": "RepoNotFound"}, ["knows no such model", "hf auth login"]),
        (401, {}, ["refuses access (401)", "hf auth login"]),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, ["refuses access (401)"]),
        (503, {}, ["answers with the status 503", *WAYS]),
    ],
)
def test_a_hub_that_refuses_is_quoted(
    hub: Hub, refusal: Callable[..., str], status: int, headers: dict[str, str], expected: list[str]
) -> None:
    hub.status, hub.headers = status, headers
    message = refusal(READERS[KEY])
    assert all(part in message for part in expected)
    assert ("Three ways out" in message) == (status == 503)


def test_a_hub_that_answers_is_read_and_its_cache_when_it_does_not(
    hub: Hub,
    at: Callable[[str], None],
    tiny_llm: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def weights() -> list[torch.Tensor]:
        loaded = load_llm(LLMConfig(NAME))
        assert loaded.tokenize("abc") == [5, 6, 7]
        return list(loaded.model.parameters())

    expected = list(load_llm(LLMConfig(str(tiny_llm))).model.parameters())
    assert all(map(torch.equal, weights(), expected))
    assert f"/{NAME}/resolve/{COMMIT}/model.safetensors" in hub.asked and not caplog.records
    hub.status, hub.headers = 403, {"X-Error-Code": "GatedRepo"}
    assert all(map(torch.equal, weights(), expected))
    at(NOWHERE)
    assert all(map(torch.equal, weights(), expected))
    shown = [record.getMessage() for record in caplog.records]
    assert len(shown) == 2 and all("read from the hub's cache" in line for line in shown)
    caplog.clear()
    hub.asked.clear()
    at(f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert all(map(torch.equal, weights(), expected))
    assert not hub.asked and not caplog.records


def test_a_model_of_which_the_cache_has_the_config_alone(
    hub: Hub, at: Callable[[str], None], refusal: Callable[..., str], tmp_path: Path
) -> None:
    """As ``avsr plan`` leaves it."""
    hf_hub_download(NAME, "config.json")
    at(NOWHERE)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"model.llm.name: cannot load '{NAME}'") as caught:
        load_llm(LLMConfig(NAME))
    assert time.monotonic() - began < 6 and "\n" not in str(caught.value)


def test_offline_asks_nobody(hub: Hub, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(READERS[KEY])
    assert "HF_HUB_OFFLINE is set" in message and all(way in message for way in WAYS)
    assert not hub.asked


def test_a_plan_reads_no_weights(hub: Hub, tiny_llm: Path, tiny_whisper: Path, tiny_wavlm: Path) -> None:
    for kind, folder in (("whisper", tiny_whisper), ("wavlm", tiny_wavlm)):
        hub.folder = folder
        found = outline_encoder(EncoderConfig(kind, NAME), "audio")
        assert found == outline_encoder(EncoderConfig(kind, str(folder)), "audio") and not found.published
        shutil.rmtree(constants.HF_HUB_CACHE)  # the next model has the same name
    hub.folder = tiny_llm
    there, here = outline_llm(LLMConfig(NAME)), outline_llm(LLMConfig(str(tiny_llm)))
    assert there.count("a text") == here.count("a text") and not there.published
    assert [p.shape for p in there.model.parameters()] == [p.shape for p in here.model.parameters()]
    assert not any(path.endswith(".safetensors") for path in hub.asked)
