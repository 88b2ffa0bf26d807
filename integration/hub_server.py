"""A Hub on 127.0.0.1, written from the source of huggingface_hub 2.4 and stricter than it.

It verifies the sha256 and size of everything it is given, keeps commits unchanged for ever, wants the token
where the Hub wants it and nowhere else, and answers 501 to what it does not know. Whatever a client should
not have done is kept in `violations`, so that a test can fail. Data goes over LFS, or over xet, for which the
client's own hf_xet writes to a folder through its `local://` scheme.

    python -m integration.hub_server --port 8899
"""

from __future__ import annotations

import argparse
import base64
import codecs
import hashlib
import json
import re
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"  # not a secret: this server's only token
USER = "me"


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is what the client compares: git's sha1, or the sha256 of an LFS file."""

    oid: str
    sha256: str
    size: int
    lfs: bool


@dataclass
class Repo:
    private: bool
    commits: dict[str, MappingProxyType[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Entry], title: str) -> str:
        """Put `files` on top of `ref`; the new commit's id."""
        content = [self.refs.get(ref), title, sorted((path, entry.oid) for path, entry in files.items())]
        oid = hashlib.sha1(json.dumps([*content, len(self.commits)]).encode()).hexdigest()
        self.commits[oid] = MappingProxyType(files)
        self.refs[ref] = oid
        return oid


class Store:
    """Verified blobs by sha256, and the xet folder that clients write to."""

    def __init__(self, root: Path) -> None:
        self.blobs, self.cas = root / "blobs", root / "cas"
        self.blobs.mkdir(parents=True)
        self.cas.mkdir()

    def path(self, sha256: str) -> Path:
        return self.blobs / sha256

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return sha256

    def xet_hashes(self) -> dict[str, str]:
        """sha256 → xet hash, from the shards in the xet folder (a section of 48-byte records in each)."""
        found = {}
        for shard in self.cas.glob("xet/xorbs/shards/*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, at + 32)
                xet, at = _swapped(data[at : at + 32]), at + 48 * (1 + segments)
                at += 48 * segments * (flags >> 31)  # verification records
                if flags >> 30 & 1:
                    found[_swapped(data[at : at + 32])] = xet
                    at += 48
        return found

    def take_from_xet(self, sha256: str, size: int) -> bool:
        """Rebuild a file out of the xet folder into the blobs; whether it is what the client said it is."""
        import hf_xet

        xet = self.xet_hashes().get(sha256)
        if xet is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            copy, out = Path(folder, "cas"), Path(folder, "out")
            shutil.copytree(self.cas, copy)  # its database may still be locked by the client
            access = {"token": "t", "token_expiry_unix_secs": int(time.time()) + 3600}
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}", **access) as group:
                group.start_download_file(hf_xet.XetFileInfo(xet, size), str(out))
            return self.put(out.read_bytes()) == sha256


def _swapped(data: bytes) -> str:
    return b"".join(data[start : start + 8][::-1] for start in range(0, 32, 8)).hex()


class HubServer(ThreadingHTTPServer):
    """The server: `url`, `repos`, `requests` ("METHOD path" of every call), `violations`."""

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store, self.repos, self.lock = Store(root), dict[str, Repo](), Lock()
        self.requests: list[str] = []
        self.violations: list[str] = []

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """What a client process needs in its environment to talk to this server and to nothing else."""
        fixed = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**fixed, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": TOKEN, **changes}


class Answer(Exception):
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, text: str, code: str = "", **body: Any) -> None:
        super().__init__(text)
        self.status, self.body = status, {"error": text, **body}
        self.headers = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})


class Violation(Answer):
    """A request that no correct client sends."""


_ID, _REV = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
# method, path, handler, who may call: "token", "anyone", "no token", or "reader" (a token if the repo is private)
_ROUTES = [
    ("POST", "/api/repos/create", "create", "token"),
    ("POST", "/api/validate-yaml", "validate_yaml", "anyone"),
    ("POST", f"/api/models/{_ID}/preupload/{_REV}", "preupload", "token"),
    ("GET", f"/api/models/{_ID}/xet-write-token/{_REV}", "xet_token", "token"),
    ("GET", f"/api/models/{_ID}/xet-read-token/{_REV}", "xet_token", "reader"),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "lfs_batch", "token"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put", "no token"),
    ("POST", "/lfs/verify", "lfs_verify", "token"),
    ("POST", f"/api/models/{_ID}/commit/{_REV}", "commit", "token"),
    ("POST", f"/api/models/{_ID}/branch/{_REV}", "branch", "token"),
    ("GET", f"/api/models/{_ID}(/revision/{_REV})?", "info", "reader"),
    ("GET", f"/api/models/{_ID}/tree/{_REV}", "tree", "reader"),
    ("(HEAD|GET)", f"/{_ID}/resolve/{_REV}/(?P<file>.+)", "resolve", "reader"),
]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.query = parse_qs(url.query)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
            try:
                self._route(url.path)
            except Answer as answer:
                if isinstance(answer, Violation):
                    self.server.violations.append(f"{self.command} {self.path}: {answer}")
                self.reply(json.dumps(answer.body).encode(), answer.headers, answer.status)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

    def _route(self, path: str) -> None:
        for method, pattern, handler, who in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
                repo = self.server.repos.get(parts.get("id", ""))
                token = self.headers.get("Authorization")
                if who == "no token" and token:
                    raise Violation(400, "a token was sent to the storage")
                wanted = who == "token" or (who == "reader" and repo is not None and repo.private)
                if wanted and token != f"Bearer {TOKEN}":
                    raise Answer(401, "Invalid username or password.")
                if "id" in parts and repo is None:
                    raise Answer(404, "Repository not found", "RepoNotFound")
                getattr(self, handler)(**parts)
                return
        raise Violation(501, "this server does not know that request")

    # The handlers below run under the server's lock, one for each line of _ROUTES.

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if not name.startswith(f"{USER}/"):
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        if name in self.server.repos:
            raise Answer(409, "You already created this model repo", url=url)
        repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": self._regular(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.json({"url": url})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"\A---\n(.*?)^---\n", content, re.DOTALL | re.MULTILINE)
        try:
            keys = yaml.safe_load(match.group(1)) if match else {}
        except yaml.YAMLError as error:
            raise Answer(400, "bad YAML", errors=[{"message": str(error)}], warnings=[]) from None
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", keys.get("base_model", "owner/name")):
            message = '"base_model" with value "…" is not valid. Use a model id'
            raise Answer(400, "bad metadata", errors=[{"message": message}], warnings=[])
        self.json({"errors": [], "warnings": []})

    def preupload(self, id: str, rev: str) -> None:
        there, files = self._commit_of(id, rev)[1], []
        for asked in json.loads(self.body)["files"]:
            sample = base64.b64decode(asked["sample"], validate=True)
            if len(sample) != min(512, asked["size"]):
                raise Violation(400, f"{asked['path']}: the sample has {len(sample)} bytes")
            entry = there.get(asked["path"])
            mode = "lfs" if asked["path"].endswith(".safetensors") or not _is_text(sample) else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            files[-1] |= {"oid": entry.oid} if entry else {}
        self.json({"files": files})

    def xet_token(self, id: str, rev: str) -> None:
        cas, expires = f"local://{self.server.store.cas}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self.json({"casUrl": cas, "accessToken": "xet", "exp": expires}, headers)

    def lfs_batch(self, id: str) -> None:
        asked = json.loads(self.body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise Violation(400, "not an LFS upload")
        objects = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            upload = {"href": f"{self.server.url}/lfs/{oid}?size={size}"}
            actions = {"actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}}}
            objects.append({"oid": oid, "size": size} | ({} if self.server.store.path(oid).is_file() else actions))
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if len(self.body) != int(self.query["size"][0]) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Violation(400, "the bytes are not those announced")
        self.server.store.put(self.body)
        self.reply(b"")

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        path = self.server.store.path(asked["oid"])
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise Violation(404, "verify of an object that was not uploaded")
        self.json({})

    def commit(self, id: str, rev: str) -> None:
        repo, (head, there) = self.server.repos[id], self._commit_of(id, rev)
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Violation(400, "a commit starts with its header")
        if header["value"].get("parentCommit", head) != head:
            raise Answer(412, "A commit has happened since")
        files = dict(there)
        for line in lines:
            key, value = line["key"], line["value"]
            if ".." in value["path"].split("/") or value["path"].startswith("/"):
                raise Violation(400, f"path {value['path']}")
            if key == "file":
                files[value["path"]] = self._regular(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                files[value["path"]] = self._lfs(value["oid"], value["size"])
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Violation(400, f"{key} {value['path']}")
        if files == there:
            raise Violation(400, "an empty commit")
        pull = len([name for name in repo.refs if name.startswith("refs/pr/")]) + 1
        if self.query.get("create_pr"):
            rev = f"refs/pr/{pull}"
        oid = repo.commit(rev, files, header["value"]["summary"])
        answer = {"commitOid": oid, "commitUrl": f"{self.server.url}/{id}/commit/{oid}"}
        if self.query.get("create_pr"):
            answer["pullRequestUrl"] = f"{self.server.url}/{id}/discussions/{pull}"
        self.json(answer)

    def branch(self, id: str, rev: str) -> None:
        repo = self.server.repos[id]
        if rev in repo.refs:
            raise Answer(409, "Reference already exists")
        repo.refs[rev] = self._commit_of(id, json.loads(self.body).get("startingPoint", "main"))[0]
        self.json({}, status=201)

    def info(self, id: str, rev: str = "main") -> None:
        sha, files = self._commit_of(id, rev)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.json({"id": id, "sha": sha, "private": self.server.repos[id].private, "siblings": siblings})

    def tree(self, id: str, rev: str) -> None:
        xet, items = self.server.store.xet_hashes(), []
        for path, entry in self._commit_of(id, rev)[1].items():
            lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}} if entry.lfs else {}
            hashed = {"xetHash": xet[entry.sha256]} if entry.lfs and entry.sha256 in xet else {}
            items.append({"type": "file", "path": path, "oid": entry.oid[:40], "size": entry.size, **lfs, **hashed})
        self.json(items)

    def resolve(self, id: str, rev: str, file: str) -> None:
        sha, files = self._commit_of(id, rev)
        if file not in files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        entry, headers = files[file], {"X-Repo-Commit": sha, "ETag": f'"{files[file].oid}"'}
        xet = self.server.store.xet_hashes().get(entry.sha256)
        if entry.lfs:
            headers |= {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(entry.size)}
        if entry.lfs and xet:
            route = f"{self.server.url}/api/models/{id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": xet, "X-Xet-Refresh-Route": route}
        self.reply(self.server.store.path(entry.sha256).read_bytes(), headers)

    def _commit_of(self, id: str, rev: str) -> tuple[str, MappingProxyType[str, Entry]]:
        repo = self.server.repos[id]
        sha = repo.refs.get(rev, rev)
        if sha not in repo.commits:
            raise Answer(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _regular(self, data: bytes) -> Entry:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Entry(oid, self.server.store.put(data), len(data), lfs=False)

    def _lfs(self, oid: str, size: int) -> Entry:
        path = self.server.store.path(oid)
        if not path.is_file() and not self.server.store.take_from_xet(oid, size):
            raise Violation(400, f"a commit names content that was not uploaded: {oid}")
        if path.stat().st_size != size:
            raise Violation(400, f"{oid} has {path.stat().st_size} bytes, the commit says {size}")
        return Entry(oid, oid, size, lfs=True)

    def json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.reply(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def reply(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # a test prints `requests` when it fails


def _is_text(sample: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # a character cut in two at the end is no error
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on 127.0.0.1 to try `lorasb push` on.")
    parser.add_argument("--port", type=int, default=8899)
    port = parser.parse_args().port
    with tempfile.TemporaryDirectory() as root, HubServer(Path(root), port) as server:
        home = tempfile.mkdtemp(prefix="loopback-hub-")
        print("\n".join(f"export {name}={value}" for name, value in server.environment(Path(home)).items()))
        print(f"# serving on {server.url}; the owner is {USER!r}; Ctrl-C ends it and forgets everything", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            for violation in server.violations:
                print(f"# refused: {violation}")


if __name__ == "__main__":
    main()
