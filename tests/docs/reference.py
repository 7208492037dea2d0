"""Makes the reference pages from the code: `python -m tests.docs.reference` writes them.

The server's settings and flags have a command of their own (`coxswain reference`).
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import REGISTRY

import steering.method
import steering.plan
from server.app import build_app
from server.operation import metrics
from server.paths import PROBES, is_admin, needs_key
from server.routes import collector
from server.settings.config import Config
from steering.plugins import discover

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
NOTE = "Generated from the code by `python -m tests.docs.reference`; do not edit."

Schema = Mapping[str, Any]


def openapi() -> Schema:
    """The server's own schema, as `/openapi.json` gives it."""
    config = Config.model_validate({"model": "base"})
    app = build_app(config, discover())
    REGISTRY.unregister(app.state.present)
    schema: Schema = app.openapi_schema or {}
    return schema


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)


def sentence(text: str) -> str:
    """A description on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- request and response fields ------------------------------------------------------------------


def kind(schema: Schema) -> str:
    """What a value may be, in words of JSON."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name in SHAPES else "object"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(kind(one) for one in schema[several]))
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind(schema['additionalProperties'])}"
    return {None: "any"}.get(schema.get("type"), str(schema.get("type")))


def bounds(schema: Schema) -> str:
    """The range of a value; empty if the schema gives none."""
    found = []
    for one in (schema, *schema.get("anyOf", ())):
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"),
                          ("exclusiveMaximum", "<"), ("maxItems", "entries ≤")):  # fmt: skip
            if key in one:
                found.append(f"{sign} {one[key]:g}")
    return f" ({', '.join(found)})" if found else ""


def fields(schema: Schema, *, leave_out: Iterable[str] = ()) -> str:
    """The table of an object's fields."""
    required = schema.get("required", ())
    rows = []
    for name, one in schema["properties"].items():
        if name in leave_out:
            continue
        default = "required" if name in required else f"`{one['default']!r}`" if one.get(
            "default") not in (None, {}) else ""  # fmt: skip
        text = sentence(one.get("description", ""))
        rows.append([f"`{name}`", kind(one) + bounds(one), default, text])
    return table(("field", "value", "default", "meaning"), rows)


COMMON = ("method", "prompts", "report")
SHAPES = (
    "Reward", "ValueTerm", "OwnPrompt", "AdapterRef", "SteeringReport", "AdapterReport",
    "ReplyReport", "TokenReport", "StreamChoice", "ValuesReport", "BestReport", "Drafts",
    "BlockConfig", "ScoreConfig", "LogRatioConfig", "AcceptConfig", "FallbackConfig",
    "SearchReport", "RoundReport", "DrawReport",
)  # fmt: skip
"""Objects with a table of their own on the page."""
BODIES = {
    "POST /v1/chat/completions": "SteeredChatRequest",
    "POST /v1/completions": "SteeredCompletionRequest",
    "POST /v1/responses": "SteeredResponsesRequest",
    "POST /v1/messages": "SteeredMessagesRequest",
}


def fields_page(schema: Schema) -> str:
    """`docs/reference/fields.md`."""
    shapes = schema["components"]["schemas"]
    methods = [name for name in shapes if name.startswith("steering_")]
    common = {"properties": {n: shapes[methods[0]]["properties"][n] for n in COMMON[1:]}}
    parts = [
        "# Request and response fields",
        NOTE,
        (
            "Every request that draws takes two fields beside the API's own: `steering` and "
            "`adapters`. The answer has the field `steering` if the request asked for a report. "
            "`/openapi.json` of a running server has the same, with the methods that it has."
        ),
        "## `steering`",
        (
            "A profile's name, or an object: `method` with its options, or `profile` with options "
            "that change the profile's. The ranges of strengths and weights are the server's "
            "(`steering` in the [configuration](configuration.md))."
        ),
        "Options of every method:",
        fields(common),
    ]
    for name in methods:
        method = name.removeprefix("steering_")
        parts += [f"### `{method}`", fields(shapes[name], leave_out=COMMON)]
    parts += ["## Objects"]
    for name in SHAPES:
        parts += [f"### {name}", sentence(shapes[name].get("description", "")),
                  fields(shapes[name])]  # fmt: skip
    parts += ["## Fields of the APIs", "vLLM's own fields, which this server takes as vLLM does:"]
    parts.append(table(("request", "fields"), [
        [f"`{path}`", ", ".join(f"`{n}`" for n in sorted(shapes[name]["properties"])
                                if n not in ("steering", "adapters"))]
        for path, name in BODIES.items()]))  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


# --- routes ---------------------------------------------------------------------------------------


def who(path: str) -> str:
    """Which key a path needs."""
    if path in PROBES:
        return "none"
    if is_admin(path):
        return "admin key"
    if needs_key(path):
        return "API key"
    return "metrics key" if path == "/metrics" else "none"


def routes_page(schema: Schema) -> str:
    """`docs/reference/routes.md`."""
    rows = []
    for path, operations in sorted(schema["paths"].items()):
        for method, operation in operations.items():
            said = operation.get("description") or operation.get("summary", "")
            said = sentence(said.split("\n\n")[0])
            codes = ", ".join(sorted(c for c in operation["responses"] if c != "default"))
            rows.append([f"`{method.upper()} {path}`", who(path), said, codes])
    return "\n\n".join((
        "# HTTP routes",
        NOTE,
        ("Which keys there are, and what applies without them: [security](../deploy/security.md). "
        "What profiles, aliases and unknown fields do: [HTTP API](api.md). `/docs` of a running "
        "server shows the same with all fields."),
        table(("route", "key", "what it does", "statuses"), rows),
    )) + "\n"  # fmt: skip


# --- metrics --------------------------------------------------------------------------------------


def own_series() -> Iterator[tuple[str, str, str, str]]:
    """(name, kind, labels, meaning) of the series that are counted as requests pass."""
    for one in vars(metrics).values():
        if isinstance(one, MetricWrapperBase):
            name = one._name + ("_total" if one._type == "counter" else "")
            yield (
                name,
                str(one._type),
                ", ".join(f"`{n}`" for n in one._labelnames),
                str(one._documentation),
            )


def present_series() -> Iterator[tuple[str, str, str, str]]:
    """The same of those that are read when `/metrics` is asked: of a server without adapters'
    files, streams or requests.
    """
    residency = SimpleNamespace(slots=0, held={}, bytes=0, loads=0, evictions=0)
    manager = SimpleNamespace(
        loaded={}, records={}, feed=SimpleNamespace(away=None, losses=0, age_s=0.0)
    )
    adapters: Any = SimpleNamespace(
        manager=manager, loader=SimpleNamespace(residency=residency), missing=list
    )
    parts: Any = SimpleNamespace(
        state=SimpleNamespace(phase="ready", in_flight=0, start_s=0.0, silent_s=0.0),
        rates=SimpleNamespace(away=False),
        config=SimpleNamespace(name="base", server=SimpleNamespace(max_in_flight=0)),
        counters=SimpleNamespace(tokens={}, passes={}, steps=0),
        adapters=adapters,
    )
    present = collector.Present.__new__(collector.Present)
    present.look(parts)
    for one in present.collect():
        name = one.name + ("_total" if isinstance(one, CounterMetricFamily) else "")
        labels: tuple[str, ...] = getattr(one, "_labelnames", ())
        yield name, str(one.type), ", ".join(f"`{n}`" for n in labels), one.documentation


def metrics_page(_schema: Schema) -> str:
    """`docs/reference/metrics.md`."""
    rows = [
        [f"`{name}`", kind_, labels, sentence(text)]
        for name, kind_, labels, text in (*own_series(), *present_series())
    ]
    return "\n\n".join((
        "# Metrics",
        NOTE,
        ("Coxswain's own series at `/metrics`, beside vLLM's (`vllm:…`). "
        "[Operations](../deploy/operations.md#metrics) explains the labels, what *measured* means, "
        "and the alerts."),
        table(("series", "type", "labels", "meaning"), rows),
    )) + "\n"  # fmt: skip


# --- the plugin API -------------------------------------------------------------------------------

PLUGIN = (
    "Method", "MethodConfig", "OwnPrompt", "Snapshot", "Limits", "refusal", "merged", "log_softmax",
)  # fmt: skip
PLAN = (
    "Recipe", "Rule", "RuleKind", "Gate", "Ender", "RecipePhase", "Span", "Text", "Values", "Best",
)  # fmt: skip


def plugin_page(_schema: Schema) -> str:
    """`docs/reference/plugin-api.md`."""
    parts = [
        "# Plugin API",
        NOTE,
        (
            f"Contract version {steering.method.CONTRACT_VERSION}. A method is a class in a "
            "package of yours, found by the entry point group "
            f"`{steering.method.ENTRY_POINT_GROUP}`. "
            "[Write a method](../guide/write-a-method.md) is the tutorial; "
            "`steering.testing.MethodConformance` has the tests that every method must pass."
        ),
        "## `steering.method`",
    ]
    parts += [entry(getattr(steering.method, name)) for name in PLUGIN]
    parts += ["## Types of fields", table(("type", "accepts"), field_types())]
    parts += ["## `steering.plan`", *(entry(getattr(steering.plan, name)) for name in PLAN)]
    return "\n\n".join(parts) + "\n"


def field_types() -> list[list[str]]:
    """The annotated types of configs, with the text below each in the source."""
    body = ast.parse(inspect.getsource(steering.method)).body
    found = []
    for one, text in itertools.pairwise(body):
        if (
            isinstance(one, ast.Assign)
            and isinstance(one.targets[0], ast.Name)
            and ast.unparse(one.value).startswith("Annotated[")
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found.append([f"`{one.targets[0].id}`", sentence(str(text.value.value))])
    return found


def entry(thing: Any) -> str:
    """A heading, the signature and the docstring of a public name; of a class its own methods."""
    parts = [f"### `{thing.__name__}`", doc(thing)]
    if inspect.isfunction(thing):
        parts[0] = f"### `{thing.__name__}{signature(thing)}`"
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            if (
                inspect.isfunction(member)
                and not name.startswith("_")
                and name != "model_post_init"
            ):
                parts += [f"#### `{thing.__name__}.{name}{signature(member)}`", doc(member)]
    return "\n\n".join(parts)


def signature(thing: Any) -> str:
    """The parameters and the type of the result, as the source has them."""
    return str(inspect.signature(thing)).replace("'", "")


def doc(thing: Any) -> str:
    """A docstring as Markdown: the sections of arguments become lists."""
    text = inspect.getdoc(thing) or ""
    out: list[str] = []
    section = False
    for block in text.split("\n\n"):
        head, _, rest = block.partition("\n")
        if head in ("Args:", "Raises:"):
            lines: list[str] = []
            for line in textwrap.dedent(rest).splitlines():
                if line.startswith(" ") and lines:
                    lines[-1] += " " + line.strip()
                else:
                    lines.append(line)
            items = "\n".join("- " + _argument(line) for line in lines)
            out.append(f"{head.rstrip(':')}:\n\n{items}")
            section = True
        elif head == "Returns:":
            out.append(f"Returns: {' '.join(rest.split())}")
        else:
            out.append(textwrap.dedent(block) if section else block)
    return "\n\n".join(out)


def _argument(line: str) -> str:
    name, colon, text = line.partition(": ")
    return f"`{name}`: {text}" if colon and " " not in name else line


PAGES: dict[str, Callable[[Schema], str]] = {
    "fields.md": fields_page,
    "routes.md": routes_page,
    "metrics.md": metrics_page,
    "plugin-api.md": plugin_page,
}


def main() -> None:
    """Writes the pages."""
    schema = openapi()
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(schema), "utf-8")


if __name__ == "__main__":
    main()
