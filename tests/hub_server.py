"""A stand-in for the Hugging Face Hub on loopback, with the endpoints for pushing, listing and reading repositories."""

import base64
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from places import serving


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer on a persistent connection takes 40 ms

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _do(self):
        server, body = self.server, self._body()
        url = urlsplit(self.path)
        path = unquote(url.path)
        with server.lock:
            server.asked.append((self.command, path))
            for pattern, answers in server.refusals.items():
                if answers and re.search(pattern, path):
                    status, headers = answers.pop(0)
                    return self._answer({"error": "refused"}, status, **headers)
            if path == "/api/repos/create":
                asked = json.loads(body)
                server.created.append(asked)
                name = f"{asked['organization']}/{asked['name']}"
                server.repositories.setdefault(name, {".gitattributes": b"*.bin filter=lfs\n"})
                return self._answer({"url": f"{server.url}/datasets/{name}"})
            if path == "/api/validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if found := re.fullmatch(r"/lfs/(\w+)", path):
                assert hashlib.sha256(body).hexdigest() == found[1]
                server.objects[found[1]] = body
                return self._answer({})
            if found := re.fullmatch(r"/datasets/(\w+/\w+)\.git/info/lfs/objects/batch", path):
                return self._answer({"objects": [self._upload_of(item) for item in json.loads(body)["objects"]]})
            found = re.fullmatch(r"(?:/api)?/datasets/(\w+/\w+)(?:/([\w-]+))?(?:/main)?(?:/(.*))?", path)
            if not found or found[1] not in server.repositories:
                return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            files = server.repositories[found[1]]
            action = {
                "preupload": self._preupload,
                "commit": self._commit,
                "paths-info": lambda _, body: [
                    _entry(files, p) for p in parse_qs(body.decode())["paths"] if p in files
                ],
            }.get(found[2])
            if action:
                return self._answer(action(files, body))
            if found[2] == "tree":
                return self._tree(files, found[3] or "", "recursive=true" in url.query.lower())
            if found[2] == "resolve":
                return self._resolve(files, found[3])
            return self._answer({"id": found[1], "sha": "0" * 40, "siblings": []})

    do_GET = do_POST = do_PUT = do_HEAD = _do

    def _upload_of(self, item):
        if item["oid"] in self.server.objects:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}

    def _preupload(self, files, body):
        def mode(file):
            sample = base64.b64decode(file["sample"])
            return "lfs" if b"\0" in sample or not sample.isascii() else "regular"

        named = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in named]}

    def _commit(self, files, body):
        lines = [json.loads(line) for line in body.splitlines()]
        changed = []
        for line in lines[1:]:
            value = line["value"]
            changed.append(value["path"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = (value["oid"], self.server.objects[value["oid"]])
            else:
                del files[value["path"]]
        self.server.commits.append(changed)
        return {"commitUrl": f"{self.server.url}/datasets/me/pool/commit/1", "commitOid": "1" * 40}

    def _tree(self, files, folder, recursive):
        home = f"{folder}/" if folder else ""
        inside = [path for path in files if path.startswith(home)]
        if folder and not inside:
            return self._answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        folders = {path.rpartition("/")[0] for path in inside if path.removeprefix(home).count("/")}
        folders |= {"/".join(path.split("/")[:n]) for path in folders for n in range(1, path.count("/") + 1)}
        entries = [_entry(files, path) for path in inside]
        entries += [
            {"type": "directory", "path": path, "oid": "2" * 40, "size": 0} for path in folders if path.startswith(home)
        ]
        return self._answer([e for e in entries if recursive or "/" not in e["path"].removeprefix(home)])

    def _resolve(self, files, path):
        if path not in files:
            return self._answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        content = files[path] if isinstance(files[path], bytes) else files[path][1]
        begin, end = 0, len(content) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), min(int(wanted[2]), end)
        part = content[begin : end + 1]
        self.server.read_bytes += len(part) * (self.command == "GET")
        return self._answer(
            part, 206 if wanted else 200, Content_Range=f"bytes {begin}-{end}/{len(content)}", ETag='"x"'
        )


def _entry(files, path):
    content = files[path]
    if isinstance(content, bytes):
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "oid": git, "size": len(content)}
    oid, content = content
    lfs = {"oid": oid, "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": path, "oid": "3" * 40, "size": len(content), "lfs": lfs}


@contextmanager
def hub_server(monkeypatch):
    """Serve an empty hub and point huggingface_hub to it; yield the server, which records all requests."""
    from huggingface_hub import constants

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.lock = threading.RLock()
        server.repositories, server.objects = {}, {}  # name -> path -> bytes or (SHA-256, bytes); SHA-256 -> bytes
        server.asked, server.commits, server.created, server.read_bytes = [], [], [], 0
        server.refusals = {}  # pattern of a path -> list of (status, headers) for the next answers
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        for name, value in {"ENDPOINT": server.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
            monkeypatch.setenv(
                {"ENDPOINT": "HF_ENDPOINT"}.get(name, name), str(value) if value else ""
            )  # for subprocesses
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with serving(server):
            yield server
