"""What strangers try: each is refused before Gradio sees it, or by what it would have reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from page_folders import write_run
from PIL import Image
from starlette.testclient import TestClient

from gsoft_diffusion.app import security
from gsoft_diffusion.app.application import application
from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.security import API, Gatekeeper
from gsoft_diffusion.app.subjects import new_subject
from gsoft_diffusion.app.workspace import Workspace
from gsoft_diffusion.config.app import LOOPBACK

SITE = "http://127.0.0.1:7860"
OWN = {"origin": SITE, "sec-fetch-site": "same-origin"}
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's folder with a subject and a run in it, a secret beside it, and the application that serves it."""
    place = tmp_path_factory.mktemp("served")
    workspace = Workspace(place / "outputs")
    new_subject(workspace, "dog", "dog", "sks")
    (place / "secret.png").write_bytes(PNG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(workspace.uploads))
        app = application(workspace, Jobs(workspace))
        yield workspace, app


@pytest.fixture(scope="module")
def client(served):
    workspace, app = served
    with TestClient(Gatekeeper(app, LOOPBACK, None, str(workspace.uploads)), base_url=SITE) as client:
        yield client


@pytest.fixture(scope="module")
def locked(served):
    workspace, app = served
    with TestClient(Gatekeeper(app, None, "correct horse", str(workspace.uploads)), base_url=SITE) as client:
        yield client


def test_the_page_is_served_and_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert "gradio_config" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not [part for part in policy.split() if part.startswith("http") or part == "*"]
    assert "access-control-allow-origin" not in client.get("/", headers={"origin": "http://localhost:3000"}).headers


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/config",
            "/gradio_api/info",
            "/gradio_api/openapi.json",
            "/monitoring",
            "/docs",
            "/token",
        ),
        *(
            "/gradio_api/proxy=http://127.0.0.1:22/",
            "/gradio_api/stream/a/b",
            "/gradio_api/deep_link",
            "/gradio_api/runs",
        ),
        *(
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file//etc/passwd",
            "/gradio_api/file=pyproject.toml",
            "/file=/etc/passwd",
        ),
        *(
            "/gradio_api/file=http://127.0.0.1:22/",
            "/gradio_api/call/x",
            "/gradio_api/vibe-code",
            "/static/../x",
            "/openapi.json",
        ),
        "/gradio_api/custom_component/1/client/component/../../../../etc/passwd",
    ],
)
def test_gradios_other_routes_are_closed(client, path):
    assert client.get(path).status_code == 404


def test_gradios_file_route_gives_out_uploads_only(client, served):
    workspace, _ = served
    inside = workspace.uploads / "abc" / "a.png"
    inside.parent.mkdir(exist_ok=True)
    inside.write_bytes(PNG)
    secret = workspace.root.parent / "secret.png"
    (workspace.uploads / "abc" / "link.png").symlink_to(secret)
    subject = workspace.subjects / "x.png"
    subject.write_bytes(PNG)
    tried = [
        secret,
        subject,
        workspace.uploads / ".." / ".." / ".." / "secret.png",
        workspace.uploads / "abc" / "link.png",
    ]
    tried += [
        f"{workspace.uploads}x/a.png",
        f"{workspace.uploads}/../subjects/x.png",
        f"{workspace.uploads}/%2e%2e/subjects/x.png",
    ]
    for path in tried:
        answer = client.get(f"{API}/file={path}")
        assert answer.status_code in (403, 404), path
        assert PNG not in answer.content


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "", None, "http://127.0.0.1:7861", "http://localhost:7860"),
        *(f"{SITE}.evil.example", "http://[", "//["),
    ],
)
@pytest.mark.parametrize("path", ["queue/join", "upload", "cancel", "reset"])
def test_requests_from_other_sites_change_nothing(client, path, origin):
    headers = {} if origin is None else {"origin": origin}
    assert client.post(f"{API}/{path}", headers=headers, content=b"{}").status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_cannot_embed_pictures_or_read(client, site):
    for path in (
        "/files/picture/dog/validation/step-000001.png",
        "/gradio_api/queue/data?session_hash=x",
        "/theme.css",
    ):
        assert client.get(path, headers={"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}).status_code == 403
    answer = client.get("/", headers={"sec-fetch-site": site, "sec-fetch-mode": "navigate"})
    assert answer.status_code == 200  # a link to the page is no harm


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[::2]:7860", "[", "[x]"]
)
def test_another_name_for_this_machine_is_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860"])
def test_its_own_names_are_taken(client, host):
    assert client.get("/theme.css", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(client, method):
    assert client.request(method, f"{API}/queue/join", headers=OWN).status_code == 405


def test_large_requests_are_refused_before_and_while_they_come(client, monkeypatch):
    monkeypatch.setattr(security, "OTHER_BYTES", 1000)
    monkeypatch.setattr(security, "UPLOAD_BYTES", 2000)
    assert client.post(f"{API}/queue/join", headers=OWN, content=b"x" * 1001).status_code == 413
    assert client.post(f"{API}/upload", headers=OWN, content=b"x" * 2001).status_code == 413

    def pieces():
        for _ in range(30):
            yield b"x" * 100

    assert client.post(f"{API}/queue/join", headers=OWN, content=pieces()).status_code == 413


@pytest.mark.parametrize("length", ["x", "-1", "1e9", "9" * 5000])
def test_a_length_that_is_none_is_refused(client, length):
    answer = client.post(f"{API}/queue/join", headers=OWN | {"content-length": length}, content=b"{}")
    assert answer.status_code in (400, 422)


def test_an_upload_above_the_limit_of_a_file_is_refused(client, monkeypatch, served):
    from gsoft_diffusion.app.subjects import MOST_BYTES

    answer = client.post(f"{API}/upload", headers=OWN, files={"files": ("a.png", bytes(MOST_BYTES + 1))})
    assert answer.status_code == 413


def upload_event(client, path: str, url: str | None = None) -> str:
    """What the page answers if a file is said to be uploaded that was not; the event is that of the photos' field."""
    config = json.loads(client.get("/").text.partition("window.gradio_config = ")[2].partition(";</script>")[0])
    fields = {each["id"]: each["props"].get("elem_id") for each in config["components"]}
    event = next(
        e
        for e in config["dependencies"]
        if any(fields.get(t[0]) == "upload" and t[1] == "upload" for t in e["targets"])
    )
    file = {"path": path, "url": url, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    data = {
        "data": ["dog", [file]],
        "fn_index": event["id"],
        "session_hash": "abc",
        "trigger_id": event["targets"][0][0],
    }
    answer = client.post(f"{API}/queue/join", headers=OWN, json=data)
    if answer.status_code != 200:
        return answer.text
    with client.stream("GET", f"{API}/queue/data?session_hash=abc") as stream:
        told = ""
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line:
                return told
    return told


def test_what_was_uploaded_is_taken(client, served, tmp_path):
    """The same request as below, of a file that came by the page's own way."""
    workspace, _ = served
    Image.new("RGB", (70, 70), "red").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (path,) = client.post(f"{API}/upload", headers=OWN, files={"files": ("a.png", content)}).json()
    assert '"success":true' in upload_event(client, path)
    photo = workspace.subjects / "dog" / "photos" / "a.png"
    assert photo.read_bytes() == content
    photo.unlink()


@pytest.mark.parametrize("where", ["beside", "subject", "system"])
def test_a_file_that_was_not_uploaded_is_not_taken(client, served, where):
    """Nor copied to where the file route would give it out."""
    workspace, _ = served
    beside, own = workspace.root.parent / "private.png", workspace.subjects / "own.png"
    for path in (beside, own):
        Image.new("RGB", (70, 70), "red").save(path)
    before = {path for path in workspace.root.rglob("*") if path.is_file()}
    told = upload_event(client, {"beside": str(beside), "subject": str(own), "system": "/etc/hostname"}[where])
    assert '"success":false' in told
    assert {path for path in workspace.root.rglob("*") if path.is_file()} == before
    assert beside.exists()


def test_with_a_password_nothing_is_open_without_it(locked):
    for path in ("/theme.css", "/files/take/dog/adapter.safetensors", f"{API}/queue/data", "/assets/x.js"):
        assert locked.get(path).status_code == 401, path
    assert locked.post(f"{API}/queue/join", headers=OWN, content=b"{}").status_code == 401
    answer = locked.get("/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "Password" in locked.get("/login").text


def test_the_right_password_opens_the_page_for_this_browser_alone(locked, served, monkeypatch):
    monkeypatch.setattr(security, "FAILED_LOGIN_SECONDS", 0.0)
    for wrong in ("password=", "password=correct", "", "password=correct%20horse%20", "password=%FF"):
        answer = locked.post("/login", headers=OWN, content=wrong)
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    assert (
        locked.post("/login", headers={"origin": "http://evil.example"}, content="password=correct+horse").status_code
        == 403
    )
    answer = locked.post("/login", headers=OWN, content="password=correct+horse", follow_redirects=False)
    assert answer.status_code == 303
    said = answer.headers["set-cookie"].lower()
    assert "httponly" in said
    assert "samesite=strict" in said
    assert locked.get("/theme.css").status_code == 200
    locked.cookies.clear()
    session = said.partition("=")[2].partition(";")[0]
    for cookie in ("gsoft-7860=", "gsoft-7860=x", f"gsoft-1={session}", "a=b; =;,", 'gsoft-7860="é"'):
        assert locked.get("/theme.css", headers={"cookie": cookie.encode("latin-1")}).status_code == 401


@pytest.mark.parametrize("host", ["[::1]", "[::1]:7860", "localhost"])
def test_whoever_has_the_password_comes_in_by_every_name(locked, host):
    own = {"host": host, "origin": f"http://{host}"}
    answer = locked.post("/login", headers=OWN | own, content="password=correct+horse", follow_redirects=False)
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].partition(";")[0]
    assert locked.get("/theme.css", headers={"host": host, "cookie": cookie}).status_code == 200


# The page's own files


@pytest.fixture(scope="module")
def files(served):
    """Files that may be had, and others beside them that may not."""
    workspace, _ = served
    folder = write_run(workspace.root / "my dog")
    for name in (
        "validation/curve.png",
        "validation/step-000001.png",
        "images/0000_seed0_x.png",
        "images/checkpoint-5/0000_seed0_x.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    (folder / "checkpoint-5").mkdir()
    for name in (
        "adapter.safetensors",
        "checkpoint-5/adapter.safetensors",
        "kohya_lora_rank8.safetensors",
        "diff.safetensors",
        "checkpoint-5/state.pt",
    ):
        (folder / name).write_bytes(b"numbers")
    (folder / "merged" / "unet").mkdir(parents=True)
    (folder / "merged" / "unet" / "config.json").write_text("{}")
    (folder / "merged" / "link").symlink_to(workspace.root.parent / "secret.png")
    (folder / "images" / "0001_seed0_link.png").symlink_to(workspace.root.parent / "secret.png")
    (folder / "merged_2").symlink_to(workspace.root.parent)
    return folder


def test_pictures_are_shown_and_results_are_downloads(client, files):
    picture = client.get("/files/picture/my%20dog/images/checkpoint-5/0000_seed0_x.png")
    assert (picture.status_code, picture.content, picture.headers["content-type"]) == (200, PNG, "image/png")
    assert picture.headers["x-content-type-options"] == "nosniff"
    taken = client.get("/files/take/my%20dog/checkpoint-5/adapter.safetensors")
    assert (taken.status_code, taken.content) == (200, b"numbers")
    assert (
        taken.headers["content-disposition"] == "attachment; filename*=UTF-8''my%20dog-checkpoint-5-adapter.safetensors"
    )


def test_a_folder_is_a_zip_file_without_what_links_lead_to(client, files, tmp_path):
    import io
    import zipfile

    answer = client.get("/files/take/my%20dog/merged/")
    assert answer.status_code == 200
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["merged/unet/config.json"]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "picture/my%20dog/settings.yaml",
            "picture/my%20dog/adapter.safetensors",
            "picture/my%20dog/images/0001_seed0_link.png",
        ),
        *(
            "picture/my%20dog/../../../secret.png",
            "picture/my%20dog/images/..%2f..%2f..%2fsecret.png",
            "picture/..%2f/secret.png",
        ),
        *(
            "picture/my%20dog/images%2f%2e%2e%2f%2e%2e%2fsecret.png",
            "picture/app/subjects/x.png",
            "picture/nowhere/images/a.png",
        ),
        *(
            "take/my%20dog/settings.yaml",
            "take/my%20dog/checkpoint-5/state.pt",
            "take/my%20dog/merged_2/",
            "take/my%20dog/nothing/",
        ),
        *(
            "take/my%20dog//etc/passwd",
            "take/my%20dog/progress.jsonl",
            "take/my%20dog/logs/",
            "take/app/adapter.safetensors",
        ),
        *("photo/dog/x.png", "photo/../x.png", "photo/dog/..%2fsubject.json", "photo/dog%2f..%2fdog/x.png"),
    ],
)
def test_other_files_are_not_there(client, files, path):
    answer = client.get(f"/files/{path}")
    assert answer.status_code == 404
    assert PNG not in answer.content


def test_a_photo_that_is_a_link_is_not_shown(client, served, files):
    workspace, _ = served
    photos = workspace.subjects / "dog" / "photos"
    Image.new("RGB", (70, 70), "red").save(workspace.root.parent / "linked.png")
    (photos / "link.png").symlink_to(workspace.root.parent / "linked.png")
    Image.new("RGB", (70, 70), "blue").save(photos / "own.png")
    assert client.get("/files/photo/dog/own.png").headers["content-type"] == "image/png"
    assert client.get("/files/photo/dog/link.png").status_code == 404
    (photos / "link.png").unlink()
    (photos / "own.png").unlink()


def test_no_address_in_the_page_leads_elsewhere(client):
    """Besides those of Gradio's cards for other sites, which browsers do not load."""
    page = client.get("/").text
    loaded = [part for tag in ("src=", "href=") for part in page.split(tag)[1:]]
    assert not [part[:60] for part in loaded if part.lstrip("\"'").startswith(("http", "//"))]
    assert Path(__file__).exists()
