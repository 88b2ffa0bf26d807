"""Ways to damage a file, drawn at random: its bytes, the JSON in it, a safetensors header, what kind of file it is."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[Path, Random], str]  # changes the file and says how

_ODD = [
    *(None, True, False, -1, 0, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, float("nan"), float("inf"), "", " ", "\0"),
    *("..", "../..", "/etc/passwd", "~", "C:\\x", "a" * 100_000, "ａ", "\ud800", "\u202e", "me/x", "me/x@main", "F32"),
    *([], {}, [[]], [-1, -1], [2**62, 4], [0], ["x"], {"x": 1}),
]


def mutate(path: Path, random: Random) -> str:
    """Damage the file at `path` in one way that fits it; returns what was done."""
    kinds: list[Mutation] = [_bytes, _bytes, _kind_of_file]
    if path.suffix == ".safetensors":
        kinds += [_header, _header, _header, _body]
    elif path.suffix == ".json":
        kinds += [_json, _json, _json]
    elif path.suffix in (".jsonl", ".toml"):
        kinds += [_lines, _lines, _lines]
    return random.choice(kinds)(path, random)


def _bytes(path: Path, random: Random) -> str:
    data = bytearray(path.read_bytes())
    at, other = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
    low, high = min(at, other), max(at, other)
    how = random.choice(
        ["flip", "set", "insert", "cut", "truncate", "double", "zero", "append", "empty", "bom", "huge"]
    )
    if how == "flip" and low < len(data):
        data[low] ^= 1 << random.randrange(8)
    elif how == "set" and low < len(data):
        data[low] = random.randrange(256)
    elif how == "insert":
        data[at:at] = random.randbytes(random.choice([1, 8, 1000]))
    elif how == "cut":
        del data[low:high]
    elif how == "truncate":
        del data[at:]
    elif how == "double":
        data[low:low] = data[low:high]
    elif how == "zero":
        data[low:high] = bytes(high - low)
    elif how == "append":
        data += random.choice([b"\n", b"\0", b"x", b"{}", bytes(data[:100])])
    elif how == "empty":
        data.clear()
    elif how == "bom":
        data[:0] = random.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\x80\x04", b"\x1f\x8b"])
    path.write_bytes(data)
    if how == "huge":  # sparse: a terabyte of zeros that takes no disk
        os.truncate(path, 10**12)
    return f"bytes: {how} at {at}, {other}"


def _kind_of_file(path: Path, random: Random) -> str:
    how = random.choice(["gone", "folder", "fifo", "loop", "zero", "passwd", "dangling", "hard link", "sibling"])
    content = path.read_bytes()
    outside = path.parent.parent / "outside"
    outside.write_bytes(content[: random.randrange(len(content) + 1)])
    sibling = random.choice([p for p in path.parent.iterdir() if p != path] or [outside])
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "hard link":
        path.hardlink_to(outside)
    elif how != "gone":
        targets = {"loop": path.name, "zero": "/dev/zero", "passwd": "/etc/passwd", "dangling": "../nowhere"}
        path.symlink_to(targets.get(how, sibling.name))
    return f"file: {how}"


def _json(path: Path, random: Random) -> str:
    if random.random() < 0.1:
        return _bomb(path, random)
    return _write(path, random, json.loads(path.read_text()))


def _bomb(path: Path, random: Random) -> str:
    how = random.choice(["deep", "deep objects", "wide", "long number", "long string"])
    text = {
        "deep": "[" * 200_000,
        "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "wide": '{"a": [' + "[]," * 3_000_000 + "[]]}",
        "long number": '{"rank": ' + "9" * 1_000_000 + "}",
        "long string": '{"rank": "' + "x" * 20_000_000 + '"}',
    }[how]
    path.write_text(text)
    return f"json: {how}"


def _write(path: Path, random: Random, value: Any) -> str:
    """One change somewhere in the tree of `value`, written to `path`."""
    places = list(_places(value))
    holder, key = random.choice(places)
    how = random.choice(["odd", "odd", "near", "delete", "add", "twice"])
    if how == "odd":
        holder[key] = random.choice(_ODD)
    elif how == "near":
        holder[key] = _near(holder[key], random)
    elif how == "delete":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[random.choice(["extra", "", "..", "auto_map", "__metadata__", "training "])] = random.choice(_ODD)
    elif how == "add":
        holder.insert(0, random.choice(_ODD))
    text = _dumps(value)
    if how == "twice":
        (name, content), *_ = random.sample(list(value.items()), 1)
        other = random.choice([content, *_ODD])
        text = f"{text.rstrip()[:-1]}, {json.dumps(name)}: {_dumps(other)}}}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"json: {how} {key!r:.40}"


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _near(value: Any, random: Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([value + 1, value - 1, value * 2, -value, float(value) + 0.5])
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return value[:at] + random.choice(["x", "0", "", "/", "\n", "é"]) + value[at + random.randrange(2) :]
    if isinstance(value, list):
        return random.choice([value[1:], value + value[:1], value[::-1], [value]])
    return random.choice([list(value or {}), str(value)])


def _places(value: Any) -> Any:
    """(holder, key) of everything inside `value`."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _header(path: Path, random: Random) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if random.random() < 0.15:
        length = random.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        return f"header: length {length}"
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    size = len(body)
    how = random.choice(["shape", "offsets", "overlap", "swap", "rename", "dtype", "drop", "copy", "tree"])
    if how == "shape":
        entry["shape"] = random.choice([*_ODD, [*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][::-1]])
    elif how == "offsets":
        first, last = entry["data_offsets"]
        ends = [[last, first], [first - 4, last], [first, last + 4], [first, size * 2], [-1, last], [0, 2**62]]
        entry["data_offsets"] = random.choice(ends)
    elif how == "overlap":
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif how == "swap":
        header[name], header[other] = header[other], header[name]
    elif how == "rename":
        near = [name + "x", name[:-1], name.upper()]
        header[random.choice(["..", "", "/etc/passwd", "\n", "__metadata__", *near])] = header.pop(name)
    elif how == "dtype":
        entry["dtype"] = random.choice(["F64", "F16", "BF16", "I32", "BOOL", "F99", "", None, 4, "f32"])
    elif how == "drop":
        del header[name]
    elif how == "copy":
        header[name + "2"] = dict(entry)
    scratch = path.with_name("header.json")
    if how == "tree":
        how = _bomb(scratch, random) if random.random() < 0.1 else _write(scratch, random, header)
    else:
        scratch.write_bytes(_dumps(header).encode("utf-8", "surrogatepass"))
    text = scratch.read_bytes()
    scratch.unlink()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"header: {how} {name}"


def _body(path: Path, random: Random) -> str:
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + 4 * random.randrange(max(1, (len(data) - start) // 4))
    how, value = random.choice([("nan", float("nan")), ("inf", float("-inf")), ("zero", 0.0), ("big", 3e38)])
    data[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    return f"body: {how} at {at}"


def _lines(path: Path, random: Random) -> str:
    lines = path.read_text().split("\n")
    at = random.randrange(len(lines))
    words = [*_ODD, *('"unclosed', "[tasks.'../x']", 'data = "../../etc"', "rank = -1", "rank = 1e9", "[[basis]]")]
    how = random.choice(["drop", "double", "odd", "swap", "deep", "join", "character"])
    if how == "drop":
        del lines[at]
    elif how == "double":
        lines.insert(at, lines[at])
    elif how == "odd":
        word = random.choice(words)
        lines.insert(at, word if isinstance(word, str) else _dumps(word))
    elif how == "swap":
        random.shuffle(lines)
    elif how == "deep":
        lines.insert(at, random.choice(["x = " + "[" * 20_000, '{"prompt": ' + "[" * 200_000, "a." * 50_000 + "b = 1"]))
    elif how == "join":
        lines[at : at + 2] = ["".join(lines[at : at + 2])]
    elif lines[at]:
        place = random.randrange(len(lines[at]))
        new = random.choice(['"', "{", "}", "[", ":", ",", "\\", "\0", "é", "=", "#", "9", "-", "\ud800", "\r"])
        lines[at] = lines[at][:place] + new + lines[at][place + 1 :]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"lines: {how} at {at}"
