"""Writes an HF folder: sharded safetensors, and everything beside the weights carried along from a template."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file

from owpo_megatron.convert.hf_model import HFModel
from owpo_megatron.convert.weights import hf_shapes
from owpo_megatron.errors import UserError

_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
)


def carry_files(template: Path, folder: Path) -> None:
    """Copy what stands beside the weights of an HF folder: config, tokenizer, generation config, chat template."""
    for pattern in _CARRIED:
        for file in template.glob(pattern):
            if file.is_file():
                shutil.copy(file, folder / file.name)


class HFWriter:
    """A context manager that takes tensors one by one; the folder appears complete, or not at all.

    Tensors are copied to the host when added; at most one shard is held.

    Args:
        folder: the HF folder to make.
        template: an HF folder of the same model; config, tokenizer, generation config and chat template come from it.
        model: decides which tensors must come.
        max_shard_bytes: a new file begins when the next tensor would exceed this.
        overwrite: replace `folder` where it exists.

    Raises:
        UserError: the template has no config.json, or `folder` exists and `overwrite` is False.

    Example:
        with HFWriter(out, template, model) as writer:
            for name, tensor in policy.named_weights():
                writer.add(name, tensor)
    """

    def __init__(
        self,
        folder: Path | str,
        template: Path | str,
        model: HFModel,
        *,
        max_shard_bytes: int = 5 * 2**30,
        overwrite: bool = False,
    ):
        self._folder, self._template = Path(folder), Path(template)
        self._max_shard_bytes = max_shard_bytes
        self._expected = hf_shapes(model)
        self._shard_of: dict[str, int] = {}
        self._shard: dict[str, torch.Tensor] = {}
        self._shard_bytes = self._total_bytes = self._num_shards = 0
        self._dtypes: set[torch.dtype] = set()
        if not (self._template / "config.json").is_file():
            raise UserError("template", self._template, "holds no config.json; give the HF folder the model came from")
        if self._folder.exists() and not overwrite:
            raise UserError("out", self._folder, "exists already; choose another folder or remove it")
        self._partial = self._folder.with_name(f".{self._folder.name}.partial-{os.getpid()}")

    def __enter__(self) -> HFWriter:
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._partial.exists():
                shutil.rmtree(self._partial)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, in any order and on any device."""
        assert name in self._expected, f"{name} is no tensor of this model"
        assert name not in self._shard_of, f"{name} came twice"
        assert tuple(tensor.shape) == self._expected[name], f"{name} {tuple(tensor.shape)} != {self._expected[name]}"
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self._max_shard_bytes:
            self._flush()
        # a copy: the caller may go on to overwrite the weight, and safetensors refuses shared storage
        self._shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._shard_of[name] = self._num_shards
        self._dtypes.add(tensor.dtype)
        self._shard_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        save_file(self._shard, self._partial / f"{self._num_shards}.safetensors", metadata={"format": "pt"})
        self._shard, self._shard_bytes = {}, 0
        self._num_shards += 1

    def _finish(self) -> None:
        missing = [name for name in self._expected if name not in self._shard_of]
        assert not missing, f"{len(missing)} tensors never came: {', '.join(missing[:8])}"
        self._flush()
        self._name_shards()
        carry_files(self._template, self._partial)
        self._set_dtype()
        self._replace_folder()

    def _name_shards(self) -> None:
        if self._num_shards == 1:
            (self._partial / "0.safetensors").rename(self._partial / "model.safetensors")
            return
        names = [f"model-{i + 1:05d}-of-{self._num_shards:05d}.safetensors" for i in range(self._num_shards)]
        for number, name in enumerate(names):
            (self._partial / f"{number}.safetensors").rename(self._partial / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: names[number] for name, number in sorted(self._shard_of.items())},
        }
        (self._partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _set_dtype(self) -> None:
        """config.json states the dtype that was written: a float32 run may start from a bfloat16 template."""
        if len(self._dtypes) != 1:
            return
        file = self._partial / "config.json"
        config = json.loads(file.read_text())
        field = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[field] = str(self._dtypes.pop()).removeprefix("torch.")
        file.write_text(json.dumps(config, indent=2) + "\n")

    def _replace_folder(self) -> None:
        """The last step; between the two renames an overwritten folder is briefly absent, never half-written."""
        old = self._folder.with_name(f".{self._folder.name}.old-{os.getpid()}")
        if not self._folder.exists():
            self._partial.rename(self._folder)
            return
        self._folder.rename(old)
        self._partial.rename(self._folder)
        shutil.rmtree(old)
