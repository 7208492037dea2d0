"""The Helm chart, rendered by Helm itself, and checked against the schemas of Kubernetes and of the
custom resources that it may make (schemas/README.md).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser as promql
import pytest
import yaml

from server.launch import SHUTDOWN_S
from server.paths import is_admin, is_model
from server.settings.file import parse
from tests.deploy.monitoring import ALERTS, DASHBOARD

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has a build for x86-64 only")

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "coxswain"
VALUES: dict[str, dict[str, Any]] = {
    file.name.removesuffix("-values.yaml"): yaml.safe_load(file.read_text())
    for file in sorted((CHART / "ci").glob("*-values.yaml"))
}
CUSTOM = {
    file.stem: json.loads(file.read_text())
    for file in sorted(Path(__file__).with_name("schemas").glob("*.json"))
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
                several = kind == "Secret" or name == "demo-coxswain-admin"
                key = f"{kind} {name}" if several else kind
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
    assert {"Deployment", "Service", "Service demo-coxswain-admin", "ServiceAccount"} <= set(
        objects
    )
    for document in objects.values():
        if document["kind"] in CUSTOM:
            jsonschema.validate(document, CUSTOM[document["kind"]])
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_every_kind_that_the_chart_can_make_is_among_the_examples() -> None:
    made = {d["kind"] for values in VALUES.values() for d in rendered(values).values()}
    texts = [file.read_text() for file in sorted((CHART / "templates").glob("*.yaml"))]
    assert made == {kind for text in texts for kind in re.findall(r"^kind: (\w+)$", text, re.M)}
    assert set(CUSTOM) <= made and len(VALUES) == 5


def test_the_schemas_refuse_what_is_wrong() -> None:
    deployment = rendered(VALUES["small"])["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


@pytest.mark.parametrize(("example", "kind", "path"), [
    ("monitored", "ServiceMonitor", ["spec", "endpoints", 0]),
    ("monitored", "PrometheusRule", ["spec", "groups", 0, "rules", 0]),
    ("cuda", "ScaledObject", ["spec", "triggers", 0]),
    ("gateway", "HTTPRoute", ["spec", "rules", 0, "matches", 0]),
    ("gateway", "InferencePool", ["spec", "endpointPickerRef"]),
])  # fmt: skip
def test_the_custom_schemas_refuse_unknown_fields(example: str, kind: str, path: list[Any]) -> None:
    document = rendered(VALUES[example])[kind]
    inner: Any = document
    for step in path:
        inner = inner[step]
    inner["pathh"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="pathh"):
        jsonschema.validate(document, CUSTOM[kind])


@pytest.mark.parametrize("name", VALUES)
def test_the_server_takes_its_file(name: str) -> None:
    """Every value as it was given, numbers too, and nothing else."""
    values = VALUES[name]
    document = server_file(rendered(values))
    parse(document, Path("/"), {"COXSWAIN_ADMIN_KEY": "a-key-of-the-test"})
    given = values["config"]
    server = document.pop("server")
    assert server.pop("admin_port") == 8001
    assert server == given.get("server", {})
    ours = ("adapters", "server")
    assert {key: document[key] for key in given if key not in ours} == {
        key: value for key, value in given.items() if key not in ours
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


@pytest.mark.parametrize("server", [
    {}, {"drain_timeout_s": 5}, {"drain_timeout_s": 600, "drain_notice_s": 60},
    {"drain_timeout_s": 0.4, "drain_notice_s": 0.7},
])  # fmt: skip
def test_the_grace_period_covers_drain_and_end(server: dict[str, float]) -> None:
    config = {**VALUES["small"]["config"], "server": server}
    objects = rendered(merged(VALUES["small"], config=config, preStopSeconds=7))
    (command, seconds) = container(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert (command, seconds) == ("sleep", "7")
    settings = parse(config, Path("/"), {}).server
    drain = math.ceil(settings.drain_notice_s + settings.drain_timeout_s)
    # HTTP, registry and twice the engine, each at most SHUTDOWN_S: server/launch.py.
    assert pod(objects)["terminationGracePeriodSeconds"] == 7 + drain + 25
    assert 4 * SHUTDOWN_S < 25


def test_a_rollout_needs_no_spare_gpu_unless_values_say_so() -> None:
    def strategy(name: str) -> Any:
        return rendered(VALUES[name])["Deployment"]["spec"]["strategy"]

    assert strategy("cuda")["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert strategy("gateway")["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert strategy("hub")["type"] == "Recreate"


def test_the_autoscaler_counts_what_waits_for_adapters_too() -> None:
    objects = rendered(VALUES["cuda"])
    scaler = objects["ScaledObject"]["spec"]
    (trigger,) = scaler["triggers"]
    query = trigger["metadata"]["query"]
    promql.parse(query)
    pods = '{namespace="prod",pod=~"demo-coxswain-.+"}'
    assert f"vllm:num_requests_waiting{pods}" in query
    assert f"coxswain_adapter_waiting{pods}" in query
    assert trigger["metadata"]["threshold"] == "4"
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert (scaler["minReplicaCount"], scaler["maxReplicaCount"]) == (2, 6)
    assert "replicas" not in objects["Deployment"]["spec"]
    assert rendered(VALUES["small"])["Deployment"]["spec"]["replicas"] == 1


def test_a_token_of_the_hub_and_what_else_a_site_needs_reach_the_server() -> None:
    values = VALUES["hub"]
    objects = rendered(values)
    found = container(objects)
    assert found["envFrom"] == values["envFrom"]
    assert [e for e in found["env"] if e in values["extraEnv"]] == values["extraEnv"]
    assert values["extraVolumeMounts"][0] in found["volumeMounts"]
    assert values["extraVolumes"][0] in pod(objects)["volumes"]
    assert pod(objects)["initContainers"] == values["initContainers"]
    account = objects["ServiceAccount"]["metadata"]
    assert account["annotations"] == values["serviceAccount"]["annotations"]
    assert pod(objects)["serviceAccountName"] == account["name"]
    assert objects["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    shared = rendered(VALUES["cuda"])["PersistentVolumeClaim"]["spec"]["accessModes"]
    assert shared == ["ReadWriteMany"]
    other = rendered(merged(values, serviceAccount={"create": False, "name": "theirs"}))
    assert "ServiceAccount" not in other and pod(other)["serviceAccountName"] == "theirs"


def test_administration_has_a_port_and_a_service_of_its_own() -> None:
    objects = rendered(VALUES["gateway"])
    assert server_file(objects)["server"]["admin_port"] == 8001
    ports = {port["name"]: port["containerPort"] for port in container(objects)["ports"]}
    assert ports == {"http": 8000, "admin": 8001}
    (http,) = objects["Service"]["spec"]["ports"]
    (admin,) = objects["Service demo-coxswain-admin"]["spec"]["ports"]
    assert (http["targetPort"], admin["targetPort"]) == ("http", "admin")
    policy = objects["NetworkPolicy"]["spec"]
    by_port = {rule["ports"][0]["port"]: rule["from"] for rule in policy["ingress"]}
    wanted = VALUES["gateway"]["networkPolicy"]
    assert by_port == {"http": wanted["from"], "admin": wanted["adminFrom"]}
    shut = rendered(merged(VALUES["gateway"], networkPolicy={"enabled": True}))["NetworkPolicy"]
    (rule,) = shut["spec"]["ingress"]
    assert rule == {"ports": [{"port": "http", "protocol": "TCP"}],
                    "from": [{"namespaceSelector": {}}]}  # fmt: skip
    together = rendered(merged(VALUES["small"], admin={"port": 0}))
    assert "server" not in server_file(together)
    assert "Service demo-coxswain-admin" not in together


def test_prometheus_gets_the_key_of_the_metrics() -> None:
    objects = rendered(VALUES["monitored"])
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    reference = endpoint["authorization"]["credentials"]
    secret = objects[f"Secret {reference['name']}"]["stringData"]
    assert secret[reference["key"]] == "metrics-key-0123"
    environ = {e["name"]: e["valueFrom"]["secretKeyRef"]["key"] for e in container(objects)["env"]}
    assert environ == {
        "COXSWAIN_ADMIN_KEY": "admin-key",
        "COXSWAIN_AUTH__METRICS_KEY": "metrics-key",
    }
    given = {"COXSWAIN_ADMIN_KEY": "a-key", "COXSWAIN_AUTH__METRICS_KEY": "metrics-key-0123"}
    parsed = parse(server_file(objects), Path("/"), given)
    assert parsed.auth.metrics_key is not None and len(parsed.auth.api_keys) == 2
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert "prometheus.io/scrape" not in annotations


def test_what_prometheus_watches_is_called_as_the_rules_call_it() -> None:
    objects = rendered(VALUES["monitored"])
    monitor, service = objects["ServiceMonitor"]["spec"], objects["Service"]
    labels = service["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    admin = objects["Service demo-coxswain-admin"]["metadata"]["labels"]
    assert not monitor["selector"]["matchLabels"].items() <= admin.items()
    assert labels[monitor["jobLabel"]] == "coxswain"
    assert monitor["endpoints"][0]["port"] in {p["name"] for p in service["spec"]["ports"]}
    assert objects["PrometheusRule"]["spec"] == yaml.safe_load(ALERTS.read_text())
    shown = json.loads(objects["ConfigMap"]["data"]["coxswain.json"])
    assert shown == json.loads(DASHBOARD.read_text())


def test_the_route_goes_to_the_service_or_to_the_pool() -> None:
    (rule,) = rendered(VALUES["monitored"])["HTTPRoute"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "demo-coxswain", "port": 80}]
    paths = [match["path"]["value"] for match in rule["matches"]]
    assert all(is_model(f"{path}/x") for path in paths) and not any(map(is_admin, paths))
    objects = rendered(VALUES["gateway"])
    (rule,) = objects["HTTPRoute"]["spec"]["rules"]
    pool = objects["InferencePool"]
    (target,) = rule["backendRefs"]
    assert pool["apiVersion"] == f"{target['group']}/v1"
    assert (target["kind"], target["name"]) == (pool["kind"], pool["metadata"]["name"])
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]


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


def test_a_changed_file_or_key_restarts_the_replicas() -> None:
    def checksums(values: Mapping[str, Any]) -> list[str]:
        template = rendered(values)["Deployment"]["spec"]["template"]
        annotations = template["metadata"]["annotations"]
        return [annotations[f"checksum/{what}"] for what in ("config", "keys")]

    small = VALUES["small"]
    changed = {**small["config"], "served_model_name": "other"}
    config, keys = checksums(small)
    assert checksums(merged(small, preStopSeconds=3)) == [config, keys]
    assert checksums(merged(small, config=changed))[0] != config
    other = checksums(merged(small, keys={**small["keys"], "api": ["another-key-0123"]}))
    assert other[0] == config and other[1] != keys


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keys": {}}, "keys: give keys.existingSecret"),
        ({"config": {}}, "model"),
        ({"config": {"model": "/m", "adapters": {}}}, "registry.url: replicas with adapters"),
        ({"config": {"model": "/m", "auth": {"admin_key": "x"}}}, "config.auth.admin_key: keys"),
        ({"config": {"model": "/m", "auth": {"api_keys": ["x"]}}}, "belong in `keys.api`"),
        ({"config": {"model": "/m", "auth": {"api_keys": [{"key": "x"}]}}}, "as sha256:"),
        (
            {
                "config": {
                    "model": "/m",
                    "auth": {"api_keys": [{"key": "sha256:0", "profiles": []}]},
                }
            },
            "metrics.key: must be true",
        ),
        ({"metrics": {"key": True}}, "keys.metrics: a key for Prometheus"),
        ({"replicas": 2}, "persistence.accessModes: 2 replicas share one claim"),
        ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
        ({"gateway": {"pool": {"enabled": True}}}, "gateway.pool.endpointPicker.name"),
        ({"admin": {"port": 8000}}, "port"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"replicas": 0}, "replicas"),
        ({"replicaCount": 2}, "replicaCount"),
    ],
)
def test_impossible_values_are_refused_with_a_reason(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(helm.HelmError, match=says):
        rendered(merged(VALUES["small"], **changes))
