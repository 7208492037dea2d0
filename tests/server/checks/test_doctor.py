"""The doctor: each problem in one line, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from safetensors.torch import load_file

from server.checks.capacity import ROOM, cpu_cache_bytes
from server.checks.checkpoints import Unusable, inspect
from server.checks.doctor import diagnose
from server.loading import engine_arguments
from server.main import run
from server.settings.file import parse
from steering.vocabulary import Overlap
from tests.adapters.test_vector_files import write_gguf
from tests.models import make_model
from tests.server.live import document

PLAIN: dict[str, Any] = {"method": "mix", "weights": {"base": 1.0}}
"""A profile that does not steer."""


def problems(models: Path, **changes: Any) -> list[str]:
    return diagnose(parse({**document(), **changes}, models, {})).problems


def test_a_good_configuration_has_no_problems_and_a_table(models: Path) -> None:
    found = diagnose(parse(document(), models, {}))
    assert found.problems == []
    assert set(found.overlaps) == {"base", "chat", "plain", "twin"}
    text = found.table()
    for word in ("stream", "LlamaForCausalLM", "Qwen2ForCausalLM", "KV bytes/token", "(shared)"):
        assert word in text
    # base: 2 (K, V) × 2 layers × 2 heads × 32 numbers × 4 bytes
    assert found.streams["base"].kv_bytes == 1024
    assert found.streams["chat"].shared == 500


def test_the_command_prints_the_reasons_and_exits_1(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = models / "doctor.yaml"
    file.write_text(yaml.safe_dump(document()))
    assert run(["doctor", str(file)]) == 0
    assert "no problems" in capsys.readouterr().out
    file.write_text(yaml.safe_dump(document(streams={"chat": {"model": "./gone"}})))
    assert run(["doctor", str(file)]) == 1
    told = capsys.readouterr().out
    assert "✗ streams.chat: no such folder" in told
    assert "✗ profiles.big-chat.anti_expert: no such stream" in told


def test_a_preload_may_be_one_file_of_vectors(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = json.loads((models / "base" / "config.json").read_text())["hidden_size"]
    file = models / "doctor-vectors.yaml"
    for name, n, status in (("Good.gguf", 1, 0), ("Bad.gguf", 0, 1)):
        write_gguf(models / "vectors" / name, {f"direction.{n}": np.ones(size, np.float32)})
        preload = [{"name": "v", "source": f"./vectors/{name}"}]
        adapters = {"roots": ["./vectors"], "vectors": True, "preload": preload}
        file.write_text(yaml.safe_dump(document(adapters=adapters)))
        assert run(["doctor", str(file)]) == status
    assert "vectors.gguf: direction.0: unexpected tensor" in capsys.readouterr().out
    preload = [{"name": "v", "source": "./vectors/Good.gguf"}]
    adapters = {"roots": ["./vectors"], "vectors": False, "preload": preload}
    file.write_text(yaml.safe_dump(document(adapters=adapters)))
    assert run(["doctor", str(file)]) == 1
    assert "set adapters.vectors to true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"registry": {"url": "redis://x"}}, "registry: records adapters, and there is no"),
        ({"adapters": {"roots": ["/none"]}}, "adapters.roots.0: no such directory: /none"),
        ({"adapters": {"preload": [{"name": "m@1", "source": "hf://a/b"}]}},
         "adapters.preload.0.name: not a usable name (got 'm@1')"),
        ({"adapters": {"preload": [{"name": "m", "source": "hf://a/b"}]}},
         "adapters.preload.0.source: "),
        ({"adapters": {"max_loaded": 1, "remotes": ["hf://"],
                       "preload": [{"name": "m", "source": "hf://a/b", "pin": True}]}},
         "adapters.preload: 1 are pinned; allowed: fewer than adapters.max_loaded, 1"),
        ({"plugins": ["no-such-package"]}, "plugins: the configuration allows steering methods"),
        ({"engine": {"max_modle_len": 1}}, "did you mean max_model_len?"),
        ({"engine": {"pipeline_parallel_size": 2}}, "engine.pipeline_parallel_size: refused"),
        ({"engine": {"decode_context_parallel_size": 2}}, "engine.decode_context_parallel_size"),
        ({"engine": {"prefill_context_parallel_size": 2}}, "engine.prefill_context_parallel_size"),
        ({"engine": {"tensor_parallel_size": 3}},
         "streams.chat: 2 attention heads cannot be split over engine.tensor_parallel_size: 3"),
        ({"engine": {"data_parallel_rank": 0}}, "engine.data_parallel_rank: refused (got 0)"),
        ({"engine": {"enable_dbo": True}}, "engine.enable_dbo: refused"),
        ({"engine": {"enable_prompt_embeds": True}}, "engine.enable_prompt_embeds: refused"),
        ({"engine": {"load_format": "pt"}}, "engine.load_format: refused"),
        ({"chat": {"tool_call_parser": "nope"}}, "chat.tool_call_parser: no such parser"),
        (
            {"engine": {"structured_outputs_config": {"backend": "auto"}}},
            "engine.structured_outputs_config: refused",
        ),
        ({"chat": {"template": "{% for"}}, "chat.template: not a chat template: unexpected"),
        ({"server": {"tls": {"certificate": "gone.pem", "key": "gone.key"}}},
         "server.tls.certificate: "),
        ({"chat": {"reasoning_parser": "nope"}}, "chat.reasoning_parser: no such parser"),
        ({"engine": {"pipeline_parallel_size": "x"}}, "engine.pipeline_parallel_size: not a"),
        ({"engine": {"max_model_len": 1000}}, "streams.chat: holds 512 tokens, requests may have"),
        ({"engine": {"kv_cache_memory_bytes": 1000, "max_model_len": 512}},
         "engine.kv_cache_memory_bytes: 1000 B cannot hold one request of 512 tokens"),
        ({"engine": {"kv_cache_memory_bytes": 10**15, "max_model_len": 512}}, "memory: "),
        ({"profiles": {"p": {**PLAIN, "adapters": [{"name": "v"}]}}},
         "profiles.p.adapters: this server has no adapters"),
        ({"profiles": {"p": {**PLAIN, "adapters": [{"name": "v", "weight": 99.0}]}}},
         "profiles.p.adapters.0.weight: out of range (got 99.0); allowed: [-10, 10]"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_served_is_one_line(
    models: Path, changes: dict[str, Any], line: str
) -> None:
    assert any(line in found for found in problems(models, **changes))


def test_the_base_s_padded_rows_are_known_even_if_all_streams_are_twins(tmp_path: Path) -> None:
    make_model(tmp_path / "base", "llama", vocab_size=512)
    config = parse({"model": "./base", "streams": {"twin": {"same_as": "base"}}}, tmp_path, {})
    found = diagnose(config)
    assert found.problems == []
    for name in ("base", "twin"):
        assert Overlap.from_wire(found.overlaps[name]).padded.tolist() == list(range(500, 512))
        assert found.streams[name].shared == 500
    settings = engine_arguments(config, found)["additional_config"]["coxswain"]
    assert settings["overlaps"] == found.overlaps


def test_on_a_cpu_the_cache_leaves_memory_to_others(models: Path) -> None:
    def cache(**engine: Any) -> int | None:
        config = parse(document(engine={"dtype": "float32", **engine}), models, {})
        return cpu_cache_bytes(config, diagnose(config))

    # base and twin 1024 bytes per token each; chat and plain, see make_model.
    one = cache(max_num_seqs=1, max_model_len=512)
    assert one is not None
    assert one % 512 == 0
    assert one // 512 > 2 * 1024
    assert cache(max_num_seqs=3, max_model_len=512) == 3 * one
    assert cache(max_model_len=512) == ROOM * one
    assert cache(max_num_seqs=1, max_model_len=256) == one // 2
    assert cache(kv_cache_memory_bytes=1) is None
    assert cache(gpu_memory_utilization=0.5) is None


def test_on_a_cpu_engines_share_the_memory(models: Path) -> None:
    most = int(psutil.virtual_memory().available * 0.6)

    def problems(engines: int) -> list[str]:
        engine = {"kv_cache_memory_bytes": most, "data_parallel_size": engines}
        return diagnose(parse(document(engine=engine), models, {})).problems

    assert problems(1) == []
    (line,) = problems(2)
    assert line.endswith("of free memory for each engine"), line


def test_a_profile_is_resolved_at_start(models: Path) -> None:
    profiles = {
        "a": {"method": "mix", "weights": {"nope": 1}},
        "b": {"method": "nope"},
        "c": {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 99},
        "d": {
            "method": "mix",
            "weights": {"base": 1, "chat": 1},
            "prompts": {"chat": {"chat_template": "{{ x"}},
        },
    }
    found = problems(models, profiles=profiles)
    assert any(line.startswith("profiles.a.weights.nope: no such stream") for line in found)
    assert any(line.startswith("profiles.b.method: no such method") for line in found)
    assert any(line.startswith("profiles.c.strength:") and "[0, 10]" in line for line in found)
    assert any(line.startswith("profiles.d.prompts.chat.chat_template: not a") for line in found)


def _broken(models: Path, tmp_path: Path, change: Callable[[Path], None]) -> list[str]:
    """Problems with a changed copy of a companion."""
    folder = tmp_path / "broken"
    shutil.copytree(models / "chat", folder)
    change(folder)
    streams = {"chat": {"model": str(folder)}, "plain": {"model": "./plain"}}
    return [line for line in problems(models, streams=streams, profiles={}) if "chat" in line]


def _edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        settings.update(values)
        (folder / name).write_text(json.dumps(settings))

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = (token for token, index in vocabulary.items() if index in (20, 21))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_pickled, "are pickles"),
        (_cut, "cut short"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (_edit("config.json", architectures=[]), "names no architecture"),
        (_edit("config.json", architectures=["NopeForCausalLM"]), "architecture NopeForCausalLM"),
        (_edit("config.json", is_encoder_decoder=True), "is encoder-decoder"),
        (
            _edit("config.json", architectures=["PaliGemmaForConditionalGeneration"]),
            "PaliGemmaForConditionalGeneration reads more than text",
        ),
        (_edit("config.json", architectures=["MambaForCausalLM"]), "is recurrent"),
        (_edit("config.json", head_dim=20), "heads of size 20; the CPU backend has 32"),
        (_swap_tokens, "token ids mean another token"),
    ],
)  # fmt: skip
def test_a_broken_model_is_one_line(
    models: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    found = _broken(models, tmp_path, change)
    assert any(words in line and line.startswith("streams.chat: ") for line in found), found
    assert all("\n" not in line for line in found)


def test_sizes_come_from_the_headers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "gpt2")
    point = inspect(str(folder))
    assert (point.layers, point.kv_heads, point.head_size, point.context) == (3, 2, 32, 512)
    assert point.file_bytes == point.parameters * 4
    assert point.weight_bytes("bfloat16") == point.parameters * 2
    assert point.kv_bytes("bfloat16") == 2 * 3 * 2 * 32 * 2


def test_a_checkpoint_that_reads_images_is_its_language_part(tmp_path: Path) -> None:
    """Numbers, bytes and shapes without the tower, also where config.json leaves defaults out."""
    folder = make_model(tmp_path / "m", "gemma3-vision")
    file, point = folder / "model.safetensors", inspect(str(folder))
    assert point.multimodal and (point.layers, point.kv_heads, point.head_size) == (3, 2, 32)
    tensors = load_file(file)
    language = [t for name, t in tensors.items() if name.startswith("language_model.")]
    assert 0 < len(language) < len(tensors)
    assert point.parameters == sum(t.numel() for t in language)
    assert point.file_bytes == 4 * point.parameters


def test_a_path_that_is_not_there_is_not_asked_from_the_hub() -> None:
    with pytest.raises(Unusable, match="no such folder"):
        inspect("./nowhere/model")
