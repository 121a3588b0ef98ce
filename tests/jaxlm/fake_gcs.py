"""An object store in this process that speaks what is used of Google Cloud Storage's JSON API."""

import http.server
import json
import threading
import urllib.parse


class FakeGCS(http.server.ThreadingHTTPServer):
  """Holds objects by bucket and name, each with its generation."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[str, dict[str, tuple[bytes, int]]] = {}
    self.generation = 0
    self.refuses = False
    """Answers that the credentials do not suffice."""
    self.read_only = False
    self.before_read = lambda bucket, name: None
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def names(self, bucket: str) -> list[str]:
    return sorted(self.objects.get(bucket, {}))


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *arguments):
    pass

  def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
    content = json.dumps(content).encode() if isinstance(content, dict) else content
    self.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(content)

  def parse(self) -> tuple[str, str, dict[str, str]]:
    """Returns (bucket, name of the object or "", parameters)."""
    url = urllib.parse.urlsplit(self.path)
    _, _, rest = url.path.partition("/b/")
    bucket, _, name = rest.partition("/o")
    return bucket, urllib.parse.unquote(name[1:]), dict(urllib.parse.parse_qsl(url.query))

  def describe(self, bucket: str, name: str) -> dict:
    content, generation = self.server.objects[bucket][name]
    return {"name": name, "generation": str(generation), "size": str(len(content))}

  def do_GET(self):
    bucket, name, parameters = self.parse()
    if self.server.refuses:
      return self.answer(403, {"error": {"message": "no permission"}})
    if name:
      self.server.before_read(bucket, name)
    objects = self.server.objects.setdefault(bucket, {})
    if not name:
      first, end = parameters.get("startOffset", ""), parameters.get("endOffset", "")
      names = [name for name in sorted(objects) if name >= first and (not end or name < end)]
      return self.answer(200, {"items": [self.describe(bucket, name) for name in names]})
    if name not in objects:
      return self.answer(404, {})
    content, generation = objects[name]
    first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    generations = {"x_goog_generation": str(generation)}
    if "Range" not in self.headers:
      return self.answer(200, content, **generations)
    if start >= len(content):
      return self.answer(416, {})
    place = f"bytes {start}-{end}/{len(content)}"
    return self.answer(206, content[start : end + 1], Content_Range=place, **generations)

  def do_POST(self):
    bucket, _, parameters = self.parse()
    content = self.rfile.read(int(self.headers["Content-Length"]))
    if self.server.refuses or self.server.read_only:
      return self.answer(403, {"error": {"message": "no permission"}})
    name, objects = parameters["name"], self.server.objects.setdefault(bucket, {})
    if parameters.get("ifGenerationMatch", "-1") not in ("-1", str(objects.get(name, (b"", 0))[1])):
      return self.answer(412, {})
    self.server.generation += 1
    objects[name] = content, self.server.generation
    return self.answer(200, self.describe(bucket, name))

  def do_DELETE(self):
    bucket, name, _ = self.parse()
    found = self.server.objects.get(bucket, {}).pop(name, None)
    self.answer(404 if found is None else 204)
