"""Requests that the server takes: without them nothing behind the first check would be reached."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.specs import Streams, specs

TOKENS, MOST = 8, 4
"""The server's `limits.max_output_tokens`; its `steering.max_top_k` and `steering.max_best_of`."""

REFERENCE = {"a": "kept-for-reference-a", "b": "kept-for-reference-b",
             "pack": "kept-for-reference-pack", "f": "kept-for-reference-f"}  # fmt: skip
"""What the adapters are called that answers are checked with: names that nobody makes up, so
nobody unloads them."""

FUZZED = ("fuzzed-0", "fuzzed-1")
"""Adapters that are loaded, replaced and unloaded. The first has a folder of its name."""

PROFILES = ("fuzzed-profile-0", "fuzzed-profile-1")
MODELS = ("big", "big-chat", "kinder", REFERENCE["a"], REFERENCE["pack"])
STREAMS = Streams(("chat", "plain", "twin"), ("value",), ("critic", "probe"), ("early",), most=MOST)
WORDS = ("Water boils at", "12 apples", "é", " ", "the old mill beside the bridge " * 3)

Body = dict[str, Any]


def steering() -> st.SearchStrategy[Any]:
    """The field `steering`."""
    overrides = st.fixed_dictionaries(
        {"profile": st.sampled_from(["big-chat", "kinder", PROFILES[0]])},
        optional={"report": st.sampled_from([True, "tokens"])},
    )
    return specs(STREAMS) | specs(STREAMS) | overrides | st.just("big-chat") | st.none()


def adapters() -> st.SearchStrategy[Any]:
    """The field `adapters`."""
    names = [*REFERENCE.values(), f"{REFERENCE['a']}@1", FUZZED[0]]
    lora = st.fixed_dictionaries(
        {"name": st.sampled_from(names)}, optional={"weight": st.floats(-10, 10)}
    )
    pack = st.fixed_dictionaries(
        {"name": st.just(REFERENCE["pack"])},
        optional={"top_k": st.integers(1, 3), "temperature": st.floats(1e-6, 1e6)},
    )
    return st.lists(lora | pack, max_size=2, unique_by=lambda one: one["name"]) | st.none()


def _sampling() -> dict[str, st.SearchStrategy[Any]]:
    return {
        "temperature": st.sampled_from([0, 0.7, 1, 2]),
        "top_p": st.sampled_from([0.1, 1]),
        "stream": st.booleans(),
        "steering": steering(),
        "adapters": adapters(),
    }


def _more() -> dict[str, st.SearchStrategy[Any]]:
    """Fields of the two completion APIs."""
    return {
        **_sampling(),
        "n": st.integers(1, 2),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.sampled_from([["a"], "the", []]),
        "min_p": st.sampled_from([0, 0.3]),
        "top_n_sigma": st.sampled_from([0.5, 2]),
        "presence_penalty": st.sampled_from([-2, 1.5]),
        "repetition_penalty": st.sampled_from([0.5, 1.2]),
        "logit_bias": st.sampled_from([{"17": -100}, {"499": 5.5}]),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 2),
        "stop_token_ids": st.sampled_from([[17], [2, 499], [2**31], [-1], [500]]),
        "return_token_ids": st.booleans(),
        "cache_salt": st.sampled_from(["x", "y"]),
        "echo": st.booleans(),
    }


def _messages() -> st.SearchStrategy[Any]:
    return st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]),
                               "content": st.sampled_from(WORDS)}),
        min_size=1, max_size=2,
    )  # fmt: skip


def _few() -> st.SearchStrategy[int]:
    return st.integers(1, 3)


def _named(name: str, names: tuple[str, ...], **more: Any) -> st.SearchStrategy[Body]:
    required = {name: st.sampled_from(names)}
    return st.fixed_dictionaries(required | more.pop("required", {}), optional=more)


def _sources(root: str) -> st.SearchStrategy[str]:
    """Folders: a sound adapter, one for another model, a pack, one with nothing, one elsewhere."""
    names = [FUZZED[0], FUZZED[0], "v0", "f", "pack", "nothing", "../base"]
    return st.sampled_from([f"{root}/{name}" for name in names])


def bodies(root: str) -> dict[str, st.SearchStrategy[Body]]:
    """Operation → bodies.

    Args:
        root: the folder that adapters may come from.
    """
    models = st.sampled_from(MODELS)
    prompts = st.sampled_from([*WORDS, [11, 40, 7], ["12 apples", "Water"], [[11, 40], [7]]])
    choices = {"logprobs": st.integers(0, 3), "prompt_logprobs": st.integers(0, 1)}
    fixed = st.fixed_dictionaries
    return {
        "POST /v1/completions": fixed(
            {"model": models, "prompt": prompts, "max_tokens": _few()},
            optional={**_more(), **choices},
        ),
        "POST /v1/chat/completions": fixed(
            {"model": models, "messages": _messages(), "max_completion_tokens": _few()},
            optional={**_more(), "logprobs": st.booleans(), "top_logprobs": st.integers(0, 2)},
        ),
        "POST /v1/responses": fixed(
            {"model": models, "input": st.sampled_from(WORDS), "max_output_tokens": _few()},
            optional={**_sampling(), "instructions": st.sampled_from(WORDS)},
        ),
        "POST /v1/messages": fixed(
            {"model": models, "messages": _messages(), "max_tokens": _few()},
            optional={**_sampling(), "system": st.sampled_from(WORDS), "top_k": st.integers(0, 5),
                      "stop_sequences": st.sampled_from([["a"], []])},
        ),
        "POST /v1/messages/count_tokens": fixed(
            {"model": models, "messages": _messages()},
            optional={"steering": steering(), "adapters": adapters(),
                      "system": st.sampled_from(WORDS)},
        ),
        "POST /invocations": fixed({"model": models, "prompt": prompts, "max_tokens": _few()})
        | fixed({"model": models, "messages": _messages(), "max_tokens": _few()},
                optional=_sampling()),
        "POST /tokenize": fixed({"model": models, "prompt": st.sampled_from(WORDS)})
        | fixed({"model": models, "messages": _messages()}),
        "POST /detokenize": fixed(
            {"model": models, "tokens": st.lists(st.integers(0, 499), max_size=5)}
        ),
        "PUT /admin/profiles/{name}": specs(STREAMS),
        "POST /admin/adapters": _named(
            "name", FUZZED, required={"source": _sources(root)},
            version=st.sampled_from(["1", "2"]), replace=st.booleans(), pin=st.booleans(),
            stream=st.sampled_from(["base", "base", "chat", "twin"]),
        ),
        "POST /v1/load_lora_adapter": _named(
            "lora_name", FUZZED, required={"lora_path": _sources(root)}, load_inplace=st.booleans()
        ),
        "POST /v1/unload_lora_adapter": _named("lora_name", FUZZED),
    }  # fmt: skip


def names(path: str) -> tuple[str, ...]:
    """What the part `{name}` of a path may be."""
    if path.startswith("/admin/profiles"):
        return (*PROFILES, *PROFILES, "big-chat", "big")
    if path.endswith("pin"):
        return (*FUZZED, REFERENCE["b"])  # whose answers that does not change
    return FUZZED if path.startswith("/admin/adapters") else (*MODELS, *FUZZED)
