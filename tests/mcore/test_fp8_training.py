"""The parts of a run in FP8, up to the layers: recipe, packs, refusals. Not covered: the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_hf_model

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, read_hf_config
from owpo_megatron.mcore.fp8_training import fp8_fields, pack_multiple
from owpo_megatron.mcore.packing import build_microbatch
from owpo_megatron.mcore.spec import layer_spec, transformer_config
from owpo_megatron.types import Sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFModel]:
    root: Path = tmp_path_factory.mktemp("models")
    return {name: read_hf_config(make_hf_model(root / name, name)) for name in ("qwen3", "qwen3_moe")}


def config_of(hf: HFModel, **raw: Any) -> Any:
    return transformer_config(hf, ParallelConfig(), torch.bfloat16, raw)


def test_the_recipe_is_current_scaling_unless_it_is_named(models: dict[str, HFModel]) -> None:
    assert config_of(models["qwen3"], fp8="hybrid").fp8_recipe == "tensorwise"
    assert config_of(models["qwen3"], fp8="hybrid", fp8_recipe="blockwise").fp8_recipe == "blockwise"
    assert config_of(models["qwen3"]).fp8 is None
    assert fp8_fields({"fp8": "hybrid"}, has_experts=True)["moe_router_padding_for_quantization"]
    with pytest.raises(UserError, match="with experts megatron-core asks for"):
        config_of(models["qwen3_moe"], fp8="hybrid")


@pytest.mark.parametrize("fields", [{"fp8_recipe": "delayed"}, {"fp8_recipe": "custom"}, {"fp8_param": True}])
def test_what_cannot_work_is_refused(models: dict[str, HFModel], fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"megatron.{next(iter(fields))}"):
        config_of(models["qwen3"], fp8="hybrid", **fields)


@pytest.mark.parametrize(("recipe", "tokens"), [("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)])
def test_every_rank_gets_rows_that_its_gemms_take(models: dict[str, HFModel], recipe: str, tokens: int) -> None:
    """Transformer Engine wants 8 rows of activations and 16 (a block) where dW sums over them, after the split."""
    config = config_of(models["qwen3"], fp8="hybrid", fp8_recipe=recipe)
    for length in (1, 15, 16, 129):
        sample = Sample((1, 2), tuple([3] * length), 1.0, True, tuple([-1.0] * length))
        pack = build_microbatch([sample], [0], pack_multiple(config, 4), torch.device("cpu"))
        assert pack.token_T.shape[1] % (4 * tokens) == 0
        assert int(pack.mask_T.sum()) == length
        assert pack.packed_seq_params.cu_seqlens_q[-1] == pack.token_T.shape[1]


def test_layers_without_transformer_engine_refuse(models: dict[str, HFModel]) -> None:
    with pytest.raises(UserError, match="needs Transformer Engine"):
        layer_spec(models["qwen3"], config_of(models["qwen3"], fp8="hybrid"), None)
