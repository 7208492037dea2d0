"""Administrators who load, replace, unload, pin and list, at random and at the same time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.server.adapting.answers import ABSENT, Name
from tests.server.adapting.expected import CONTENTS
from tests.server.adapting.kit import PATIENCE_S


@dataclass
class Office:
    """What the administrators of one server share.

    Args:
        client: with the server as its base URL.
        folders: sources by content; `bad` cannot be served.
        left: operations that are still to be done.
    """

    client: httpx.AsyncClient
    folders: dict[str, Path]
    left: int = 0
    done: Counter[str] = field(default_factory=Counter)

    async def call(
        self, what: str, method: str, path: str, *allowed: int, **options: Any
    ) -> httpx.Response:
        """One operation; its answer has one of the allowed statuses."""
        self.left -= 1
        answer = await self.client.request(method, path, **options)
        assert answer.status_code in allowed, (what, path, answer.status_code, answer.text)
        self.done[what if answer.is_success else f"{what}: {answer.status_code}"] += 1
        return answer

    async def until(self, name: str, *states: str) -> dict[str, Any]:
        """The record once it is in one of the states; {} stands for none, `gone`."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answer = await self.client.get(f"/admin/adapters/{name}")
                if answer.status_code == 404 and "gone" in states:
                    return {}
                record: dict[str, Any] = answer.json()
                if record.get("state") in states:
                    return record
                await asyncio.sleep(0.02)


@dataclass
class Owner:
    """The only one who changes some names: knows at each moment what they stand for."""

    office: Office
    names: Sequence[Name]
    dice: random.Random
    versions: int = 0

    async def run(self) -> None:
        """Changes them until the office has no more to do."""
        while self.office.left > 0:
            name = self.dice.choice(self.names)
            if name.content == ABSENT:
                act = self.dice.choice((self._load, self._load, self._load_like_vllm))
            else:
                act = self.dice.choice((self._replace, self._replace, self._unload, self._pin,
                                        self._pin, self._look, self._spoil))  # fmt: skip
            await act(name)

    async def _load(self, name: Name) -> None:
        await self._submit("load", name, self.dice.choice(CONTENTS))

    async def _replace(self, name: Name) -> None:
        others = [content for content in CONTENTS if content != name.content]
        await self._submit("replace", name, self.dice.choice(others), replace=True)

    async def _submit(self, what: str, name: Name, content: str, **more: Any) -> None:
        self.versions += 1
        body = {"name": name.name, "source": str(self.office.folders[content]),
                "version": str(self.versions), **more}  # fmt: skip
        name.may_be(name.content, content)
        await self.office.call(what, "POST", "/admin/adapters", 202, json=body)
        record = await self.office.until(name.name, "ready", "failed")
        assert record["state"] == "ready" and record["version"] == str(self.versions), record
        name.content = content
        name.may_be(content)

    async def _load_like_vllm(self, name: Name) -> None:
        content = self.dice.choice(CONTENTS)
        body = {"lora_name": name.name, "lora_path": str(self.office.folders[content])}
        name.may_be(ABSENT, content)
        await self.office.call("vLLM's load", "POST", "/v1/load_lora_adapter", 200, json=body)
        name.content = content
        name.may_be(content)

    async def _spoil(self, name: Name) -> None:
        """A replacement that cannot be served: what was there goes on serving."""
        body = {"name": name.name, "source": str(self.office.folders["bad"]), "replace": True}
        await self.office.call("bad replacement", "POST", "/admin/adapters", 202, json=body)
        record = await self.office.until(name.name, "ready", "failed")
        assert record["state"] == "failed" and "finite" in record["reason"], record

    async def _unload(self, name: Name) -> None:
        name.may_be(name.content, ABSENT)
        if self.dice.random() < 0.5:
            await self.office.call("unload", "DELETE", f"/admin/adapters/{name.name}", 202)
        else:
            await self.office.call("vLLM's unload", "POST", "/v1/unload_lora_adapter", 200,
                                   json={"lora_name": name.name})  # fmt: skip
        # From the answer on nobody finds it, whatever still runs on it.
        name.may_be(ABSENT)
        name.content, name.pinned = ABSENT, False
        await self.office.until(name.name, "gone")

    async def _pin(self, name: Name) -> None:
        verb = self.dice.choice(("pin", "unpin"))
        answer = await self.office.call(verb, "POST", f"/admin/adapters/{name.name}/{verb}",
                                        200, 409)  # fmt: skip
        if answer.is_success:
            name.pinned = verb == "pin"
            assert answer.json()["pinned"] == name.pinned
        else:
            assert verb == "pin" and "pinned" in answer.text

    async def _look(self, name: Name) -> None:
        answer = await self.office.call("list", "GET", "/admin/adapters", 200)
        records = {record["name"]: record for record in answer.json()["adapters"]}
        assert records[name.name]["pinned"] == name.pinned
        engine = answer.json()["engine"]
        assert engine["taken"] <= engine["slots"]


@dataclass
class Brawler:
    """One of several who change the same names without asking each other."""

    office: Office
    names: Sequence[Name]
    dice: random.Random

    async def run(self) -> None:
        """Changes them until the office has no more to do."""
        while self.office.left > 0:
            name, verb = self.dice.choice(self.names).name, self.dice.random()
            path = f"/admin/adapters/{name}"
            if verb < 0.45:
                source = self.office.folders[self.dice.choice((*CONTENTS, "bad"))]
                body = {"name": name, "source": str(source), "replace": self.dice.random() < 0.7}
                await self.office.call("brawl: submit", "POST", "/admin/adapters", 202, 409,
                                       json=body)  # fmt: skip
            elif verb < 0.65:
                await self.office.call("brawl: unload", "DELETE", path, 202, 404)
            elif verb < 0.85:
                which = self.dice.choice(("pin", "unpin", "unpin"))
                await self.office.call(f"brawl: {which}", "POST", f"{path}/{which}",
                                       200, 404, 409)  # fmt: skip
            else:
                await self.office.call("brawl: look", "GET", path, 200, 404)
            await asyncio.sleep(self.dice.uniform(0, 0.1))
