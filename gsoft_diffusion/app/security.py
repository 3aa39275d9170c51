"""What may be asked of the page's server, and by whom: everything else is refused before Gradio sees it.

- Only the addresses that the page needs exist. Gradio's routes to files, proxies, streams and its API do not.
- What changes something must come from the page itself: browsers say where a request is from (`Origin`).
- On the loopback address the browser must have asked for this machine by name, so that no other site's name can be
  pointed at it.
- With a password, everything needs the cookie that the login page gives; other sites' requests do not carry it.
- The browser is told to load nothing from elsewhere, and to show the page in no other site's frame.
"""

from __future__ import annotations

import asyncio
import html
import re
import secrets
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import SplitResult, parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD_BYTES, OTHER_BYTES = 600_000_000, 4_000_000  # of a request
FAILED_LOGIN_SECONDS = 1.0
API = "/gradio_api"
READ = re.compile(
    r"/|/login|/favicon\.ico|/theme\.css|/assets/[\w./-]+|/static/[\w./-]+|/files/[^\\\0]+"
    rf"|{API}/(queue/data|app_id|startup-events|theme\.css|upload_progress|heartbeat/\w+|file=.+)"
)
WRITE = re.compile(rf"/login|{API}/(queue/join|upload|cancel|reset/?)")
LENGTH = re.compile(r"[0-9]{1,18}")
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's page has both
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>gsoft-diffusion</title>
<style>:root{{color-scheme:light dark}}
body{{font:1.1rem system-ui,sans-serif;max-width:22rem;margin:20vh auto;padding:1rem}}
input,button{{font:inherit;padding:.5rem;width:100%;box-sizing:border-box;margin-top:.5rem}}</style>
<form method="post" action="/login"><label>Password <input type="password" name="password" autofocus required
autocomplete="current-password"></label><button>Open the page</button><p role="alert">{said}</p></form></html>"""


class Gatekeeper:
    """Lets through to the application what the page itself asks for."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, password: str | None, uploads: str) -> None:
        """app: the application behind it.
        hosts: names by which this server may be asked for; None for any.
        password: what opens the page; None for no login.
        uploads: the folder of Gradio's own files, the only ones that its file route may give out.
        """
        self.app, self.hosts, self.password, self.uploads = app, hosts, password, uploads
        self._session = secrets.token_urlsafe(32)
        self._logins = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _with_headers(send))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        if why := self._refused(headers, path, method):
            status, said = why
            await PlainTextResponse(said, status)(scope, receive, send)
            return
        body = _Bounded(receive, send, _limit(path))
        if path == "/login" and self.password:
            await self._login(scope, body.receive, body.send)
        elif self.password and not self._is_open_to(headers):
            answer = RedirectResponse("/login", 303) if path == "/" else PlainTextResponse("log in first", 401)
            await answer(scope, receive, send)
        else:
            try:
                await self.app(scope, body.receive, body.send)
            except Exception:
                if not body.too_large:
                    raise
        if body.too_large and not body.answered:
            await PlainTextResponse("too large", 413)(scope, receive, send)

    def _refused(self, headers: Headers, path: str, method: str) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.hosts is not None and _parts(f"//{host}").hostname not in self.hosts:
            return 421, "this page is not known by that name; open it at the address that gsoft-app has printed"
        reads = method in ("GET", "HEAD")
        if not reads and method != "POST":
            return 405, "not allowed"
        if ".." in path.split("/") or not (READ if reads else WRITE).fullmatch(path):
            return 404, "there is no such address"
        if path.startswith(f"{API}/file=") and not path.removeprefix(f"{API}/file=").startswith(f"{self.uploads}/"):
            return 404, "there is no such address"
        if not reads:
            origin = _parts(headers.get("origin", ""))
            if origin.netloc != host or origin.scheme not in ("http", "https"):
                return 403, "this request is not from the page"
            length = headers.get("content-length", "0")
            if not LENGTH.fullmatch(length):
                return 400, "the length is no number"
            if int(length) > _limit(path):
                return 413, "too large"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not (
            reads and path in ("/", "/login") and headers.get("sec-fetch-mode") == "navigate"
        ):
            return 403, "this request is not from the page"
        return None

    def _is_open_to(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie(headers))
        except CookieError:
            return False
        return cookie is not None and secrets.compare_digest(cookie.value.encode(), self._session.encode())

    def _cookie(self, headers: Headers) -> str:
        """Its name; browsers keep cookies by machine, and there may be several pages on one."""
        return "-".join(["gsoft", *re.findall(r":(\d+)$", headers.get("host", ""))])

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await HTMLResponse(LOGIN.format(said=""))(scope, receive, send)
            return
        try:
            form = parse_qs((await _body(receive)).decode("ascii"))
        except ValueError:  # not of ASCII, or too many fields
            form = {}
        given = (form.get("password") or [""])[0]
        async with self._logins:  # one after the other, so that guessing takes time
            right = secrets.compare_digest(given.encode(), (self.password or "").encode())
            if not right:
                await asyncio.sleep(FAILED_LOGIN_SECONDS)
        if not right:
            page = LOGIN.format(said=html.escape("That is not the password."))
            await HTMLResponse(page, 403)(scope, receive, send)
            return
        answer = RedirectResponse("/", 303)
        name = self._cookie(Headers(scope=scope))
        answer.set_cookie(name, self._session, httponly=True, samesite="strict")
        await answer(scope, receive, send)


class _Bounded:
    """A request whose body is cut off where it becomes longer than allowed, and whose answer then is that it is."""

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self._left = receive, send, limit
        self.too_large = self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.too_large = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if not self.too_large:
            self.answered = True
            await self._send(message)


def _limit(path: str) -> int:
    return UPLOAD_BYTES if path == f"{API}/upload" else OTHER_BYTES


def _parts(address: str) -> SplitResult:
    """The parts of an address that a header names; empty ones if it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]  # no other site may read anything
        await send(message)

    return sending
