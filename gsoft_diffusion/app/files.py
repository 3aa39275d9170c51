"""The files that the page shows and gives out: thumbnails, pictures of runs, and what is taken home. No others."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from fastapi import APIRouter, Response
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse

from gsoft_diffusion.app.runs import EXPORTS, MERGED
from gsoft_diffusion.app.subjects import subject_of
from gsoft_diffusion.app.workspace import Workspace, inside
from gsoft_diffusion.foundation.errors import UserError

PICTURES = re.compile(
    r"validation/curve\.png|validation/step-\d+(_\d+)?\.png|validation/step-\d+/[^/]+\.png|images/(checkpoint-\d+/)?[^/]+\.png"
)
TAKEN = re.compile(rf"(checkpoint-\d+/)?adapter\.safetensors|README\.md|{EXPORTS}\.(safetensors|md|csv)")
FOLDERS = re.compile(f"{MERGED}/")
BLOCK = 1 << 20  # bytes of a file that are sent at a time
ASK_AGAIN = {"cache-control": "private, no-cache"}
FOR_GOOD = {"cache-control": "private, max-age=86400"}  # seconds; the address changes with the file


def picture_address(run: str, name: str) -> str:
    """Where the page finds a picture of a run. name: below the run's folder, with slashes."""
    return f"/files/picture/{quote(run, safe='')}/{quote(name)}"


def photo_address(subject: str, name: str, changed: int) -> str:
    """Where the page finds a photo as training sees it. changed: another number whenever it looks otherwise."""
    return f"/files/photo/{quote(subject)}/{quote(name, safe='')}?{changed}"


def download_address(run: str, name: str) -> str:
    """Where what is taken home is. name: a file below the run's folder, or a folder, which ends in a slash."""
    return f"/files/take/{quote(run, safe='')}/{quote(name)}"


def routes(workspace: Workspace) -> APIRouter:
    """The addresses. workspace: the page's folder."""
    router = APIRouter(prefix="/files")

    @router.get("/photo/{subject}/{name}")
    def photo(subject: str, name: str) -> Response:
        from gsoft_diffusion.photos.preview import preview  # with PyTorch, which takes seconds

        try:
            known = subject_of(workspace, subject)
            inside(known.photos, name)
            image = preview(known.photo(name), [(known.resolution, known.resolution)])
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        file = io.BytesIO()
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png", headers=FOR_GOOD)

    @router.get("/picture/{run}/{name:path}")
    def picture(run: str, name: str) -> Response:
        try:
            path = _file(workspace, run, name, PICTURES)
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        return FileResponse(path, media_type="image/png", headers=ASK_AGAIN)

    @router.get("/take/{run}/{name:path}")
    def take(run: str, name: str) -> Response:
        try:
            if FOLDERS.fullmatch(name):
                folder = workspace.run(run) / name.rstrip("/")
                if folder.is_symlink() or not folder.is_dir():
                    raise UserError(f"there is no folder {name}")
                return StreamingResponse(
                    zipped(folder), media_type="application/zip", headers=_named(run, f"{folder.name}.zip")
                )
            path = _file(workspace, run, name, TAKEN)
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        return FileResponse(path, media_type="application/octet-stream", headers=_named(run, name.replace("/", "-")))

    return router


def _file(workspace: Workspace, run: str, name: str, allowed: re.Pattern[str]) -> Path:
    if not allowed.fullmatch(name):
        raise UserError(f"there is no file {name}")
    return inside(workspace.run(run), name)


def _named(run: str, name: str) -> dict[str, str]:
    """Headers with which a browser saves a file under this name, with the run's before it."""
    return ASK_AGAIN | {"content-disposition": f"attachment; filename*=UTF-8''{quote(f'{run}-{name}')}"}


class _Sent(io.RawIOBase):
    """What a zip file is written to, piece by piece, and taken from."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self.pieces.append(piece)
        return len(piece)

    def taken(self) -> bytes:
        pieces, self.pieces = self.pieces, []
        return b"".join(pieces)


def zipped(folder: Path) -> Iterator[bytes]:
    """A folder as a zip file, in pieces, never whole in memory or on disk. Weights are not worth compressing.

    folder: what is in it, links left out, has its name before it in the zip file.
    """
    sent = _Sent()
    with ZipFile(sent, "w", ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            info = ZipInfo.from_file(path, path.relative_to(folder.parent))
            with path.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
                while block := source.read(BLOCK):
                    target.write(block)
                    yield sent.taken()
    yield sent.taken()
