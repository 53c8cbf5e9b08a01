"""Uploads and downloads, with a stand-in for the hub's client and with the real client against a small server."""

import base64
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from library.errors import SettingsError
from library.training.hub import HubState, HubUploads, download_state
from library.training.output_settings import HubSettings
from library.training.state import StateError


class Api:
    """Notes what it is asked for."""

    def __init__(self, fails: str | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.fails = fails
        self.go_on = threading.Event()
        self.go_on.set()

    def _note(self, name: str, values: dict) -> None:
        self.go_on.wait(10)
        if self.fails == name:
            raise RuntimeError("401 Unauthorized: token hf_secret is not valid\nmore lines")
        self.calls.append((name, values))

    def create_repo(self, **values: object) -> None:
        self._note("create_repo", values)

    def upload_file(self, **values: object) -> None:
        self._note("upload_file", values)

    def upload_folder(self, **values: object) -> None:
        self._note("upload_folder", values)


def settings(**more: object) -> HubSettings:
    values = {"huggingface_repo_id": "me/lora", "huggingface_token": "hf_secret", **more}
    return HubSettings(**{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


def test_without_a_repository_nothing_is_asked_for(tmp_path: Path) -> None:
    api = Api()
    uploads = HubUploads(settings(huggingface_repo_id=None), api)
    uploads.file(tmp_path / "a")
    uploads.state(tmp_path)
    uploads.finish()
    assert api.calls == []


def test_path_in_repo_left_out_is_the_top(tmp_path: Path) -> None:
    # defect 46: without --huggingface_path_in_repo every upload failed.
    api = Api()
    uploads = HubUploads(settings(), api)
    uploads.file(tmp_path / "my.safetensors")
    uploads.state(tmp_path / "my-state")  # states only with --save_state_to_huggingface
    (name, made), (upload, where) = api.calls
    assert (name, made["private"], made["repo_type"], made["exist_ok"]) == ("create_repo", True, "model", True)
    assert (upload, where["path_in_repo"], where["repo_id"]) == ("upload_file", "my.safetensors", "me/lora")


def test_all_settings_are_followed(tmp_path: Path) -> None:
    api = Api()
    values = {
        "huggingface_path_in_repo": "/a/b/",
        "huggingface_repo_type": "dataset",
        "save_state_to_huggingface": True,
    }
    uploads = HubUploads(settings(huggingface_repo_visibility="public", **values), api)
    uploads.state(tmp_path / "my-state")
    (_, made), (upload, where) = api.calls
    assert (made["private"], made["repo_type"]) == (False, "dataset")
    assert (upload, where["path_in_repo"], where["repo_type"]) == ("upload_folder", "a/b/my-state", "dataset")
    assert where["folder_path"] == str(tmp_path / "my-state")


@pytest.mark.parametrize("fails", ["create_repo", "upload_file"])
@pytest.mark.parametrize("in_background", [False, True])
def test_failures_are_warnings_without_the_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: str, in_background: bool
) -> None:
    uploads = HubUploads(settings(async_upload=in_background), Api(fails))
    uploads.file(tmp_path / "my.safetensors")
    uploads.finish()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "me/lora" in warnings[0]
    assert "401 Unauthorized: token *** is not valid" in warnings[0]
    assert "hf_secret" not in caplog.text


def test_async_uploads_go_on_beside_training_and_the_last_is_waited_for(tmp_path: Path) -> None:
    api = Api()
    uploads = HubUploads(settings(async_upload=True), api)
    api.go_on.clear()
    uploads.file(tmp_path / "1")
    uploads.file(tmp_path / "2")
    assert [name for name, _ in api.calls] == ["create_repo"]  # training has gone on meanwhile
    threading.Timer(0.1, api.go_on.set).start()
    uploads.file(tmp_path / "last", wait=True)
    assert [values.get("path_in_repo") for _, values in api.calls] == [None, "1", "2", "last"]
    uploads.file(tmp_path / "after")
    uploads.finish()
    assert api.calls[-1][1]["path_in_repo"] == "after"


@pytest.mark.parametrize("wrong", ["lora", "a/b/c", "/x", "a b/c", "猫/x", ""])
def test_repo_ids_are_checked_at_once(wrong: str) -> None:
    with pytest.raises(SettingsError, match="--huggingface_repo_id"):
        settings(huggingface_repo_id=wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/lora/my-state", HubState("me/lora", "my-state", None, "model")),
        ("me/lora/a/b/my-state:v1", HubState("me/lora", "a/b/my-state", "v1", "model")),
        ("me/lora/s:v1:dataset", HubState("me/lora", "s", "v1", "dataset")),
        ("me/lora/s::dataset", HubState("me/lora", "s", None, "dataset")),
    ],
)
def test_specs(text: str, expected: HubState) -> None:
    assert HubState.parse(text, None) == expected


@pytest.mark.parametrize(
    "text", ["me/lora", "latest", "me/lora/", "me/lora/s:a:model:b", "me/lora/../x", "me/l/s:a:modle"]
)
def test_wrong_specs_are_refused_before_anything_is_asked_for(text: str) -> None:
    with pytest.raises(SettingsError, match="--resume"):
        download_state(text, settings())


def test_a_download_that_fails_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise OSError("404 for token hf_secret")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StateError, match=r"me/lora/s cannot be downloaded \(404 for token \*\*\*\)"):
        download_state("me/lora/s", settings())


def test_a_download_gives_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = {}

    def download(repo_id: str, **values: object) -> str:
        asked.update(values, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StateError, match="no folder a/s in me/lora"):
        download_state("me/lora/a/s:v1", settings())
    (tmp_path / "a" / "s").mkdir(parents=True)
    assert download_state("me/lora/a/s:v1", settings()) == tmp_path / "a" / "s"
    assert (asked["repo_id"], asked["revision"], asked["allow_patterns"]) == ("me/lora", "v1", "a/s/*")


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as creating a repository and committing small files need."""

    requests: list[tuple[str, bytes, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, body, self.headers["Authorization"]))
        answer: dict = {}
        if self.path.endswith("/repos/create"):
            answer = {"url": "https://huggingface.co/me/lora", "id": "1", "name": "me/lora"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}
        elif "/commit/" in self.path:
            answer = {"success": True, "commitUrl": "https://huggingface.co/me/lora/commit/abc", "commitOid": "abc"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list]]:
    requests: list = []
    handler = type("Handler", (_Hub,), {"requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def test_the_real_client_sends_files_and_states(
    hub: tuple[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    address, requests = hub
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(constants, name, name == "HF_HUB_DISABLE_XET", raising=False)
    caplog.set_level(logging.INFO)
    (tmp_path / "my.txt").write_text("lora")
    (tmp_path / "my-state").mkdir()
    (tmp_path / "my-state" / "state.json").write_text("{}")
    api = huggingface_hub.HfApi(endpoint=address, token="hf_secret")
    uploads = HubUploads(settings(save_state_to_huggingface=True, huggingface_path_in_repo="runs"), api)
    uploads.file(tmp_path / "my.txt")
    uploads.state(tmp_path / "my-state")
    assert "Uploaded my.txt to me/lora" in caplog.text, caplog.text
    assert "Uploaded my-state to me/lora" in caplog.text, caplog.text
    commits = [body for path, body, _ in requests if "/commit/" in path]
    sent = [json.loads(line)["value"] for body in commits for line in body.splitlines() if b'"file"' in line]
    assert {one["path"]: base64.b64decode(one["content"]).decode() for one in sent} == {
        "runs/my.txt": "lora",
        "runs/my-state/state.json": "{}",
    }
    made = json.loads(requests[0][1])
    assert made.get("visibility", made.get("private")) in ("private", True)  # older and newer clients
    assert {token for _, _, token in requests} == {"Bearer hf_secret"}
