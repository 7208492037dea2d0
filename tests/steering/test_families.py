"""Which checkpoints can be a stream; the others are refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PretrainedConfig
from vllm.config.model import ModelArchConfigConvertorBase

from steering.errors import DoesNotFit
from steering.families import EXPERTS, beside_hybrid, is_hybrid, stream_architecture
from steering.language import LanguagePart, original_prefixes, renamed
from steering.worker.streams.config import prepare_experts


def config(architecture: str, **more: Any) -> Any:
    """What is looked at of a `transformers` config."""
    return SimpleNamespace(architectures=[architecture], **more)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("NopeForCausalLM", "vLLM does not support the architecture NopeForCausalLM"),
        ("PaliGemmaForConditionalGeneration", "PaliGemmaForConditionalGeneration reads more than"),
        ("MambaForCausalLM", "MambaForCausalLM is recurrent and has no attention"),
        ("JambaForCausalLM", "JambaForCausalLM is recurrent: .* this platform"),
        ("BertModel", "BertModel does not generate text"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(architecture: str, words: str) -> None:
    with pytest.raises(DoesNotFit, match=words):
        stream_architecture(config(architecture), base=True)


SPREAD: list[dict[str, Any]] = [{"data_parallel_size": 2}, {"enable_expert_parallel": True}]


@pytest.mark.parametrize("engine", SPREAD)
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize("count", EXPERTS)
def test_experts_do_not_run_on_several_engines(
    engine: dict[str, Any], base: bool, body: bool, count: str
) -> None:
    experts = config("MixtralForCausalLM", **{count: 8})
    with pytest.raises(DoesNotFit, match="MixtralForCausalLM is a mixture of experts"):
        stream_architecture(experts, base=base, body=body, engine=engine)
    assert stream_architecture(experts, base=base, body=body) == "MixtralForCausalLM"
    assert stream_architecture(config("LlamaForCausalLM"), base=base, engine=engine)


@pytest.mark.parametrize("count", EXPERTS)
def test_experts_are_counted_as_vllm_counts_them(count: str) -> None:
    """Else a stream would be one in the worker only, where ranks wait for each other."""
    found = ModelArchConfigConvertorBase(*2 * [PretrainedConfig(**{count: 8})])
    assert found.get_num_experts() == 8


@pytest.mark.parametrize("spread", SPREAD)
def test_the_worker_refuses_experts_too(spread: dict[str, Any]) -> None:
    """What no front end has looked at, of the base and of companions."""
    parallel = {"data_parallel_size": 1, "enable_expert_parallel": False, **spread}
    found: Any = SimpleNamespace(
        model_config=SimpleNamespace(is_moe=True), parallel_config=SimpleNamespace(**parallel)
    )
    for stream in ("base", "chat"):
        with pytest.raises(ValueError, match=f"stream '{stream}' is a mixture of experts"):
            prepare_experts(stream, found)
    found.model_config.is_moe = False
    prepare_experts("chat", found)


def test_latent_attention_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="DeepseekV3ForCausalLM has multi-head latent attention"):
        stream_architecture(config("DeepseekV3ForCausalLM", kv_lora_rank=512), base=True)


def test_a_hybrid_is_no_companion() -> None:
    hybrid = config("FalconH1ForCausalLM")
    with pytest.raises(DoesNotFit, match="can only be the base"):
        stream_architecture(hybrid, base=False)
    assert is_hybrid(hybrid.architectures[0]) and not is_hybrid("LlamaForCausalLM")


def test_each_thing_that_is_not_beside_a_hybrid_has_its_sentence() -> None:
    engine = {"enable_lora": True, "enable_prefix_caching": True}
    found = beside_hybrid("X", twins=["a", "b"], speculates=True, engine=engine)
    assert len(found) == 5 and all(line.startswith("X is recurrent") for line in found)
    assert beside_hybrid("X", twins=[], speculates=False, engine={}) == []


def test_an_unknown_language_part_is_refused() -> None:
    other = config("LlavaForConditionalGeneration", text_config=SimpleNamespace(model_type="odd"))
    with pytest.raises(DoesNotFit, match="its text_config is a 'odd'"):
        stream_architecture(other, base=True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.weight", None),
        ("visual.blocks.0.norm1.weight", None),
        ("model.vision_tower.x", None),
        ("multi_modal_projector.linear_1.weight", None),
    ],
)
def test_names_of_a_language_part(name: str, wanted: str | None) -> None:
    assert renamed(name) == wanted
    if wanted is not None:
        new = "lm_head" if wanted.startswith("lm_head") else "model."
        assert original_prefixes([name])[new] + wanted.removeprefix(new) == name


def test_a_language_parts_config_is_a_text_models(tmp_path: Any) -> None:
    """The tie of the whole config, one row of positions, the whole's quantisation."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    whole = Qwen2_5_VLConfig(
        text_config={"rope_parameters": rope, "tie_word_embeddings": False},
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        quantization_config={"quant_method": "awq"},
    )
    part = LanguagePart(str(tmp_path), {"architectures": ["Ours"]})(whole)
    assert part.architectures == ["Ours"] and part.tie_word_embeddings
    assert part.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert part.quantization_config == {"quant_method": "awq"}
    assert not hasattr(part, "vision_config")
    assert "mrope_section" in whole.text_config.rope_parameters
