"""A server in this process that answers what huggingface_hub and datasets ask of the Hub."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "c0ffee" * 6 + "c0de"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+)(/.*)?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub(http.server.ThreadingHTTPServer):
  """Holds the files of repositories, "owner/name" for models and "datasets/owner/name"."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repositories: dict[str, dict[str, bytes]] = {}
    self.requests: list[str] = []
    threading.Thread(target=self.serve_forever, daemon=True).start()

  @property
  def endpoint(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *arguments):
    pass

  def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def lacks(self, what: str) -> None:
    self.answer({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound")

  def respond(self) -> None:
    asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    self.server.requests.append(f"{self.command} {path}")
    if match := FILE.fullmatch(path):
      kind, name, _, file = match.groups()
      files = self.server.repositories.get(f"{kind or ''}{name}")
      self.file(files, file)
    elif match := API.fullmatch(path):
      kind, name, action, _, below = match.groups()
      files = self.server.repositories.get(name if kind == "models" else f"datasets/{name}")
      self.repository(name, files, action, (below or "").strip("/"), asked)
    else:
      self.lacks("Entry")

  do_GET = do_HEAD = do_POST = respond

  def file(self, files: dict[str, bytes] | None, name: str) -> None:
    if files is None or name not in files:
      return self.lacks("Repo" if files is None else "Entry")
    tag, content = hashlib.sha1(files[name]).hexdigest(), files[name]
    headers = {"ETag": f'"{tag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
    if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
      first, last = int(span[1]), int(span[2] or len(content) - 1)
      headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
      return self.answer(content[first : last + 1], 206, **headers)
    self.answer(content, **headers)

  def repository(
    self, name: str, files: dict[str, bytes] | None, action: str | None, below: str, asked: str
  ) -> None:
    if files is None:
      return self.lacks("Repo")
    if action in (None, "revision"):
      siblings = [{"rfilename": file} for file in files]
      return self.answer({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
    entries = [
      {"type": "file", "path": file, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
      for file, x in files.items()
    ]
    if action == "paths-info":
      paths = (
        json.loads(asked)["paths"] if asked[:1] == "{" else urllib.parse.parse_qs(asked)["paths"]
      )
      entries = [entry for entry in entries if entry["path"] in paths]
    elif below:
      entries = [entry for entry in entries if entry["path"].startswith(f"{below}/")]
    self.answer(entries)
