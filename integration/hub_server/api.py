"""The requests of the Hub that a push and a pull are made of, one method for each."""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import re
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

import yaml

from .http import USER, Answer, BaseHandler, BaseServer, Violation
from .store import Entry, Repo

_ID, _REV = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
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
    ("GET", f"/api/models/{_ID}/tree/{_REV}(/(?P<folder>.+))?", "tree", "reader"),
    ("(HEAD|GET)", rf"/(?P<id>(datasets/)?[\w.-]+/[\w.-]+)/resolve/{_REV}/(?P<file>.+)", "resolve", "reader"),
]


class HubServer(BaseServer):
    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(root, port, Handler)


class Handler(BaseHandler):
    """Each method is named in `routes` and runs under the server's lock."""

    routes = _ROUTES

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if not name.startswith(f"{USER}/"):
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        if name in self.server.repos:
            raise Answer(409, "You already created this model repo", url=url)
        repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        attributes = self.server.store.regular(b"*.safetensors filter=lfs\n")
        repo.commit("main", {".gitattributes": attributes}, "initial commit")
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
        there, files, body = self._commit_of(id, rev)[1], [], json.loads(self.body)
        lines = (body.get("gitIgnore") or self._gitignore(there)).splitlines()
        ignored = [line for line in lines if line and not line.startswith("#")]
        for asked in body["files"]:
            sample = base64.b64decode(asked["sample"], validate=True)
            if len(sample) != min(512, asked["size"]):
                raise Violation(400, f"{asked['path']}: the sample has {len(sample)} bytes")
            entry = there.get(asked["path"])
            mode = "lfs" if asked["path"].endswith(".safetensors") or not _is_text(sample) else "regular"
            ignore = any(fnmatch(asked["path"], pattern) for pattern in ignored)
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": ignore})
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
        if self.fault and self.fault.kind == "damage":
            raise Answer(400, "the content of a file does not have the sha256 that the commit names")
        if header["value"].get("parentCommit", head) != head:
            raise Answer(412, "A commit has happened since")
        files = dict(there)
        for line in lines:
            key, value = line["key"], line["value"]
            if ".." in value["path"].split("/") or value["path"].startswith("/"):
                raise Violation(400, f"path {value['path']}")
            if key == "file":
                files[value["path"]] = self.server.store.regular(base64.b64decode(value["content"], validate=True))
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

    def tree(self, id: str, rev: str, folder: str = "") -> None:
        xet, items = self.server.store.xet_hashes(), []
        files = {path: e for path, e in self._commit_of(id, rev)[1].items() if path.startswith(folder)}
        if not files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        for path, entry in files.items():
            lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}} if entry.lfs else {}
            hashed = {"xetHash": xet[entry.sha256]} if entry.lfs and entry.sha256 in xet else {}
            items.append({"type": "file", "path": path, "oid": entry.oid[:40], "size": entry.size, **lfs, **hashed})
        self.json(items)

    def resolve(self, id: str, rev: str, file: str) -> None:
        sha, files = self._commit_of(id, rev)
        if file not in files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        if self.server.repos[id].gated:
            raise Answer(403, "Access to model is restricted", "GatedRepo")
        entry, headers = files[file], {"X-Repo-Commit": sha, "ETag": f'"{files[file].oid}"'}
        xet = self.server.store.xet_hashes().get(entry.sha256)
        if entry.lfs:
            headers |= {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(entry.size)}
        if entry.lfs and xet:
            route = f"{self.server.url}/api/models/{id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": xet, "X-Xet-Refresh-Route": route}
        data = self.server.store.path(entry.sha256).read_bytes()
        damaged = self.fault is not None and self.fault.kind == "damage"
        self.reply(data[:-1] + bytes([data[-1] ^ 1]) if damaged else data, headers)

    def _commit_of(self, id: str, rev: str) -> tuple[str, MappingProxyType[str, Entry]]:
        repo = self.server.repos[id]
        sha = repo.refs.get(rev, rev)
        if sha not in repo.commits:
            raise Answer(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _gitignore(self, there: Mapping[str, Entry]) -> str:
        return self.server.store.path(there[".gitignore"].sha256).read_text() if ".gitignore" in there else ""

    def _lfs(self, oid: str, size: int) -> Entry:
        path = self.server.store.path(oid)
        if not path.is_file() and not self.server.store.take_from_xet(oid, size):
            raise Violation(400, f"a commit names content that was not uploaded: {oid}")
        if path.stat().st_size != size:
            raise Violation(400, f"{oid} has {path.stat().st_size} bytes, the commit says {size}")
        return Entry(oid, oid, size, lfs=True)


def _is_text(sample: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # a character cut in two at the end is no error
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample
