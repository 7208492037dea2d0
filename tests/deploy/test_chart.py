"""The Helm chart, rendered by Helm itself and checked against the schemas of Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.launch import SHUTDOWN_S
from server.settings.file import parse

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has a build for x86-64 only")

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "coxswain"
VALUES: dict[str, dict[str, Any]] = {
    file.name.removesuffix("-values.yaml"): yaml.safe_load(file.read_text())
    for file in sorted((CHART / "ci").glob("*-values.yaml"))
}
KUBERNETES = ("1.27", "1.32", "1.37")
"""The oldest that the chart takes, one between, and the newest that there are schemas of."""


def merged(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Values with some replaced."""
    return {**values, **changes}


def rendered(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind; Secrets by name."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values), name="demo", namespace="prod")
    found = {}
    for path, text in texts.items():
        for document in yaml.safe_load_all(text) if path.endswith(".yaml") else ():
            if document:
                kind, name = document["kind"], document["metadata"]["name"]
                key = f"Secret {name}" if kind == "Secret" else kind
                assert key not in found
                found[key] = document
    return found


def pod(objects: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The pod's specification."""
    found: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return found


def container(objects: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The one container."""
    (found,) = pod(objects)["containers"]
    return dict(found)


def server_file(objects: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The server's configuration."""
    text = objects["Secret demo-coxswain-config"]["stringData"]["server.yaml"]
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("name", VALUES)
def test_helm_lint_finds_nothing(name: str) -> None:
    report = helm.lint(str(CHART), VALUES[name], strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", VALUES)
def test_every_object_fits_kubernetes(name: str, version: str) -> None:
    objects = rendered(VALUES[name])
    assert {"Deployment", "Service", "ServiceAccount", "PersistentVolumeClaim"} <= set(objects)
    for document in objects.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    deployment = rendered(VALUES["small"])["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("name", VALUES)
def test_the_server_takes_its_file(name: str) -> None:
    """Every value as it was given, numbers too, and nothing else."""
    values = VALUES[name]
    document = server_file(rendered(values))
    parse(document, Path("/"), {"COXSWAIN_ADMIN_KEY": "a-key-of-the-test"})
    given = values["config"]
    assert {key: document[key] for key in given if key != "adapters"} == {
        key: value for key, value in given.items() if key != "adapters"
    }
    assert set(document) - set(given) <= {"registry"}
    if "adapters" in given:
        assert document["registry"]["url"] == values["registry"]["url"]
        assert document["adapters"].pop("store") == "/var/lib/coxswain/adapters"
        assert document["adapters"] == given["adapters"]


def test_probes_ask_the_two_questions_apart() -> None:
    found = container(rendered(VALUES["small"]))
    paths = {probe: found[f"{probe}Probe"]["httpGet"]["path"] for probe in
             ("startup", "liveness", "readiness")}  # fmt: skip
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    assert found["args"][-1] == str(ports["http"])


@pytest.mark.parametrize("drain_s", [None, 5, 600])
def test_the_grace_period_covers_drain_and_end(drain_s: int | None) -> None:
    config = {**VALUES["small"]["config"]}
    if drain_s is not None:
        config["server"] = {"drain_timeout_s": drain_s}
    objects = rendered(merged(VALUES["small"], config=config, preStopSeconds=7))
    (command, seconds) = container(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert (command, seconds) == ("sleep", "7")
    drain = parse(config, Path("/"), {}).server.drain_timeout_s
    # HTTP, registry and twice the engine, each at most SHUTDOWN_S: server/launch.py.
    assert pod(objects)["terminationGracePeriodSeconds"] >= 7 + drain + 4 * SHUTDOWN_S


def test_a_rolling_update_never_has_fewer_replicas() -> None:
    strategy = rendered(VALUES["small"])["Deployment"]["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_the_autoscaler_reads_the_queue_and_the_deployment_leaves_it_the_replicas() -> None:
    objects = rendered(VALUES["cuda"])
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    (metric,) = scaler["metrics"]
    rules = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())
    names = [rule["name"]["as"] for rule in rules["rules"]["custom"]]
    assert metric["pods"]["metric"]["name"] in names
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    assert "replicas" not in objects["Deployment"]["spec"]
    assert rendered(VALUES["small"])["Deployment"]["spec"]["replicas"] == 1
    assert "HorizontalPodAutoscaler" not in rendered(VALUES["small"])


def test_the_disruption_budget_and_the_service_select_the_pods() -> None:
    objects = rendered(VALUES["cuda"])
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels.items()
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_keys_come_from_a_secret_and_stand_nowhere_else() -> None:
    objects = rendered(VALUES["small"])
    secret = objects["Secret demo-coxswain-keys"]["stringData"]
    assert secret == {"api-keys": "first-key-0123", "admin-key": "admin-key-0123"}
    entries = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container(objects)["env"]}
    assert entries == {
        "COXSWAIN_API_KEYS": {"name": "demo-coxswain-keys", "key": "api-keys"},
        "COXSWAIN_ADMIN_KEY": {"name": "demo-coxswain-keys", "key": "admin-key"},
    }
    others = [d for key, d in objects.items() if key != "Secret demo-coxswain-keys"]
    assert "key-0123" not in str(others)
    existing = rendered(VALUES["cuda"])
    assert "Secret demo-coxswain-keys" not in existing
    assert container(existing)["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "coxswain-keys"


def test_the_pod_is_locked_down() -> None:
    objects = rendered(VALUES["cuda"])
    assert pod(objects)["securityContext"]["runAsNonRoot"] is True
    assert pod(objects)["automountServiceAccountToken"] is False
    context = container(objects)["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    mounted = {m["name"] for m in container(objects)["volumeMounts"]}
    assert mounted == {v["name"] for v in pod(objects)["volumes"]}


def test_a_changed_file_restarts_the_replicas() -> None:
    def checksum(values: Mapping[str, Any]) -> str:
        template = rendered(values)["Deployment"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    small = VALUES["small"]
    changed = {**small["config"], "served_model_name": "other"}
    assert checksum(small) == checksum(merged(small, replicas=3))
    assert checksum(small) != checksum(merged(small, config=changed))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keys": {}}, "keys: give keys.existingSecret"),
        ({"config": {}}, "model"),
        ({"config": {"model": "/m", "adapters": {}}}, "registry.url: replicas with adapters"),
        ({"config": {"model": "/m", "auth": {"admin_key": "x"}}}, "config.auth: keys belong in"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"replicas": 0}, "replicas"),
        ({"replicaCount": 2}, "replicaCount"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(helm.HelmError, match=says):
        rendered(merged(VALUES["small"], **changes))
