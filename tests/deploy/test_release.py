"""Versions, the release script, and what is in the wheel; nothing leaves this machine."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from deploy import release

ROOT = Path(__file__).parents[2]
TODAY = datetime.date(2030, 1, 2)
COPIED = ("adapters", "deploy", "docs/deploy", "server", "steering")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what a release touches, and with weights, which must stay outside."""
    root = tmp_path_factory.mktemp("release") / "source"
    root.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / file, root)
    for folder in COPIED:
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    weights = root / "zoo" / "models" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(4_000_000))
    (root / "zoo" / "__init__.py").touch()
    project = root / "pyproject.toml"
    project.write_text(project.read_text().replace("example.org", "forge.test"))
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text()
    changelog.write_text(text.replace("# Changelog\n", "# Changelog\n\n## 9.8.7 (unreleased)\n", 1))
    (root / ".gitignore").write_text("/build/\n/dist/\n*.egg-info/\n")
    git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "add", "--all")
    git(root, "-c", "user.name=T", "-c", "user.email=t@forge.test", "commit", "-qm", "all")
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True)


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A clone of it, for one test."""
    root = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(original), str(root))
    git(root, "config", "user.name", "Test")
    git(root, "config", "user.email", "test@forge.test")
    return root


def test_all_places_have_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert release.check(ROOT) == version
    assert f"## {version} (" in (ROOT / "CHANGELOG.md").read_text()


def test_a_release_without_a_public_address_is_refused(source: Path) -> None:
    project = source / "pyproject.toml"
    text = project.read_text()
    git(source, "checkout", "--quiet", "-b", "placeholder")
    project.write_text(text.replace("forge.test", "example.org"))
    with pytest.raises(release.NotReady, match="changes"):
        release.release(source, "9.8.7", TODAY)
    git(source, "commit", "--quiet", "-am", "x")
    with pytest.raises(release.NotReady, match="on main"):
        release.release(source, "9.8.7", TODAY)
    git(source, "checkout", "--quiet", "main")
    git(source, "reset", "--quiet", "--hard", "placeholder")
    with pytest.raises(release.NotReady, match=r"example\.org"):
        release.release(source, "9.8.7", TODAY)
    git(source, "reset", "--quiet", "--hard", "HEAD~1")
    with pytest.raises(release.NotReady, match="three numbers"):
        release.release(source, "9.8", TODAY)
    with pytest.raises(release.NotReady, match=r"CHANGELOG\.md: no section '## 1\.2\.3"):
        release.release(source, "1.2.3", TODAY)


@pytest.mark.slow
def test_a_release_writes_builds_looks_commits_and_tags(source: Path) -> None:
    release.release(source, "9.8.7", TODAY)
    assert release.check(source) == "9.8.7"
    assert "## 9.8.7 (2030-01-02)\n" in (source / "CHANGELOG.md").read_text()
    told = subprocess.run(
        ["git", "log", "-1", "--format=%s %D"], cwd=source, capture_output=True, text=True
    ).stdout
    assert "Release 9.8.7" in told and "tag: v9.8.7" in told
    with pytest.raises(release.NotReady, match=r"v9\.8\.7 is there already"):
        release.release(source, "9.8.7", TODAY)
    (wheel,) = (source / "dist").glob("*.whl")
    names = release.look_into(wheel)
    assert {"server/playground/index.html", "server/operation/engine_logs.json"} <= set(names)
    assert [name for name in names if name.startswith("adapters/") and name.endswith(".cpp")]
    assert wheel.stat().st_size < 3_000_000, "weights weigh more"
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        assert not [name for name in opened.getnames() if ".safetensors" in name]


def test_a_wheel_with_weights_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for package in release.PACKAGES[:2]:
            archive.writestr(f"{package}/py.typed", "")
    with pytest.raises(release.NotReady, match=r"lacks steering/py\.typed"):
        release.look_into(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("steering/py.typed", "")
        archive.writestr("zoo/models/model.safetensors", "")
    with pytest.raises(release.NotReady, match="does not belong"):
        release.look_into(wheel)
