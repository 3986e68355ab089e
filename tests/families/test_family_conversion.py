"""Every family converted both ways with its proof, in odd shapes; wrong rules, which the proof has to find.

Also: what is read where config.json is unusual, and what is refused. The first shape of a family runs with the normal
tiers, the others in `make matrix`. Not covered: published checkpoints, CUDA.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, WINDOWED, every_case
from safetensors.torch import load_file, save_file
from tiny import make_hf_model

from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import ProofError, UserError
from owpo_megatron.families import Attention, HFModel, Rule, float32_tensors, known_types, read_hf_config, weights
from owpo_megatron.plan.parameters import whole_model

Wrong = Callable[[Rule], Rule]
Change = Callable[[HFModel, Rule, Sequence[torch.Tensor]], list[torch.Tensor]]


@pytest.mark.parametrize(("family", "shape"), every_case())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_and_logits(family: str, shape: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, the router's float32 constants included; logits as transformers computes them."""
    hf = make_hf_model(tmp_path / "hf", family, **shape)
    model = read_hf_config(hf)
    constants = float32_tensors(model)
    assert bool(constants) == (family in ("glm4_moe", "deepseek_v3"))
    original = {
        name: tensor if name in constants else tensor.to(dtype)
        for name, tensor in load_file(hf / "model.safetensors").items()
    }
    save_file(original, hf / "model.safetensors", metadata={"format": "pt"})
    assert sum(t.numel() for name, t in original.items() if name not in constants) == whole_model(model)
    there = hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", proof=False)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in original.items())
    assert there.proof is not None and there.proof.ok
    assert there.proof.largest_difference < 1e-5 * max(1.0, there.proof.largest_logit)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_is_proved(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of the proof is longer than the window; a model read without one is found in the first such layer."""
    hf = make_hf_model(tmp_path / "hf", family, **WINDOWED[family])
    proof = hf_to_megatron(hf, tmp_path / "megatron").proof
    assert proof is not None and proof.ok and proof.tokens > WINDOWED[family]["sliding_window"]
    monkeypatch.setattr(Attention, "window_of", lambda *_: None)
    with pytest.raises(ProofError, match=f"layer {WINDOWED[family].get('max_window_layers', 0)} is the first"):
        hf_to_megatron(hf, tmp_path / "again")


class Shifted(str):
    """An HF name of the next expert's tensor."""

    def format(self, *args: Any, expert: int = 0, **index: Any) -> str:
        return str(self)[:].replace("{expert}", str(expert ^ 1)).format(*args, **index)


def parts_of(suffix: str, order: tuple[int, ...]) -> Wrong:
    """The HF tensors (or their rows) of a megatron parameter in another order."""

    def wrong(rule: Rule) -> Rule:
        if not rule.megatron[0].endswith(suffix):
            return rule
        if rule.fuse == "pairs":  # taken for one behind the other
            return replace(rule, fuse="plain")
        return replace(rule, hf=tuple(rule.hf[i] for i in order))

    return wrong


def shifted_expert(rule: Rule) -> Rule:
    return replace(rule, hf=tuple(replace(p, name=Shifted(p.name)) for p in rule.hf)) if rule.per_expert else rule


def renamed(one: str, other: str) -> Wrong:
    """Two HF tensors in each other's place."""
    names = {one: other, other: one}

    def wrong(rule: Rule) -> Rule:
        for name, instead in names.items():
            if rule.hf[0].name.endswith(name):
                return replace(rule, hf=(replace(rule.hf[0], name=rule.hf[0].name.replace(name, instead)),))
        return rule

    return wrong


GATE_UP, KEYS_VALUES = parts_of("linear_fc1.weight", (1, 0)), parts_of("linear_qkv.weight", (0, 2, 1))
LATENT = ("deepseek_v2", "deepseek_v3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "glm4_moe", "gpt_oss", *LATENT)
WRONG: list[tuple[str, str, Wrong]] = [
    *[(family, "gate and up", GATE_UP) for family in CASES],
    *[(family, "keys and values", KEYS_VALUES) for family in CASES if family not in LATENT],
    *[(family, "norms", renamed("input_layernorm.weight", "post_attention_layernorm.weight")) for family in LATENT],
    *[(family, "shifted expert", shifted_expert) for family in MIXTURES],
    ("glm4", "norms after", renamed("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")),
    ("qwen3_next", "gates", renamed("linear_attn.dt_bias", "linear_attn.A_log")),
    ("qwen3_5_text", "delta net's queries and keys", parts_of("in_proj_qkvz.weight", (1, 0, 2, 3))),
    ("qwen3_5_moe_text", "delta net's two gates", parts_of("in_proj_ba.weight", (1, 0))),
    ("olmo3", "norms after", renamed("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")),
    ("gemma3_text", "norms", renamed("post_attention_layernorm.weight", "pre_feedforward_layernorm.weight")),
    ("olmo2", "norms after", renamed("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")),
]


@pytest.mark.parametrize(("family", "wrong"), [(f, w) for f, _, w in WRONG], ids=[f"{f}-{n}" for f, n, _ in WRONG])
def test_a_wrong_rule_is_found_and_its_layer_named(
    family: str, wrong: Wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule wrong in both directions restores every bit: only the logits can show it."""
    hf = make_hf_model(tmp_path / "hf", family, **CASES[family][0])
    monkeypatch.setattr(HFModel, "rules", property(lambda self: tuple(map(wrong, self.family.rules(self)))))
    weights._rules_by_name.cache_clear()
    try:
        with pytest.raises(ProofError, match=r"layer [0-3] is the first that computes something else"):
            hf_to_megatron(hf, tmp_path / "megatron")
    finally:
        weights._rules_by_name.cache_clear()
    assert not (tmp_path / "megatron").exists()


def rebuilt(monkeypatch: pytest.MonkeyPatch, change: Change, back: Change) -> None:
    """Let every import change a rule's pieces, and every export change them back."""
    fused, unfused = weights.fused, weights.unfused
    monkeypatch.setattr(weights, "fused", lambda model, rule, pieces: fused(model, rule, change(model, rule, pieces)))
    monkeypatch.setattr(weights, "unfused", lambda model, rule, shard: back(model, rule, unfused(model, rule, shard)))


@pytest.mark.parametrize("family", CASES)
def test_permuted_heads_are_found(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of every head in the next head's place; and back again."""
    queries = ("linear_qkv.weight", "linear_q_proj.weight", "linear_q_up_proj.weight")

    def rolled(by: int) -> Change:
        def change(model: HFModel, rule: Rule, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            if not rule.megatron[0].endswith(queries):
                return list(pieces)
            heads = pieces[0].unflatten(0, (model.attention.num_heads, -1))
            return [heads.roll(by, 0).flatten(0, 1), *pieces[1:]]

        return change

    rebuilt(monkeypatch, rolled(1), rolled(-1))
    hf = make_hf_model(tmp_path / "hf", family, **CASES[family][0])
    with pytest.raises(ProofError, match=r"layer [0-3] is the first that computes something else"):
        hf_to_megatron(hf, tmp_path / "megatron")


@pytest.mark.parametrize("family", LATENT)
def test_a_transposed_up_projection_is_found(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's keys and values, head by head, taken for dimension by dimension of all heads; and back again."""

    def transposed(outer: Callable[[HFModel, torch.Tensor], int]) -> Change:
        def change(model: HFModel, rule: Rule, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            if not rule.megatron[0].endswith("linear_kv_up_proj.weight"):
                return list(pieces)
            (piece,) = pieces
            return [piece.unflatten(0, (outer(model, piece), -1)).transpose(0, 1).reshape(piece.shape)]

        return change

    there = transposed(lambda model, _: model.attention.num_heads)
    back = transposed(lambda model, piece: len(piece) // model.attention.num_heads)
    rebuilt(monkeypatch, there, back)
    hf = make_hf_model(tmp_path / "hf", family, **CASES[family][0])
    with pytest.raises(ProofError, match="layer 0 is the first that computes something else"):
        hf_to_megatron(hf, tmp_path / "megatron")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob = False: not supported; only True is"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1: megatron-core needs at least 2"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = noaux_tc: not supported; use greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True: not supported"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0: not supported; only 7.0 is"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias = False: not supported; only True is"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: not supported; only 1e-06 is"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False: not supported"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = gelu: not supported; only silu is"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: not supported; only None"),
        ("olmo2", {"attention_bias": True}, "attention_bias = True: not supported"),
        ("granite", {"mlp_bias": True}, "mlp_bias = True: not supported"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
          "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}}, "rope_type = longrope: not supported"),
    ],
)  # fmt: skip
def test_what_megatron_would_get_wrong_is_refused(
    family: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf = make_hf_model(tmp_path / "hf", family, **(CASES[family][0] | fields))
    with pytest.raises(UserError, match=message):
        read_hf_config(hf)


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path: Path) -> None:
    """transformers does not know its model_type; the folder keeps it."""
    hf = make_hf_model(tmp_path / "hf", "deepseek_v3", **CASES["deepseek_v3"][0])
    config = json.loads((hf / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (hf / "config.json").write_text(json.dumps(config))
    proof = hf_to_megatron(hf, tmp_path / "megatron").proof
    assert proof is not None and proof.ok
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "kimi_k2"


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """Published GLM-4.5 checkpoints have one more layer, which transformers and SGLang leave out, too."""
    hf = make_hf_model(tmp_path / "hf", "glm4_moe", **CASES["glm4_moe"][0])
    tensors = load_file(hf / "model.safetensors")
    more = {"model.layers.4.eh_proj.weight": torch.ones(48, 96), "model.layers.4.enorm.weight": torch.ones(48)}
    save_file(tensors | more, hf / "model.safetensors", metadata={"format": "pt"})
    assert hf_to_megatron(hf, tmp_path / "megatron").tensors.keys() == tensors.keys()
    save_file(tensors | {"model.layers.5.x": torch.ones(1)}, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="unexpected: model.layers.5.x"):
        hf_to_megatron(hf, tmp_path / "again")


def test_every_family_has_cases() -> None:
    assert set(known_types()) - set(CASES) == {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "kimi_k2"}
