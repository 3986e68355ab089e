"""512 ranks, one after the other in this process: do ranks that wait for each other do the same operations?

A rank that leaves a collective out, or does it with other bytes, hangs a run of any size; here it is a line of text.
Covered: topology, log-probs, an update and the export of weights for dense and expert models at the shapes of Qwen3-8B
and Qwen3-235B-A22B, few layers here and all of them in `make matrix`; bytes of buffers against `owpo plan`.
Not covered: values (the parity tests have them), CUDA's layers, generation, checkpoints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from recipe_models import SHAPES

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel, read_hf_config
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.plan.trainer import trainer_memory

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from fake_calls import RankRecord, differences, table
from fake_ranks import all_catalogues, record, representatives

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU's groups")

QWEN3_235B = {
    "model_type": "qwen3_moe", "hidden_act": "silu", "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "num_attention_heads": 64,
    "num_hidden_layers": 94, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
DENSE = {"tp": 4, "sp": True, "cp": 2, "pp": 2, "dp": 32}
EXPERTS = {"tp": 4, "sp": True, "cp": 2, "pp": 8, "dp": 8, "ep": 8, "etp": 1}


def a_run(folder: Path, shape: dict[str, Any], parallel: dict[str, Any], **changes: Any) -> tuple[Config, HFModel]:
    (folder / "config.json").write_text(json.dumps(shape | changes))
    config = Config.build(
        {
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "data": {"source": "task:cipher"},
            "optimizer": {"tokens_per_microbatch": 1024},
            "parallel": parallel,
        }
    )
    assert config.parallel.world_size == 512
    return config, read_hf_config(folder)


def check(config: Config, hf: HFModel, records: list[RankRecord]) -> None:
    """All groups' members do the same; buffers have the planned sizes; figures for a reader: pytest -s."""
    for one in {one.place["pp"]: one for one in records}.values():
        print(one.rank, one.place, one.memory, f"{one.seconds:.1f} CPU s", *table(one), sep="\n")
    assert differences(records) == []
    planned = trainer_memory(config, hf, False, "active")
    for one in records:
        for name, size in one.memory.items():
            assert size == pytest.approx(getattr(planned[one.place["pp"]], name), rel=0.01), (one.rank, name)
        assert sum(gathered(one)) == one.memory["weights"], "parameters are gathered once"


def gathered(one: RankRecord) -> list[int]:
    """Bytes of each gather of parameters."""
    copies = {group for group, name in one.groups.items() if name in ("same parameters", "experts' copies")}
    return [call.bytes for call in one.calls if call.operation == "allgather_base" and call.group in copies]


@pytest.mark.slow
def test_a_dense_model_on_512_ranks(tmp_path: Path) -> None:
    """And a rank that leaves out one collective is named, with the operation that the others wait in."""
    config, hf = a_run(tmp_path, SHAPES["qwen3-8b-base"], DENSE, num_hidden_layers=2)
    catalogues = all_catalogues(config, hf)
    ranks = [0, 1, 4, 8, 256, 257, 260, 264]  # the first, and one more in tp, cp and dp, of each stage
    records = [record(config, hf, rank, catalogues=catalogues) for rank in ranks]
    check(config, hf, records)

    def forgetful(self: Topology, tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor, group=self.copies_group)
        return tensor

    with mock.patch.object(Topology, "sum_over_data_and_stages", forgetful):
        records[4] = record(config, hf, 256, catalogues=catalogues)
    (found,) = differences(records)
    assert found.startswith("group of 2 from rank 0, operation 0: rank 0 allreduce of ")
    assert "rank 256 broadcast of 4 bytes" in found


@pytest.mark.slow
def test_experts_on_512_ranks(tmp_path: Path) -> None:
    """Whole experts, spread over tensor-, context- and data-parallel ranks; all of them export their weights."""
    parallel = EXPERTS | {"pp": 2, "dp": 32}
    config, hf = a_run(tmp_path, QWEN3_235B, parallel, num_hidden_layers=2, num_experts=16)
    catalogues = all_catalogues(config, hf)
    ranks = [0, 1, 5, 8, 256, 261]
    records = [record(config, hf, rank, catalogues=catalogues) for rank in ranks]
    assert [one.place["ep"] for one in records] == [0, 1, 5, 0, 0, 5]
    check(config, hf, records)


@pytest.mark.matrix
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["qwen3-8b-base", "qwen3-235b-a22b"])
def test_whole_models_at_every_place(name: str, tmp_path: Path) -> None:
    """Every tp, pp, cp and ep at two data-parallel indices."""
    shape, parallel = (SHAPES[name], DENSE) if name in SHAPES else (QWEN3_235B, EXPERTS)
    config, hf = a_run(tmp_path, shape, parallel)
    catalogues = all_catalogues(config, hf)
    ranks = representatives(config.parallel)
    assert len(ranks) == 2 * config.parallel.tp * config.parallel.cp * config.parallel.pp
    check(config, hf, [record(config, hf, rank, catalogues=catalogues) for rank in ranks])


@pytest.mark.slow
def test_late_parameters_are_gathered_once_and_in_one_order(tmp_path: Path) -> None:
    """`parallel.overlap: all` on two ranks that share parameters, of each stage: in several buckets on the first."""
    config, hf = a_run(tmp_path, SHAPES["qwen3-8b-base"], DENSE | {"overlap": "all"}, num_hidden_layers=2)
    records = [record(config, hf, rank) for rank in (0, 8, 256, 264)]
    check(config, hf, records)
    gathers = [len(gathered(one)) for one in records]
    assert gathers[0] == gathers[1] > 1 == gathers[2] == gathers[3]
