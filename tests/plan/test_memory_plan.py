"""The memory plan against real buffers of small models, and against figures worked by hand for the large ones.

Not covered: Transformer Engine's activations, the CUDA head and the overhead, which need a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_models import SHAPES
from tiny import build_policy, make_config, make_hf_model
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.config import Config, ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFReader, megatron_names, read_hf_config, to_megatron
from owpo_megatron.mcore.packing import build_microbatch
from owpo_megatron.mcore.topology import init_topology
from owpo_megatron.plan import make_plan
from owpo_megatron.plan.parameters import share_of_stage, whole_model
from owpo_megatron.plan.plan import OVERHEAD
from owpo_megatron.plan.plan import RECOMPUTE as RECOMPUTE_OVERRIDES
from owpo_megatron.plan.trainer import activation_bytes, head_bytes, layer_elements
from owpo_megatron.types import Sample

GIB = 2**30
QWEN3_8B = SHAPES["qwen3-8b-base"]
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_act": "silu", "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 151936,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def topology() -> Any:
    return init_topology(ParallelConfig(), 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_hf_model(root / "qwen3", "qwen3", vocab_size=500, **WIDE),
        "qwen2 tied": make_hf_model(root / "qwen2", "qwen2", tied=True, vocab_size=500, **WIDE),
        "qwen3_moe": make_hf_model(root / "moe", "qwen3_moe", vocab_size=500, **WIDE),
    }


@pytest.fixture
def qwen3_8b(tmp_path: Path) -> Path:
    """A folder with the true shape and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return tmp_path


# --------------------------------------------------------------------------------------------- parameters
def test_parameters_of_qwen3_8b_by_hand(qwen3_8b: Path) -> None:
    """A layer: q and o 2 * 4096 * 4096, k and v 2 * 1024 * 4096, MLP 3 * 12288 * 4096, norms 2 * 4096 + 2 * 128
    = 192,946,432. Times 36, two embeddings of 151,936 * 4096, the last norm: 8,190,735,360."""
    model = read_hf_config(qwen3_8b)
    assert whole_model(model) == 36 * 192_946_432 + 2 * 151_936 * 4096 + 4096 == 8_190_735_360


@pytest.mark.parametrize("name", ["qwen3", "qwen2 tied", "qwen3_moe"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_holds_what_conversion_gives_it(models: dict[str, Path], name: str, tp: int) -> None:
    model = read_hf_config(models[name])
    reader = HFReader(models[name])
    held = sum(to_megatron(model, one, reader, tp_rank=0, tp_size=tp).numel() for one in megatron_names(model))
    assert share_of_stage(model, ParallelConfig(tp=tp), 0).total == held


def test_stages_and_experts_divide_the_model(models: dict[str, Path]) -> None:
    model = read_hf_config(models["qwen3_moe"])
    whole = share_of_stage(model, ParallelConfig(), 0)
    halves = [share_of_stage(model, ParallelConfig(pp=2), stage) for stage in (0, 1)]
    assert sum(half.total for half in halves) == whole.total
    spread = share_of_stage(model, ParallelConfig(dp=2, ep=2), 0)
    assert (spread.dense, spread.expert) == (whole.dense, whole.expert // 2)
    tied = read_hf_config(models["qwen2 tied"])
    stages = [share_of_stage(tied, ParallelConfig(pp=2), stage).total for stage in (0, 1)]
    assert sum(stages) - whole_model(tied) == 504 * 96 + 4 * 96, "a second embedding, and four padding rows"


def test_the_trainer_takes_what_the_plan_advises(qwen3_8b: Path) -> None:
    """The overrides of its remedy, word for word; and what megatron-core refuses, the plan refuses."""
    name, value = RECOMPUTE_OVERRIDES.removeprefix("parallel.").split("=")
    advised = large(qwen3_8b, parallel={"tp": 4, "dp": 2, "sp": True, name: value})
    assert advised.recomputation == RECOMPUTE and make_plan(advised, 24 * GIB).recomputes
    assert make_plan(advised, 80 * GIB) == make_plan(large(qwen3_8b, megatron=RECOMPUTE), 80 * GIB)
    problem = make_plan(large(qwen3_8b), 24 * GIB).problem
    assert problem is not None and RECOMPUTE_OVERRIDES in problem
    assert RECOMPUTE_OVERRIDES not in str(make_plan(large(qwen3_8b, megatron=RECOMPUTE), 24 * GIB).problem)
    with pytest.raises(UserError, match="megatron-core refuses"):
        make_plan(large(qwen3_8b, megatron={"recompute_granularity": "full"}), 80 * GIB)
    with pytest.raises(UserError, match="context of"):
        make_plan(large(qwen3_8b, rollout={"max_response_tokens": 10**6}), 80 * GIB)


# --------------------------------------------------------------------------------------------- real buffers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_buffers_of_a_real_policy(models: dict[str, Path], topology: Any, dtype: str) -> None:
    """Weights, gradients, optimizer and the reference's slot, as megatron allocates them, within its padding (1 %)."""
    config = make_config(models["qwen3"], model={"dtype": dtype})
    planned = make_plan(config, 80 * GIB, cuda=False).trainer
    policy = build_policy(config, topology)
    (chunk,) = policy._chunks
    weights = sum(_bytes(buffer.param_data) for buffer in chunk.buffers)
    gradients = sum(_bytes(buffer.grad_data) for buffer in chunk.buffers)
    inner = policy._optimizer.chained_optimizers[0] if hasattr(policy._optimizer, "chained_optimizers") else None
    optimizer = inner or policy._optimizer
    states = [one for state in optimizer.optimizer.state.values() for one in state.values() if torch.is_tensor(one)]
    masters = [one for group in optimizer.shard_fp32_from_float16_groups for one in group if one is not None]
    assert weights == pytest.approx(planned.weights, rel=0.01)
    assert gradients == pytest.approx(planned.gradients, rel=0.01)
    assert sum(_bytes(one) for one in [*states, *masters]) == pytest.approx(planned.optimizer, rel=0.01)
    policy.slots.before_step()  # the reference gets its own slot
    assert sum(_bytes(one) for one in policy.slots._spare.buffers) == pytest.approx(planned.reference, rel=0.01)
    assert make_plan(make_config(models["qwen3"], algorithm={"name": "dapo"}), GIB, cuda=False).trainer.reference == 0


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    ("name", "recompute"), [("qwen3", False), ("qwen2 tied", False), ("qwen3_moe", False), ("qwen3", True)]
)
def test_activations_of_a_real_forward(models: dict[str, Path], topology: Any, name: str, recompute: bool) -> None:
    """Memory that autograd keeps after the forward of one microbatch, without parameters; the plan is within 10 %."""
    config = make_config(
        models[name],
        data={"max_prompt_tokens": 64},
        rollout={"max_response_tokens": 64},
        optimizer={"tokens_per_microbatch": 512},
        megatron=RECOMPUTE if recompute else {},
    )
    policy = build_policy(config, topology)
    (chunk,) = policy._chunks
    sample = Sample(tuple(range(64)), tuple(range(65)), 1.0, True, (0.0,) * 65)
    microbatch = build_microbatch([sample] * 4, range(4), 1, torch.device("cpu"))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage; held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            kept.setdefault(place, tensor)
        return tensor

    chunk.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(
            input_ids=microbatch.token_T,
            position_ids=microbatch.position_T,
            attention_mask=None,
            packed_seq_params=microbatch.packed_seq_params,
        )
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    model = read_hf_config(models[name])
    planned = activation_bytes(config, model, cuda=False)
    not_yet = 512 * 4 * 2 * 96  # gathered hidden states and their gradient come with the head
    if recompute:  # and so does the layer that is computed again
        not_yet += 512 * (layer_elements(model, 1, False, cuda=False) * 4 + 4 * (6 + 2))
    assert measured == pytest.approx(planned - not_yet, rel=0.1)


# --------------------------------------------------------------------------------------------- by hand
def large(path: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "model": {"path": str(path), "dtype": "bfloat16"},
        "data": {"source": "task:cipher", "max_prompt_tokens": 2048},
        "rollout": {"max_response_tokens": 20480},
        "parallel": {"tp": 4, "dp": 2, "sp": True},
        "sglang": {"mem_fraction_static": 0.3},
    }
    return Config.build(raw | sections)


def test_qwen3_8b_on_a_node_by_hand(qwen3_8b: Path) -> None:
    config = large(qwen3_8b)
    plan = make_plan(config, 80 * GIB)
    # replicated: norms of 36 layers and the last: 36 * (2 * 4096 + 256) + 4096 = 308,224; the rest divides by four;
    # 151,936 rows are a multiple of 32 already
    share = (8_190_735_360 - 308_224) // 4 + 308_224
    assert plan.trainer.parameters == share
    assert (plan.trainer.weights, plan.trainer.gradients, plan.trainer.reference) == (2 * share, 4 * share, 2 * share)
    assert plan.trainer.optimizer == 12 * share // 2
    # a layer and token, tp 4 with sp: norms 4 * 1024, q k v 1024 + 2 * 256, their norms and rope 2 * (1024 + 256),
    # attention's output 1024, MLP 3 * 3072: 18,432 elements of two bytes, and float32 for 32 / 4 heads and two norms
    per_layer = 2 * 18_432 + 4 * (8 + 2)
    assert activation_bytes(config, read_hf_config(qwen3_8b), cuda=True) == 22_528 * (36 * per_layer + 4 * 4096 * 2)
    # chunks: 2 GiB / (37,984 columns * 4) = 14,134 rows, a multiple of 128 is 14,080; hidden states and gradient
    model = read_hf_config(qwen3_8b)
    assert (
        head_bytes(config, model, cuda=True, weight=2) == 14_080 * 37_984 * (4 + 2) + (2 * 22_528 + 14_080) * 4096 * 2
    )
    # engine: 24 GiB minus 2 bytes per weight; a token: 2 * 36 * 8 * 128 * 2 bytes
    assert plan.engine is not None and plan.engine_place == "trainer's nodes"
    assert plan.engine.cache == int(0.3 * 80 * GIB) - 2 * 8_190_735_360 and plan.engine.token == 147_456
    assert plan.engine.tokens == plan.engine.cache // 147_456
    assert plan.used == plan.trainer_total + plan.engine.static


@pytest.mark.parametrize(("parallel", "elements", "statistics", "copies", "kept"), [
    # norms 4 * 2048; q k v 5120, their norms and rope 2 * 4608, the result 4096; eight experts 3 * 768 + 2048 each
    ({"dp": 8, "ep": 8}, 8192 + 18_432 + 8 * 4352, 4 * (32 + 2), 4 * (4096 + 512), 103.20),
    # a quarter of it, but for the experts' copies of a token, which all ranks that share an expert have whole
    ({"tp": 4, "sp": True, "dp": 8, "ep": 8}, 2048 + 4608 + 8 * (576 + 2048), 4 * (8 + 2), 4 * (1024 + 128), 42.32),
])  # fmt: skip
def test_a_mixture_by_hand(
    tmp_path: Path, parallel: dict[str, Any], elements: int, statistics: int, copies: int, kept: float
) -> None:
    """Qwen3-30B-A3B, 16,384 tokens. With the padded `copies` of local attention the plan is at most 5 % above the GiB
    that tools/dry_layers.py counts with fused kernels (docs/kernel.md)."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    lengths = {"data": {"source": "task:cipher", "max_prompt_tokens": 64}, "rollout": {"max_response_tokens": 64}}
    config = large(tmp_path, parallel=parallel, optimizer={"tokens_per_microbatch": 16384}, **lengths)
    planned = activation_bytes(config, read_hf_config(tmp_path), cuda=True)
    assert planned == 16384 * (48 * (2 * elements + statistics) + 4 * 2048 * 2)
    assert 1 <= (planned + 16384 * 48 * copies) / (kept * GIB) < 1.05


def test_what_lowers_the_need(qwen3_8b: Path) -> None:
    full = make_plan(large(qwen3_8b), 80 * GIB)
    recomputed = make_plan(large(qwen3_8b, megatron=RECOMPUTE), 80 * GIB)
    assert recomputed.trainer.activations < 0.2 * full.trainer.activations
    few = make_plan(large(qwen3_8b, megatron=RECOMPUTE | {"recompute_method": "block"}), 80 * GIB)
    assert few.trainer.activations > 0.9 * full.trainer.activations, "one layer of a block is computed again, not all"
    assert make_plan(large(qwen3_8b, algorithm={"name": "dapo"}), 80 * GIB).trainer.reference == 0
    offloaded = make_plan(large(qwen3_8b, reference={"placement": "offloaded"}), 80 * GIB).trainer
    assert offloaded.host == full.trainer.weights and offloaded.reference == full.trainer.reference
    best = make_plan(large(qwen3_8b, reference={"refresh": "best_of_stage"}, eval={"every": 20}), 80 * GIB).trainer
    assert best.host == full.trainer.weights and full.trainer.host == 0
    pipelined = make_plan(large(qwen3_8b, parallel={"tp": 2, "pp": 2, "dp": 2, "sp": True}), 80 * GIB)
    assert [stage.head > 0 for stage in pipelined.stages] == [False, True]
    assert pipelined.stages[0].activations > 1.8 * pipelined.stages[1].activations, "two microbatches in flight"
    split = make_plan(large(qwen3_8b, parallel={"tp": 4, "cp": 2, "dp": 1, "sp": True}), 80 * GIB).trainer
    whole = make_plan(large(qwen3_8b, parallel={"tp": 4, "dp": 2, "sp": True}), 80 * GIB).trainer
    assert split.activations == pytest.approx(whole.activations / 2, rel=1e-6)
    assert (split.weights, split.optimizer) == (whole.weights, whole.optimizer), "the optimizer is over dp x cp"
    with pytest.raises(UserError, match="megatron.cp_comm_type = all_gather"):
        make_plan(large(qwen3_8b, parallel={"cp": 2}, megatron={"cp_comm_type": "all_gather"}), 80 * GIB)
    limited = make_plan(large(qwen3_8b, sglang={"max_total_tokens": 50_000}), 80 * GIB).engine
    assert limited is not None and limited.tokens == 50_000
    by_handle = make_plan(large(qwen3_8b, sync={"transport": "ipc"}), 80 * GIB)
    assert by_handle.used - full.used == by_handle.contexts == 7 * GIB // 2, "a context of each other GPU's engine"
    replayed = make_plan(large(qwen3_8b, engine={"urls": ["http://127.0.0.1:1"]}), 80 * GIB)
    assert replayed.engine is None and replayed.used == replayed.trainer_total


def test_memory_in_turn_is_that_of_the_larger_side(qwen3_8b: Path) -> None:
    """engine.in_turn: a run that fits neither beside an engine of 0.8 nor with less; both processes stay there."""
    changes: dict[str, Any] = {"megatron": RECOMPUTE, "sglang": {"mem_fraction_static": 0.8}}
    beside = make_plan(large(qwen3_8b, **changes), 80 * GIB)
    turns = make_plan(large(qwen3_8b, engine={"in_turn": True}, **changes), 80 * GIB)
    assert beside.problem and "engine.in_turn" in beside.problem and turns.problem is None
    trainer, engine = turns.trainer, turns.engine
    assert engine is not None and engine.static == int(0.8 * 80 * GIB)
    generating = trainer.weights + trainer.reference + engine.static + 2 * OVERHEAD
    assert turns.used == max(turns.trainer_total + OVERHEAD, generating) == generating < beside.used


def test_what_does_not_fit_says_why(qwen3_8b: Path) -> None:
    small = make_plan(large(qwen3_8b), 24 * GIB)
    assert small.problem is not None and "the trainer's GPUs lack" in small.problem and small.free < 0
    no_cache = make_plan(large(qwen3_8b, sglang={"mem_fraction_static": 0.2}, megatron=RECOMPUTE), 80 * GIB)
    assert no_cache.problem is not None and "not one response of full length (22528)" in no_cache.problem


def test_the_command(qwen3_8b: Path, tmp_path: Path) -> None:
    config = large(qwen3_8b)
    config.save(tmp_path / "run.yaml")
    arguments = ["plan", "-c", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, arguments)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert result.exit_code == (0 if written["fits"] else 1)
    assert "8.19 B parameters in bfloat16, tp 4, pp 1, dp 2" in result.output
    assert written["trainer"]["total"] == make_plan(config, 80 * GIB).trainer_total
    assert CliRunner().invoke(app, [*arguments, "--gpu-memory", "24"]).exit_code == 1
    assert CliRunner().invoke(app, [*arguments, "--gpu-memory", "141"]).exit_code == 0


def test_an_offloaded_optimizer_takes_turns_with_the_activations(qwen3_8b: Path) -> None:
    """Its bytes move to the host; the peak is the larger of the two moments, and a plan that lacks memory names it."""
    changes: dict[str, Any] = {"parallel": {"tp": 4, "dp": 1}}
    stays = make_plan(large(qwen3_8b, **changes), 80 * GIB).trainer
    away = make_plan(large(qwen3_8b, optimizer={"offload": True}, **changes), 80 * GIB).trainer
    moment = max(stays.activations + stays.head, stays.sync)
    assert stays.optimizer == away.optimizer > 20 * GIB and moment > 0
    assert away.host == stays.host + stays.optimizer
    assert stays.total - away.total == min(stays.optimizer, moment)
    crowded = make_plan(large(qwen3_8b, **changes), 24 * GIB)
    assert crowded.problem and "optimizer.offload=true" in crowded.problem


def test_moments_in_bfloat16_are_wide_during_steps_alone(qwen3_8b: Path) -> None:
    changes: dict[str, Any] = {"parallel": {"tp": 4, "dp": 1}}
    wide = make_plan(large(qwen3_8b, **changes), 80 * GIB).trainer
    narrow = make_plan(large(qwen3_8b, optimizer={"moments": "bfloat16"}, **changes), 80 * GIB).trainer
    assert wide.optimizer == wide.optimizer_at_rest == narrow.optimizer == 12 * wide.parameters
    assert narrow.optimizer_at_rest == 8 * wide.parameters
    saved = 4 * wide.parameters
    assert wide.total - narrow.total == min(saved, max(wide.activations + wide.head, wide.sync)) > GIB
    away = make_plan(large(qwen3_8b, optimizer={"moments": "bfloat16", "offload": True}, **changes), 80 * GIB).trainer
    assert away.optimizer_at_rest == 0 and away.host == wide.host + 8 * wide.parameters
