"""Internals of megatron-core that mcore/ relies on, defects of its version, and settings that a config may not use.

A test here that fails after an upgrade of megatron-core names what moved. Not covered: the GPU side (Transformer
Engine's spec, FusedAdam, NCCL).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, fusions, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import distrib_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig, TransformerLayer, multi_latent_attention
from megatron.core.transformer.moe.router import TopKRouter
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import read_hf_config
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.spec import layer_spec, transformer_config
from owpo_megatron.mcore.topology import init_topology
from owpo_megatron.methods import make_method

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU seam")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("guards") / "model")


@pytest.fixture(scope="module")
def policy(model: Path) -> Any:
    return build_policy(make_config(model))


def config_with(model: Path, raw: dict[str, Any], **parallel: Any) -> TransformerConfig:
    return transformer_config(read_hf_config(model), ParallelConfig(**parallel), torch.float32, raw)


# ---------------------------------------------------------------------------------------------- what we rely on
def test_version() -> None:
    assert importlib.metadata.version("megatron-core") == "0.16.1", "mcore/ touches internals of this version"


def test_seam_is_installed_and_narrow() -> None:
    """Inside megatron's schedules device="cuda" means the CPU; elsewhere torch is as it was."""
    cpu.install()
    assert schedules.torch.zeros([2], dtype=torch.int, device="cuda").device.type == "cpu"
    assert schedules.torch.float32 is torch.float32
    assert torch.cuda.current_device() == torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
    with cpu.scope():
        assert torch.zeros(2, device="cuda").cuda().device.type == "cpu"


def test_schedules_name_cuda_where_the_seam_expects_it() -> None:
    source = inspect.getsource(schedules)
    assert source.count('torch.zeros([], dtype=torch.int, device="cuda")') == 3
    for function in (
        schedules.forward_backward_no_pipelining,
        schedules.forward_backward_pipelining_without_interleaving,
        schedules.forward_backward_pipelining_with_interleaving,
    ):
        assert "total_num_tokens = torch.zeros(" in inspect.getsource(function)
        assert {
            "forward_step_func",
            "data_iterator",
            "model",
            "num_microbatches",
            "seq_length",
            "micro_batch_size",
            "forward_only",
            "collect_non_loss_data",
        } <= set(inspect.signature(function).parameters)


def test_optimizer_methods_that_are_mended() -> None:
    cpu.install()
    assert distrib_optimizer.HAVE_APEX_OR_TE is False
    stock = inspect.getsource(distrib_optimizer)
    for name in ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states", "load_state_dict"):
        assert f"def {name}(self, " in stock
        assert getattr(distrib_optimizer.DistributedOptimizer, name).__module__ == cpu.__name__
    assert 's["step"] = step' in stock, "load_state_dict no longer shares one step tensor: the repair may go"
    gapless = "gets rid of the padding between buckets" in stock and "[param_world_start:param_world_end]" in stock
    assert gapless, "saved state has the gaps between buckets, or is looked up without them: the repair may go"
    assert distrib_optimizer.DistributedOptimizer.get_parameter_state_dp_zero.__module__ == cpu.__name__


def test_gather_that_is_replaced() -> None:
    cpu.install()
    group = param_and_grad_buffer._ParamAndGradBucketGroup
    assert group.start_param_sync.__module__ == cpu.__name__
    stock = inspect.getsource(param_and_grad_buffer)
    stock = stock[stock.index("def start_param_sync(self, force_sync") : stock.index("def finish_param_sync(")]
    assert "overlap_param_gather and not force_sync" in stock and "self.param_gather_dispatched = True" in stock
    assert "_coalescing_manager(" in stock, "parameters are no longer gathered by a coalesced call: the repair may go"


def test_rng_functions_that_recomputation_calls() -> None:
    source = inspect.getsource(tensor_parallel.random)
    assert "def _get_cuda_rng_state(" in source and "def _set_cuda_rng_state(" in source


def test_what_the_slots_touch(policy: Any) -> None:
    """Set by megatron itself, on objects that no slot has taken over yet."""
    (chunk,) = policy._chunks
    for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
        assert all("cached_param_buffer_shard_list" in vars(group) for group in groups)
    assert len(chunk.buffers) == 1 and chunk.expert_parallel_buffers == []
    (buffer,) = chunk.buffers
    for param, (start, end, bucket_id) in buffer.param_index_map.items():
        assert end - start == param.numel() and bucket_id == 0
        view = buffer.param_data[start:end]
        assert view.data_ptr() == param.data_ptr() and view.shape == (param.numel(),)
    for bucket in buffer.buckets:
        assert bucket.param_data.data_ptr() == buffer.param_data[bucket.offset :].data_ptr()
    (optimizer,) = policy._optimizer.chained_optimizers
    assert optimizer.per_model_bucket_groups and optimizer.buffers == [buffer]
    assert optimizer.model_float16_groups == [[], []] and optimizer.shard_float16_groups == [[], []]
    for models, shards in zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True):
        for model_param, shard in zip(models, shards, strict=True):
            buffer_index, _, bucket_index = optimizer.model_param_gbuf_map[model_param]
            where = optimizer._get_model_param_range_map(model_param)["gbuf_world_in_bucket"]
            data = optimizer.buffers[buffer_index].buckets[bucket_index].param_data[where.start : where.end]
            assert data.data_ptr() == shard.data_ptr() and data.shape == shard.shape
    step = inspect.getsource(distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params)
    assert ".param_data" in step, "the step must write where the slot's owner points"


def test_what_late_parameters_touch(policy: Any) -> None:
    (chunk,) = policy._chunks
    hook = inspect.getsource(type(chunk)._make_forward_pre_hook)
    assert "skip_next_bucket_dispatch = (\n                    self.ddp_config.align_param_gather" in hook
    for group in chunk.bucket_groups:
        assert {"param_gather_handle", "param_gather_dispatched"} <= set(vars(group))
        assert list(inspect.signature(group.start_param_sync).parameters) == ["force_sync"]
    step = inspect.getsource(distrib_optimizer.DistributedOptimizer.step_with_ready_grads)
    assert "if not self.ddp_config.overlap_param_gather:" in step, "with it the step gathers nothing"


def test_what_the_model_touches(model: Path, policy: Any) -> None:
    given = set(inspect.signature(GPTModel._postprocess).parameters)
    assert {"hidden_states", "labels", "loss_mask"} <= given
    chunk = policy._chunks[0].module
    assert chunk.post_process and not chunk.share_embeddings_and_output_weights
    assert chunk.pg_collection.tp is parallel_state.get_tensor_model_parallel_group()
    assert [layer.layer_number for layer in chunk.decoder.layers] == [1, 2, 3, 4]
    spec = layer_spec(read_hf_config(model), config_with(model, {}), None)
    for layer in spec.layer_specs:
        parts = layer.submodules
        assert hasattr(parts, "input_layernorm") and hasattr(parts, "pre_mlp_layernorm")
        attention = parts.self_attention.submodules
        assert all(hasattr(attention, name) for name in ("core_attention", "q_layernorm", "k_layernorm"))


def test_what_the_layers_of_families_touch() -> None:
    """Attributes that a layer's subclass replaces, and names that megatron-core looks for."""
    layer = inspect.getsource(TransformerLayer)
    for name in ("self.self_attn_bda(", "self.mlp_bda(", "with self.bias_dropout_add_exec_handler():"):
        assert name in layer
    latent = inspect.getsource(multi_latent_attention.MLASelfAttention)
    assert "self.linear_q_down_proj(hidden_states)" in latent and "self.linear_kv_down_proj(hidden_states)" in latent
    assert multi_latent_attention.HAVE_TE == isinstance(multi_latent_attention.TELinear, type)
    assert "config.qk_layernorm and" in inspect.getsource(_allreduce_non_tensor_model_parallel_grads)
    assert "expert_bias" in inspect.getsource(TopKRouter.__init__)


def test_what_checkpoints_touch() -> None:
    assert {"content_metadata"} <= set(inspect.signature(dist_checkpointing.save).parameters)
    assert "global _results_queue" in inspect.getsource(filesystem_async._get_write_results_queue)
    assert "'fully_reshardable'" in inspect.getsource(distrib_optimizer)


# ---------------------------------------------------------------------------------------------- traps
@pytest.mark.process
def test_save_starts_no_manager(policy: Any, tmp_path: Path) -> None:
    """The stock queue of results lives in a spawned process that imports torch (seconds) and `__main__` again.

    psutil: the stock writer hangs for ever without it.
    """
    assert importlib.util.find_spec("psutil") and filesystem_async.HAVE_PSUTIL
    policy.save(tmp_path)
    assert type(filesystem_async._results_queue) is queue.Queue
    assert (tmp_path / ".metadata").is_file() and (tmp_path / "metadata.json").is_file()


def test_helpers_of_a_save_may_import_main_again() -> None:
    """The trainer's entry has the guard and no heavy import at its top."""
    from owpo_megatron.trainer import main

    source = inspect.getsource(main)
    assert 'if __name__ == "__main__":' in source
    assert not any(line.startswith(("import torch", "from megatron")) for line in source.splitlines())


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "sp": True}])
def test_settled_fields(model: Path, parallel: dict[str, Any]) -> None:
    """batch_p2p_comm=True gives wrong gradients at pp = 2, vpp = 2 without an error; a mean over microbatches of
    unequal size would come of calculate_per_token_loss=False."""
    config = config_with(model, {}, **parallel)
    assert config.batch_p2p_comm is False and config.overlap_p2p_comm is False
    assert config.calculate_per_token_loss is True and config.variable_seq_lengths is True
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert config.cross_entropy_loss_fusion is False


def test_megatrons_cross_entropy_is_not_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused form rounds gradients to bfloat16 even in fp32, and both forms modify the logits in place."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("megatron's cross entropy was called")

    monkeypatch.setattr(fusions.fused_cross_entropy, "fused_vocab_parallel_cross_entropy", refuse)
    monkeypatch.setattr(tensor_parallel.cross_entropy._VocabParallelCrossEntropy, "apply", refuse)
    policy = build_policy(make_config(model))
    with pytest.raises(AssertionError, match="cross entropy was called"):
        policy._chunks[0].module.compute_language_model_loss(torch.zeros(1, 2, dtype=torch.long), torch.zeros(2, 1, 96))
    assert policy.update(random_samples(1), make_method("owpo"))["grad_norm"] > 0


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_p2p_comm", True),
        ("overlap_p2p_comm", True),
        ("calculate_per_token_loss", False),
        ("variable_seq_lengths", False),
        ("hidden_dropout", 0.1),
        ("attention_dropout", 0.1),
        ("deallocate_pipeline_outputs", True),
        ("tensor_model_parallel_size", 2),
        ("virtual_pipeline_model_parallel_size", 2),
        ("sequence_parallel", True),
        ("params_dtype", "bfloat16"),
        ("hidden_size", 64),
        ("num_layers", 2),
        ("masked_softmax_fusion", True),
    ],
)
def test_raw_block_may_not_change_what_is_settled(model: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"megatron.{name} = {value}: the trainer sets it to .*; remove it"):
        config_with(model, {name: value})


def test_raw_block_with_an_unknown_field(model: Path) -> None:
    with pytest.raises(UserError, match="megatron.recompute_granularty = full: unknown field"):
        config_with(model, {"recompute_granularty": "full"})


def test_recomputed_modules_that_need_transformer_engine_are_refused_without_it(model: Path) -> None:
    """They would fail in the first forward, with a NameError."""
    raw = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]}
    with pytest.raises(
        UserError, match="megatron.recompute_modules = .*: layernorm, mlp needs Transformer Engine; use"
    ):
        config_with(model, raw)
    config_with(model, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]})


def test_raw_block_that_megatron_refuses(model: Path) -> None:
    with pytest.raises(UserError, match="megatron-core refuses this combination: .*recompute_method"):
        config_with(model, {"recompute_granularity": "full"})


@pytest.mark.parametrize(
    "raw",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ],
)
def test_raw_block_takes_recomputation(model: Path, raw: dict[str, Any]) -> None:
    """Recomputation works on a CPU too, with the same bits."""
    plain, recomputing = (build_policy(make_config(model, megatron=block)) for block in ({}, raw))
    for policy in (plain, recomputing):
        policy.update(random_samples(1), make_method("owpo"))
    for (name, tensor), (_, other) in zip(plain.named_weights(), recomputing.named_weights(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    ("name", "value"), [("moe_shared_expert_overlap", True), ("cuda_graph_impl", "local"), ("enable_cuda_graph", True)]
)
def test_late_parameters_need_modules_that_are_called(model: Path, name: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=f"parallel.overlap = all: with megatron.{name} weights are read without a wait"
    ):
        config_with(model, {name: value}, overlap="all")
    config_with(model, {name: False if value is True else "none"}, overlap="all")


@pytest.mark.parametrize(
    ("written", "meant"), [(True, "gradients"), (False, "none"), ("gradients", "gradients"), ("all", "all")]
)
def test_overlap_was_a_flag(written: Any, meant: str) -> None:
    config = ParallelConfig.model_validate({"overlap": written})
    assert config.overlap == meant and ParallelConfig.model_validate(config.model_dump()) == config


def test_recomputation_has_one_place(model: Path) -> None:
    """The field gives what the raw block gives; both at once are refused."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for raw, parallel in (({}, {"recompute": "full"}), ({"recompute_method": None}, {"recompute": "full"}), (full, {})):
        made = config_with(model, raw, **parallel)
        assert {name: getattr(made, name) for name in full} == full
    modules = config_with(model, {"recompute_modules": ["core_attn"]}, recompute="selective")
    assert (modules.recompute_granularity, modules.recompute_num_layers) == ("selective", None)
    with pytest.raises(UserError, match="megatron.recompute_num_layers = 2: parallel.recompute = full sets it; leave"):
        make_config(model, parallel={"recompute": "full"}, megatron={"recompute_num_layers": 2})


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2, "dp": 3}])
def test_wrong_number_of_ranks(parallel: dict[str, int]) -> None:
    wanted = ParallelConfig(**parallel)
    with pytest.raises(UserError, match=f"world size = 1: .* = {wanted.world_size} ranks"):
        init_topology(wanted, 1)
