"""Administrators, who load, replace, unload and pin adapters that others are using."""

from __future__ import annotations

import random
import time
from typing import Any

from load_tests.soak.client import PATIENCE_S, Book
from load_tests.soak.kinds import BAD_CONTENT, CONTENTS, SHARED, Json
from tests.server.adapting.answers import ABSENT, Name

ADAPTERS = "/admin/adapters"


class Desk:
    """What administrators call, written down.

    Args:
        book: shared.
        http: Locust's session.
        dice: of this administrator.
    """

    def __init__(self, book: Book, http: Any, dice: random.Random) -> None:
        self.book, self.http, self.dice = book, http, dice

    def call(self, what: str, method: str, path: str, *allowed: int, **options: Any) -> Json:
        """One operation; its answer has one of the allowed statuses.

        Returns:
            The answer, {} unless it is a success.
        """
        begin = time.time()
        label = f"adapters: {what}"
        with self.http.request(method, path, name=label, catch_response=True, timeout=PATIENCE_S,
                               **options) as raw:  # fmt: skip
            fine = raw.status_code in allowed
            raw.success() if fine else raw.failure(f"{raw.status_code}: {raw.text[:300]}")
            found: Json = (
                raw.json() if fine and raw.status_code < 300 and raw.text[:1] == "{" else {}
            )
        done = "done" if raw.status_code < 300 else "refused"
        self.book.write(at=begin, kind=label, outcome=done if fine else "failed",
                        status=raw.status_code, took=round(time.time() - begin, 4),
                        **({} if fine else {"why": str(raw.text)[:500]}))  # fmt: skip
        return found

    def until(self, name: str, *states: str) -> Json:
        """The record once it is in one of the states; {} stands for none, `gone`."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = self.call("look", "GET", f"{ADAPTERS}/{name}", 200, 404)
            if (found.get("state") or "gone") in states:
                return found
            time.sleep(0.2)
        self.book.write(at=time.time(), kind="adapters: wait", outcome="failed",
                        why=f"{name} was never {states}: {found}")  # fmt: skip
        return found

    def expect(self, true: bool, why: str) -> None:
        """Writes down what should not be."""
        if not true:
            self.book.write(at=time.time(), kind="adapters: state", outcome="failed", why=why)


class Owner:
    """The only one who changes some names: knows at each moment what they stand for."""

    def __init__(self, desk: Desk, names: list[Name]) -> None:
        self.desk, self.names, self.dice = desk, names, desk.dice
        self._versions = 0

    def act(self) -> None:
        """One change of one name."""
        name = self.dice.choice(self.names)
        if name.content == ABSENT:
            self.dice.choice((self._load, self._load, self._load_like_vllm))(name)
        else:
            acts = (self._replace, self._replace, self._unload, self._pin, self._pin, self._spoil)
            self.dice.choice(acts)(name)

    def _load(self, name: Name) -> None:
        self._submit("load", name, self.dice.choice(CONTENTS))

    def _replace(self, name: Name) -> None:
        others = [content for content in CONTENTS if content != name.content]
        self._submit("replace", name, self.dice.choice(others), replace=True)

    def _submit(self, what: str, name: Name, content: str, **more: Any) -> None:
        self._versions += 1
        body = {"name": name.name, "source": self.desk.book.sources[content],
                "version": str(self._versions), **more}  # fmt: skip
        name.may_be(name.content, content)
        self.desk.call(what, "POST", ADAPTERS, 202, json=body)
        record = self.desk.until(name.name, "ready", "failed")
        right = (record.get("state"), record.get("version")) == ("ready", str(self._versions))
        self.desk.expect(right, f"{what} of {content} as {name.name}: {record}")
        name.content = content
        name.may_be(content)

    def _load_like_vllm(self, name: Name) -> None:
        content = self.dice.choice(CONTENTS)
        body = {"lora_name": name.name, "lora_path": self.desk.book.sources[content]}
        name.may_be(ABSENT, content)
        self.desk.call("load", "POST", "/v1/load_lora_adapter", 200, json=body)
        name.content = content
        name.may_be(content)

    def _spoil(self, name: Name) -> None:
        """A replacement that cannot be served: what was there goes on serving."""
        body = {"name": name.name, "source": self.desk.book.sources[BAD_CONTENT], "replace": True}
        self.desk.call("replace by a spoiled one", "POST", ADAPTERS, 202, json=body)
        record = self.desk.until(name.name, "ready", "failed")
        right = record.get("state") == "failed" and "finite" in str(record.get("reason"))
        self.desk.expect(right, f"a spoiled adapter as {name.name}: {record}")

    def _unload(self, name: Name) -> None:
        name.may_be(name.content, ABSENT)
        if self.dice.random() < 0.5:
            self.desk.call("unload", "DELETE", f"{ADAPTERS}/{name.name}", 202)
        else:
            body = {"lora_name": name.name}
            self.desk.call("unload", "POST", "/v1/unload_lora_adapter", 200, json=body)
        # From the answer on nobody finds it, whatever still runs on it.
        name.may_be(ABSENT)
        name.content, name.pinned = ABSENT, False
        self.desk.until(name.name, "gone")

    def _pin(self, name: Name) -> None:
        verb = self.dice.choice(("pin", "unpin", "unpin"))
        found = self.desk.call(verb, "POST", f"{ADAPTERS}/{name.name}/{verb}", 200, 409)
        if found:
            name.pinned = verb == "pin"
            self.desk.expect(found["pinned"] == name.pinned, f"{verb} of {name.name}: {found}")


class Brawler:
    """One of several who change the same names without asking each other."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.dice = desk, desk.dice

    def act(self) -> None:
        """One operation."""
        name, verb = self.dice.choice(SHARED), self.dice.random()
        path = f"{ADAPTERS}/{name}"
        if verb < 0.45:
            source = self.desk.book.sources[self.dice.choice((*CONTENTS, BAD_CONTENT))]
            body = {"name": name, "source": source, "replace": self.dice.random() < 0.7}
            self.desk.call("load or replace, contested", "POST", ADAPTERS, 202, 409, json=body)
        elif verb < 0.65:
            self.desk.call("unload, contested", "DELETE", path, 202, 404)
        elif verb < 0.85:
            which = self.dice.choice(("pin", "unpin", "unpin"))
            self.desk.call(f"{which}, contested", "POST", f"{path}/{which}", 200, 404, 409)
        else:
            self.desk.call("list", "GET", ADAPTERS, 200)
