"""Sharded checkpoints (torch_dist): policy, optimizer, scheduler and reference, at any TP, PP or DP size."""

from __future__ import annotations

import pickle
import queue
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from owpo_megatron.errors import UserError
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.optimizer import distributed_optimizers
from owpo_megatron.mcore.sharded_files import StoredState, global_shapes
from owpo_megatron.mcore.slots import ParameterSlots
from owpo_megatron.mcore.state_writer import StateWriter

# Saved once for all ranks and readable at another data-parallel size ("fully_sharded_model_space" is broken in 0.16.1).
_OPTIMIZER_FORMAT = "fully_reshardable"
_EXTRA_STATE = "_extra_state"
# State that an optimizer keeps in its parameter groups besides settings; FusedAdam counts its steps there.
_GROUP_STATE = ("params", "step")


@cpu.scoped
def save_training_state(
    path: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    slots: ParameterSlots,
) -> None:
    """Write all sharded state into the existing empty folder `path`. Collective.

    The reference is written only when it differs from the policy (`slots.aliased` False).
    """
    _save(path, _training_state(chunks, optimizer, scheduler, slots))


@cpu.scoped
def begin_training_state(
    path: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    slots: ParameterSlots,
) -> StateWriter:
    """The same, written by a process per rank: the state may change once this returns. Collective."""
    return StateWriter(_save(path, _training_state(chunks, optimizer, scheduler, slots), asynchronous=True))


def _training_state(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    slots: ParameterSlots,
) -> dict[str, Any]:
    metadata = _metadata()
    state = _model_state(chunks, "model.", metadata)
    state |= {
        "optimizer": optimizer.sharded_state_dict(_merged(state), is_loading=False, metadata=metadata),
        "scheduler": scheduler.state_dict(),
    }
    if not slots.aliased:
        with slots.showing_reference():
            reference = _model_state(chunks, "reference.", metadata)
            _pin_to_current_storage(reference.values())
        state |= {f"reference_{key}": value for key, value in reference.items()}
    return state


@cpu.scoped
def load_training_state(
    path: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    slots: ParameterSlots,
    aliased: bool,
) -> None:
    """Restore the state that `save_training_state` wrote, bit for bit. Collective.

    The settings of optimizer and scheduler (learning rate, weight decay, betas, ...) come from this run's config, not
    from the checkpoint; the number of updates is restored. `aliased`: the reference was the policy.

    Raises:
        UserError: the folder is incomplete, contains another model, or would run code.
    """
    metadata = _metadata()
    _check_fits(path, chunks, metadata)
    _check_optimizers(path, optimizer)
    if aliased or not slots.keeps_reference:
        slots.swap()  # drop a separate reference that was loaded from `reference.path` at the start
    else:
        # Load through the parameters; the policy overwrites them next.
        _load_model(path, chunks, "reference.", metadata)
        slots.load_reference()
    state = _model_state(chunks, "model.", metadata)
    state |= {
        "optimizer": optimizer.sharded_state_dict(_merged(state), is_loading=True, metadata=metadata),
        "scheduler": scheduler.state_dict(),
    }
    loaded = _load(path, state)
    _fill_chunks(chunks, loaded, "model.")
    settings = [{key: group[key] for key in group if key not in _GROUP_STATE} for group in optimizer.param_groups]
    optimizer.load_state_dict(loaded["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    scheduler.load_state_dict(loaded["scheduler"])


@cpu.scoped
def save_weights(path: Path, chunks: Sequence[Any]) -> None:
    """Write the weights alone, in the format of tools/convert_hf_to_megatron.py. Collective."""
    _save(path, _weights_state(chunks, "model.", _metadata()))


@cpu.scoped
def load_weights(path: Path, chunks: Sequence[Any]) -> None:
    """Read the weights of a folder written by `save_weights` or `save_training_state`; dtypes may differ. Collective.

    Raises:
        UserError: the folder is incomplete or contains another model.
    """
    metadata = _metadata()
    _check_fits(path, chunks, metadata)
    _load_model(path, chunks, "model.", metadata)


def stored_dtype(path: Path) -> torch.dtype:
    """Return the dtype of the weights in a folder. Raises UserError if the folder is incomplete."""
    return StoredState(path).dtype("model.embedding.word_embeddings.weight")


def tensors_of(module: Any, prefix: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the sharded state dict of a megatron module, weights alone."""
    state = module.sharded_state_dict(prefix=prefix, metadata=metadata or _metadata())
    return {key: value for key, value in state.items() if not _is_extra(key)}


def fill(module: Any, named: dict[str, Any]) -> None:
    """Load weights, which must cover exactly the module's."""
    missing, unexpected = module.load_state_dict(named, strict=False)
    lost = [name for name in missing if not _is_extra(name)]
    assert not lost and not unexpected, f"{lost} not loaded, {unexpected} unknown"


def _is_extra(name: str) -> bool:
    """Whether this is a layer's state beside its weights; grouped experts number theirs, `_extra_state1` and so on."""
    return name.rpartition(".")[2].startswith(_EXTRA_STATE)


def _save(path: Path, state: dict[str, Any], asynchronous: bool = False) -> Any:
    """megatron-core's save; with `asynchronous` nothing is written but common.pt, and what is to do is returned."""
    # megatron passes the results of writing through a queue in a spawned manager process, which only an asynchronous
    # save needs: starting it and importing torch in it takes seconds, and it imports `__main__` again.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    metadata = {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
    return dist_checkpointing.save(
        state, str(path), _save_strategy(), async_sharded_save=asynchronous, content_metadata=metadata
    )


def _save_strategy() -> SaveShardedStrategy:
    """Ranks with the same tensors share the writing of them."""
    strategy = get_default_save_sharded_strategy()
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return strategy if copies.size() == 1 else FullyParallelSaveStrategyWrapper(strategy, copies)


def _load_model(path: Path, chunks: Sequence[Any], prefix: str, metadata: dict[str, Any]) -> None:
    _fill_chunks(chunks, _load(path, _weights_state(chunks, prefix, metadata)), prefix)


def _load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """megatron-core's load.

    Raises:
        UserError: it failed (torch's CheckpointException, which is not an Exception, holds one error for each rank), or
            its common.pt names code.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
    except CheckpointException as error:
        first = next((failure[0] for failure in error.failures.values()), error)
        reason = " ".join(str(first).split())[:300]
        raise UserError("megatron checkpoint", path, f"cannot be loaded: {type(first).__name__}: {reason}") from error
    except pickle.UnpicklingError as error:  # torch's own words advise to read it all the same
        remedy = "names code, or is damaged; do not use this folder"
        raise UserError("megatron checkpoint", path / "common.pt", remedy) from error
    return loaded


def _check_fits(path: Path, chunks: Sequence[Any], metadata: dict[str, Any]) -> None:
    """Compare a folder with the tensors of all pipeline ranks: where layers differ, each has keys of its own."""
    model, own = _bare(chunks[0]), global_shapes(_weights_state(chunks, "model.", metadata))
    stages = [own]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        stages = [{}] * parallel_state.get_pipeline_model_parallel_world_size()
        torch.distributed.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    wanted = {key: shape for stage in stages for key, shape in stage.items()}
    StoredState(path).check_shapes(wanted, "model.", model.true_vocab_size, model.share_embeddings_and_output_weights)


def _check_optimizers(path: Path, optimizer: MegatronOptimizer) -> None:
    """Refuse another number of optimizers: with ep above 1 experts have one of their own, under keys of its own."""
    stored = any(key.startswith("chained_") for key in StoredState(path).keys())
    if stored != (len(distributed_optimizers(optimizer)) > 1):
        remedy = (
            f"{path} was saved with parallel.ep {'above' if stored else 'of'} 1, and the optimizer's state can be "
            "loaded only by such a run; resume with that, or start another from its weights (model.path)"
        )
        raise UserError("parallel.ep", parallel_state.get_expert_model_parallel_world_size(), remedy)


def _metadata() -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"distrib_optim_sharding_type": _OPTIMIZER_FORMAT, "dp_cp_group": group}


def _model_state(chunks: Sequence[Any], prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        f"chunk{index}": _bare(chunk).sharded_state_dict(prefix=prefix, metadata=metadata)
        for index, chunk in enumerate(chunks)
    }


def _weights_state(chunks: Sequence[Any], prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the weights alone, so that folders are interchangeable between Transformer Engine's and local layers.

    Transformer Engine's extra state (FP8 scales) is recreated; local layers have none.
    """
    return {f"chunk{index}": tensors_of(_bare(chunk), prefix, metadata) for index, chunk in enumerate(chunks)}


def _merged(state: dict[str, Any]) -> dict[str, Any]:
    return state["chunk0"] if len(state) == 1 else dict(state)


def _fill_chunks(chunks: Sequence[Any], loaded: dict[str, Any], prefix: str) -> None:
    for index, chunk in enumerate(chunks):
        named = {key.removeprefix(prefix): value for key, value in loaded[f"chunk{index}"].items()}
        fill(_bare(chunk), named)


def _bare(chunk: Any) -> Any:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def _pin_to_current_storage(chunk_states: Iterable[dict[str, Any]]) -> None:
    """Replace Parameters by their current storage: once the policy is shown again they would point to its slot."""
    for state in chunk_states:
        for sharded in state.values():
            if isinstance(getattr(sharded, "data", None), torch.Tensor):
                sharded.data = sharded.data.detach()
