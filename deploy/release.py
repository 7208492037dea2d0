"""A release: `python -m deploy.release 0.2.0`, on a clean main.

Writes the version wherever it stands, dates the changelog, builds the source archive and the wheel,
looks into the wheel, commits and tags. Pushing and uploading are left to a person.
`python -m deploy.release --check`: whether all places have one version.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_IMAGE = r"(\d+\.\d+\.\d+)-(?:cpu|cuda)\b"
PLACES = (
    ("pyproject.toml", r'^version = "(.+)"$'),
    ("deploy/helm/coxswain/Chart.yaml", r"^(?:version|appVersion): (.+)$"),
    ("deploy/helm/coxswain/values.yaml", _IMAGE),
    ("deploy/helm/coxswain/ci/cuda-values.yaml", _IMAGE),
    ("deploy/compose.yaml", _IMAGE),
    ("deploy/compose.cuda.yaml", _IMAGE),
    ("deploy/Dockerfile", _IMAGE),
    ("docs/deploy/docker.md", _IMAGE),
)
"""(file, pattern whose group is the version), of every place."""

PACKAGES = ("adapters", "server", "steering")


class NotReady(Exception):
    """There can be no release yet; says why."""


def versions(root: Path) -> dict[str, set[str]]:
    """File → the versions that stand in it."""
    return {
        file: set(re.findall(pattern, (root / file).read_text("utf-8"), re.MULTILINE))
        for file, pattern in PLACES
    }


def check(root: Path) -> str:
    """The one version.

    Raises:
        NotReady: there is none, or there are several.
    """
    found = versions(root)
    every = set().union(*found.values())
    if len(every) != 1 or not all(found.values()):
        raise NotReady(f"not one version everywhere: {found}")
    return every.pop()


def write(root: Path, version: str, today: datetime.date) -> None:
    """Puts a version into every place, and its date into the changelog.

    Raises:
        NotReady: the changelog has no section for it.
    """
    changelog = root / "CHANGELOG.md"
    text, title = changelog.read_text("utf-8"), f"## {version} (unreleased)\n"
    if title not in text:
        raise NotReady(f"CHANGELOG.md: no section {title.strip()!r}")
    changelog.write_text(text.replace(title, f"## {version} ({today.isoformat()})\n"), "utf-8")
    for file, pattern in PLACES:
        place = root / file

        def written(found: re.Match[str]) -> str:
            return found[0].replace(found[1], version)

        text = re.sub(pattern, written, place.read_text("utf-8"), flags=re.MULTILINE)
        place.write_text(text, "utf-8")


def build(root: Path, folder: Path) -> Path:
    """The source archive and the wheel; the latter's path. Needs setuptools and no network."""
    code = (
        "import sys; from setuptools import build_meta as made; folder = sys.argv[1]; "
        "made.build_sdist(folder); print(made.build_wheel(folder))"
    )
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=root, check=True, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    return folder / done.stdout.split()[-1]


def look_into(wheel: Path) -> list[str]:
    """The files of a wheel.

    Raises:
        NotReady: something is missing, or is there that should not be.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [f"{package}/py.typed" for package in PACKAGES if f"{package}/py.typed" not in names]
    if missing:
        raise NotReady(f"{wheel.name} lacks {', '.join(missing)}")
    others = [
        name for name in names if name.split("/")[0] not in PACKAGES and ".dist-info/" not in name
    ]
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt"))]
    if others or weights:
        raise NotReady(f"{wheel.name} has what does not belong there: {[*others, *weights][:5]}")
    return names


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def release(root: Path, version: str, today: datetime.date) -> None:
    """Makes one.

    Raises:
        NotReady: says why there can be none.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise NotReady(f"{version!r} is no version: three numbers with dots between")
    if _git(root, "status", "--porcelain"):
        raise NotReady("the working tree has changes: commit or stash them")
    if _git(root, "branch", "--show-current") != "main":
        raise NotReady("releases are made on main")
    if f"v{version}" in _git(root, "tag", "--list").split():
        raise NotReady(f"the tag v{version} is there already")
    if "example.org" in (root / "pyproject.toml").read_text("utf-8"):
        raise NotReady("pyproject.toml: project.urls still has the placeholder example.org")
    check(root)
    write(root, version, today)
    look_into(build(root, root / "dist"))
    _git(root, "commit", "--quiet", "--all", "--message", f"Release {version}")
    _git(root, "tag", "--annotate", "--message", f"Coxswain {version}", f"v{version}")


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.release", description=__doc__)
    parser.add_argument("version", nargs="?")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    try:
        if args.check or args.version is None:
            print(check(ROOT))
            return 0
        release(ROOT, args.version, datetime.datetime.now(datetime.UTC).date())
    except NotReady as error:
        print(f"no release: {error}", file=sys.stderr)
        return 1
    print(f"v{args.version} is committed and tagged; dist/ has what to upload. Push both.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
