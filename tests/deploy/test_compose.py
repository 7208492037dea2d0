"""deploy/compose.yaml: valid for Compose, and what it mounts and configures is right."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings.file import parse
from tests.deploy.test_images import tool

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy"
FILES = [FOLDER / "compose.yaml", FOLDER / "compose.cuda.yaml"]


def compose() -> dict[str, Any]:
    """The file as it stands."""
    found: dict[str, Any] = yaml.safe_load(FILES[0].read_text())
    return found


def accepted(*files: Path) -> bool:
    """Whether the files fit the Compose specification's schema."""
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, check=False)
    return done.returncode == 0


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Path in the container → path here, of what is mounted from the repository."""
    parts = [volume.split(":") for volume in service.get("volumes", [])]
    return {part[1]: part[0] for part in parts if part[0].startswith(".")}


def test_the_files_fit_the_compose_specification() -> None:
    assert accepted(*FILES)


def test_the_schema_refuses_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(FILES[0].read_text().replace("restart: unless-stopped", "restarts: always"))
    assert not accepted(file)


def test_what_services_refer_to_is_there() -> None:
    document = compose()
    services = document["services"]
    assert set(services) == {"server", "redis", "prometheus", "alertmanager", "grafana"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for name, wanted in service.get("depends_on", {}).items():
            assert wanted == {"condition": "service_healthy"} and "healthcheck" in services[name]
        named = [v.split(":")[0] for v in service["volumes"] if not v.startswith(".")]
        assert set(named) <= set(document["volumes"])
        used = {entry["source"] for entry in service.get("configs", [])}
        assert used <= set(document["configs"])
    build = services["server"]["build"]
    assert f"AS {build['target']}\n" in (ROOT / build["dockerfile"]).read_text()


@pytest.mark.parametrize("name", ["server", "prometheus", "alertmanager", "grafana"])
def test_mounted_files_are_there(name: str) -> None:
    found = mounts(compose()["services"][name])
    assert found
    for path in found.values():
        assert (FOLDER / path).exists(), path


def test_images_are_pinned_and_ports_stay_on_this_machine() -> None:
    for service in compose()["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), service["image"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "no-new-privileges:true" in service["security_opt"]


def test_no_key_has_a_default() -> None:
    text = FILES[0].read_text()
    for name in ("ADMIN_KEY", "API_KEYS", "METRICS_KEY"):
        assert re.search(rf"\$\{{COXSWAIN_{name}:\?[^}}]+\}}", text)
    assert "${GRAFANA_PASSWORD:?" in text


def test_the_servers_configuration_is_one() -> None:
    """Its paths are those of the mounts."""
    service = compose()["services"]["server"]
    here = {inside: (FOLDER / path).resolve() for inside, path in mounts(service).items()}
    text = here["/etc/coxswain/server.yaml"].read_text().replace("/zoo/", f"{here['/zoo']}/")
    config = parse(yaml.safe_load(text), FOLDER, {"COXSWAIN_ADMIN_KEY": "a-key-of-the-test"})
    models = [config.model, *(s.model for s in config.streams.values() if s.model)]
    assert config.adapters is not None and config.registry is not None
    sources = [entry.source for entry in config.adapters.preload]
    for path in [*models, *sources, *config.adapters.roots]:
        assert Path(str(path)).is_dir(), path
    assert config.registry.url is not None and "//redis:" in str(config.registry.url)
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > config.server.drain_timeout_s + 20


def test_grafana_gets_a_data_source_and_its_dashboards() -> None:
    document = compose()
    (source,) = yaml.safe_load(document["configs"]["datasource"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(document["configs"]["dashboards"]["content"])["providers"]
    assert provider["options"]["path"] in mounts(document["services"]["grafana"])


def test_prometheus_gets_the_servers_key() -> None:
    """What the server asks for, from one variable, where Prometheus' configuration reads it."""
    document = compose()
    server = document["services"]["server"]["environment"]["COXSWAIN_AUTH__METRICS_KEY"]
    (secret,) = document["services"]["prometheus"]["secrets"]
    variable = document["secrets"][secret]["environment"]
    assert server.startswith(f"${{{variable}:?")
    scraping = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text())
    (job, gpus) = scraping["scrape_configs"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    ((manager,),) = (
        a["static_configs"][0]["targets"] for a in scraping["alerting"]["alertmanagers"]
    )
    assert manager.split(":")[0] in document["services"]
    # The GPUs' exporter comes with the CUDA file, as does its target.
    cuda = yaml.safe_load(FILES[1].read_text())["services"]
    (here, there, _) = cuda["prometheus"]["volumes"][0].split(":")
    (pattern,) = gpus["file_sd_configs"][0]["files"]
    assert Path(there).match(f"/etc/prometheus/{pattern}")
    (targets,) = yaml.safe_load((FOLDER / here).read_text())
    assert {target.split(":")[0] for target in targets["targets"]} <= set(cuda)
