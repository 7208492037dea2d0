"""Sources as text: what is one, what is refused, and where an allowed place ends."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import BadSource
from adapters.sources.source import Allowed, parse_source


@pytest.mark.parametrize(
    ("text", "kind", "canonical"),
    [
        ("/a//b/", "local", "/a/b"),
        ("file:///a/b%20c", "local", "/a/b c"),
        ("acme/lora", "hub", "hf://acme/lora"),
        ("hf://acme/lora/", "hub", "hf://acme/lora"),
        ("hf://acme/lora@v1.0/sub/x", "hub", "hf://acme/lora@v1.0/sub/x"),
        ("s3://bucket/a/b/", "s3", "s3://bucket/a/b"),
        ("HTTPS://Example.COM:443/a/", "web", "https://example.com/a"),
        ("http://[::1]:8080/a", "web", "http://[::1]:8080/a"),
    ],
)
def test_equal_places_have_equal_texts(text: str, kind: str, canonical: str) -> None:
    found = parse_source(text)
    assert (found.kind, found.text) == (kind, canonical)
    assert parse_source(found.text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("/" + "a" * 3000, "too long"),
        ("/a/../b", r"\.\. as a part"),
        ("https://h/a/%2e%2e/b", r"\.\. as a part"),
        ("https://h/a/%2E./b", r"\.\. as a part"),
        ("hf://acme/lora/../../x", r"\.\. as a part"),
        ("https://h/a%2f..%2fb", "encoded slashes"),
        ("https://h\\@evil/x", "backslashes"),
        ("/a\nb", "control"),
        ("/a%0ab", "control"),
        ("/a\x00", "control"),
        ("/a\u202eb", "control"),
        ("/a\u200bb", "control"),
        ("https://user:secret@h/a", "credentials"),
        ("https://h/a?token=x", "query"),
        ("https://h/a#x", "query"),
        ("https:///a", "host"),
        ("https://h:99999/a", "not a URL"),
        ("https://h/b//a", "empty path"),
        ("ftp://h/a", "not a source"),
        ("relative", "not a source"),
        ("a/b/c", "not a source"),
        ("file:a", "absolute"),
        ("file://host/a", "not a source"),
        ("s3://B/a", "not a bucket"),
        ("hf://acme", "not a repository"),
        ("hf://acme/lora@a/b@c//d", "not a repository"),
        ("https://h/a.zip", "archives"),
        ("/a/b.tar.gz/", "archives"),
        ("https://h/adapter_model.bin", "pickles"),
        ("https://h/x.PT", "pickles"),
        ("https://h/adapter_model.safetensors", "give the folder"),
    ],
)
def test_what_hides_something_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadSource, match=says):
        parse_source(text)


def test_an_error_does_not_repeat_a_secret() -> None:
    with pytest.raises(BadSource) as caught:
        parse_source("https://user:secret@h/a")
    assert "secret" not in str(caught.value)


_PIECES = st.sampled_from(["/", "..", ".", "a", "hf://", "https://h", "@", "%2e", "%00", "%2f", ":",
                           "s3://bb1", "?", "\\", "\n", "é", "\u202e", "acme/lora"])  # fmt: skip


@given(st.one_of(st.text(max_size=40), st.lists(_PIECES, max_size=8).map("".join)))
def test_whatever_is_accepted_is_plain(text: str) -> None:
    try:
        found = parse_source(text)
    except BadSource:
        return
    assert parse_source(found.text) == found
    plain = unquote(found.text)
    assert not any(part in (".", "..") for part in plain.split("/"))
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in plain)
    if found.kind == "local":
        assert found.text.startswith("/")


def test_an_allowed_place_ends_at_a_boundary(tmp_path: Path) -> None:
    allowed = Allowed((), ("hf://acme", "hf://one/repo", "https://h/loras", "s3://bucket/x"))
    for good in ("hf://acme/a", "hf://one/repo", "hf://one/repo@v1/sub", "https://h/loras/a",
                 "https://H:443/loras", "s3://bucket/x/y"):  # fmt: skip
        allowed.check(parse_source(good))
    for bad in ("hf://acme2/a", "hf://one/repo2", "https://h/loras2/a", "https://h2/loras/a",
                "http://h/loras/a", "https://h:8443/loras/a", "s3://bucket/xy",
                "/tmp"):  # fmt: skip
        with pytest.raises(BadSource, match="not"):
            allowed.check(parse_source(bad))
    Allowed((), ("hf://",)).check(parse_source("any/thing"))
    with pytest.raises(BadSource, match="roots is empty"):
        Allowed().check(parse_source(str(tmp_path)))


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "x", outside):
        folder.mkdir(parents=True)
    (root / "out").symlink_to(outside)
    (outside / "in").symlink_to(root / "x")
    allowed = Allowed((root,))
    with pytest.raises(BadSource, match="not under an allowed root"):
        allowed.check(parse_source(str(root / "out")))
    allowed.check(parse_source(str(outside / "in")))
    allowed.check(parse_source(str(root / "out" / "in")))
