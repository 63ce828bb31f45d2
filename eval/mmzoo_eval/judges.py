"""Judges: language models that read answers. What one said is kept, so that nobody is asked, or paid, twice."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

from mmzoo.errors import InputError
from mmzoo_eval.benchmark import Judge, Message


def find_judge(name: str) -> Judge:
    """The function at "package.module:function". Raises InputError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"There is no judge at {name!r}: {error}. Write package.module:function.") from error
    if not callable(found):
        raise InputError(f"{name} is no function of messages.")
    return found


class RecordedJudge:
    """A judge whose replies are kept in a file, a line each, and taken from there when the same is asked again.

    Args:
        judge: messages with "role" and "content" -> reply.
        path: of the file; it is made, or added to.
    """

    def __init__(self, judge: Judge, path: Path):
        self.judge, self.path = judge, path
        self.replies: dict[str, str] = {}
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                row = json.loads(line)
                self.replies[row["asked"]] = row["reply"]
            except (ValueError, TypeError, KeyError):  # a line that was cut off
                continue

    def __call__(self, messages: list[Message]) -> str:
        asked = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
        if asked not in self.replies:
            self.replies[asked] = self.judge(messages)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                line = json.dumps({"asked": asked, "reply": self.replies[asked]}, ensure_ascii=False)
                file.write(b"\n" + line.encode() + b"\n")
        return self.replies[asked]
