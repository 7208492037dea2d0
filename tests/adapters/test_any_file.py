"""Whatever lies in an adapter's folder: an artefact, or an error that names file and place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapters.errors import BadAdapter
from adapters.formats.artefact import LARGEST_ALPHA, TEMPERATURES, Artefact, inside
from adapters.formats.header import TensorInfo, read_header
from adapters.formats.inspect import read_artefact
from steering.heads import HeadError, find_head, header
from tests.strange import NUMBERS, SURROGATE, deep, spoiled, values
from tests.tiers import examples

TMP = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(150)
)
LONGEST = 1000
"""Letters of an error: a name of a megabyte must not come back."""

LORA = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"],
    "rank_pattern": {}, "alpha_pattern": {"q_proj": 8}, "use_rslora": False, "use_dora": False,
    "init_lora_weights": True, "modules_to_save": None,
}  # fmt: skip
PACK = {"layout": "native", "top_k": 1, "temperature": 1.5, "tasks": ["one", "two"]}
RELEASED = {"layout": "released", "rank": 2, "alpha": 4, "top_k": 2, "temperature": 1,
            "tasks": ["one", "two"]}  # fmt: skip
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


WEIGHTS = {f"{PREFIX}.lora_A.weight": (4, 16), f"{PREFIX}.lora_B.weight": (8, 4)}
GATES = {"model.layers.0.self_attn.q_proj.moe_gate.weight": (2, 16)}
WHOLE = {f"{PREFIX}.moe_gate.weight": (2, 16), f"{PREFIX}.lora_A.weight": (4, 16),
         f"{PREFIX}.lora_B.weight": (8, 4)}  # fmt: skip


def save(folder: Path, config: str, document: Any, file: str, shapes: Any) -> None:
    """One config and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config).write_bytes(json.dumps(document).encode())
    save_file(tensors(**shapes), folder / file)


def lora(folder: Path, document: Any) -> None:
    save(folder, "adapter_config.json", document, "adapter_model.safetensors", WEIGHTS)


def native(folder: Path, document: Any) -> None:
    for task in ("one", "two"):
        lora(folder / task, LORA)
    save(folder, "meteora.json", document, "gates.safetensors", GATES)


def released(folder: Path, document: Any) -> None:
    save(folder, "meteora.json", document, "model.safetensors", WHOLE)


def check_error(error: Exception) -> None:
    assert str(error).strip() and len(str(error)) < LONGEST, str(error)[:2000]
    str(error).encode()


def read(folder: Path) -> Artefact | None:
    """The artefact; None if it was refused, in a sentence that can be sent."""
    try:
        found = read_artefact(folder)
    except BadAdapter as error:
        check_error(error)
        error.field.encode()
        return None
    scales = [part.scale for parts in found.parts for part in parts.values()]
    assert all(map(math.isfinite, scales))
    assert TEMPERATURES[0] <= found.temperature <= TEMPERATURES[1]
    return found


def of(**shapes: tuple[int, ...]) -> Callable[[Path, Any], None]:
    """Makes adapters with some tensors of the one layer, or of the whole."""
    names = {n if n.startswith("base_model") else f"{PREFIX}.{n}": s for n, s in shapes.items()}
    return lambda folder, document: save(
        folder, "adapter_config.json", document, "adapter_model.safetensors", names
    )


TARGETS = {"target_modules": ["q_proj"]}
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, **TARGETS,
           "rank_pattern": {f"{PREFIX[17:]}.lora_E": [True, False, True, True]}}  # fmt: skip
VERA = {"peft_type": "VERA", "r": 4, "save_projection": True, **TARGETS}
IA3 = {"peft_type": "IA3", "feedforward_modules": [], "exclude_modules": "x", **TARGETS}
PRODUCT = {"lora_A.weight": (4, 16), "lora_B.weight": (8, 4)}

MAKERS: dict[str, tuple[Callable[[Path, Any], None], dict[str, Any]]] = {
    "lora": (lora, LORA), "native": (native, PACK), "released": (released, RELEASED),
    "dora": (of(**PRODUCT, lora_magnitude_vector=(8,)), LORA | {"use_dora": True}),
    "adalora": (of(lora_A=(3, 16), lora_B=(8, 3), lora_E=(3, 1)), ADALORA),
    "vera": (of(vera_lambda_b=(8,), vera_lambda_d=(4,),
                **{"base_model.vera_A": (4, 16), "base_model.vera_B": (8, 4)}), VERA),
    "ia3": (of(ia3_l=(8, 1)), IA3),
}  # fmt: skip
KINDS = {"native": "meteora", "released": "meteora"}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_sound_ones_are_read(tmp_path: Path, kind: str) -> None:
    make, document = MAKERS[kind]
    make(tmp_path, document)
    found = read(tmp_path)
    assert found is not None and found.kind == KINDS.get(kind, kind)


@pytest.mark.parametrize("kind", MAKERS)
@TMP
@given(data=st.data())
def test_one_strange_value_in_a_config(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    make, document = MAKERS[kind]
    odd = data.draw(spoiled(st.just(document), values(tuple(document), finite=False),
                            tuple(document)))  # fmt: skip
    make(tmp_path, odd)
    read(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "ia3"])
@TMP
@given(data=st.data())
def test_a_number_that_no_weight_may_have_is_refused(
    tmp_path: Path, kind: str, data: st.DataObject
) -> None:
    make, document = MAKERS[kind]
    names = [key for key, value in document.items() if type(value) in (int, float)]
    key = data.draw(st.sampled_from(names))
    number = data.draw(st.sampled_from((*NUMBERS, math.nan, math.inf)))
    make(tmp_path, {**document, key: number})
    found = read(tmp_path)
    largest = 1e6 if key == "temperature" else LARGEST_ALPHA
    if type(number) is bool or not abs(number) <= largest:
        # The alpha of a pattern hides the config's own.
        assert found is None or (key, kind) in (("lora_alpha", "lora"), ("lora_alpha", "dora")), (
            key,
            number,
        )


@pytest.mark.parametrize("alpha", [10**400, -(10**400), math.nan, math.inf, "8", True, None])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: Any) -> None:
    lora(tmp_path, {**LORA, "alpha_pattern": {}, "lora_alpha": alpha})
    with pytest.raises(BadAdapter, match=r"lora_alpha: .*allowed: finite numbers"):
        read_artefact(tmp_path)


@TMP
@given(raw=st.binary(max_size=60) | values().map(lambda v: json.dumps(v).encode()))
@pytest.mark.parametrize("name", ["adapter_config.json", "meteora.json"])
def test_any_config_is_read_or_refused(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    "pattern",
    ["a{99999999999}", "(" * 3000 + ")" * 3000, "(?P<x>", "(?<=a*)", "[", "\\", "a**", SURROGATE],
)
def test_a_pattern_that_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    lora(tmp_path, {**LORA, "rank_pattern": {pattern: 4}})
    if read(tmp_path) is None:
        with pytest.raises(BadAdapter, match="rank_pattern"):
            read_artefact(tmp_path)
    else:
        assert pattern == SURROGATE


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "a/" * 3000, "\x00", "../x", SURROGATE])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadAdapter) as raised:
        inside(tmp_path, name)
    check_error(raised.value)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "x")
    with pytest.raises(BadAdapter):
        inside(tmp_path, "x")


# ---- headers -------------------------------------------------------------------------------

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
SOUND = {"a": ENTRY, "b": {"dtype": "U8", "shape": [], "data_offsets": [16, 17]},
         "__metadata__": {"format": "pt"}}  # fmt: skip


def put(path: Path, text: bytes, data: int = 17) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def look(path: Path) -> None:
    """Both readers take it or refuse it in a sentence."""
    for reader in (read_header, header):
        try:
            reader(path)
        except (BadAdapter, HeadError) as error:
            check_error(error)


@TMP
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    )
)
def test_what_the_library_writes_is_read_as_it_is(
    tmp_path: Path, wanted: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path / "t.safetensors"
    save_file({n: np.zeros(shape, DTYPES[dtype]) for n, (dtype, shape) in wanted.items()}, path)
    found = read_header(path)
    assert {n: (i.dtype, list(i.shape)) for n, i in found.items()} == wanted
    assert all(isinstance(info, TensorInfo) for info in found.values())


@TMP
@given(raw=st.binary(max_size=80))
def test_any_bytes_are_a_header_or_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(raw)
    look(path)
    look(put(path, raw))


@settings(TMP, max_examples=examples(400))
@given(document=spoiled(st.just(SOUND), values(tuple(ENTRY), finite=False), tuple(ENTRY))
       | values(("a", *ENTRY)))  # fmt: skip
def test_one_strange_value_in_a_header(tmp_path: Path, document: Any) -> None:
    look(put(tmp_path / "t.safetensors", json.dumps(document).encode()))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "document",
    [
        {"a": {**ENTRY, "dtype": ["F32"]}},
        {"a": {**ENTRY, "dtype": {}}},
        {"a": {**ENTRY, "shape": [1] * 2_000_000}},
        {"a": {**ENTRY, "shape": [2**47] * 400_000}},
        {"a": {**ENTRY, "shape": [-1, -4]}},
        {"a": {**ENTRY, "shape": [True, 4]}},
        {"a": {**ENTRY, "data_offsets": [0, 10**400]}},
        {"a" * 1_000_000: {**ENTRY, "dtype": "?"}},
        {SURROGATE: {**ENTRY, "dtype": "?"}},
        {"a": deep(900)},
        [ENTRY], "a", 1, None,
    ],
)  # fmt: skip
def test_headers_that_cost_or_break_something_are_refused(tmp_path: Path, document: Any) -> None:
    path = put(tmp_path / "t.safetensors", json.dumps(document).encode(), 16)
    with pytest.raises(BadAdapter) as raised:
        read_header(path)
    check_error(raised.value)
    raised.value.field.encode()
    look(path)


# ---- heads ---------------------------------------------------------------------------------

NAMES = ("weight", "bias", "0.weight", "0.bias", "1.weight", "2.weight", "00.weight", "x.weight",
         "-1.weight", "9" * 5000 + ".weight", "v_head.summary.weight", "score.weight",
         "classifier.weight", "lm_head.weight", "base_model.model.score.weight")  # fmt: skip


@settings(TMP, max_examples=examples(300))
@given(
    shapes=st.dictionaries(
        st.sampled_from(NAMES), st.lists(st.integers(1, 4), max_size=3).map(tuple), max_size=4
    ),
    config=st.none() | values(("activation",)) | st.just({"activation": "relu"}),
    kind=st.sampled_from(["value", "classifier"]),
)
def test_any_tensors_are_a_head_or_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: Any, kind: Any
) -> None:
    save_file(tensors(**shapes), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        found = find_head(tmp_path, kind, 4, 2)
    except HeadError as error:
        str(error).encode()
        return
    assert found.width == 4
    assert all(len(layer.weight.shape) == 2 for layer in found.layers)
