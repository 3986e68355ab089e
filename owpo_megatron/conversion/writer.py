"""Writes an HF folder: sharded safetensors, and everything beside the weights carried along from a template."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Container, Iterable
from pathlib import Path
from types import TracebackType

import torch

from owpo_megatron.conversion.unfinished import Unfinished
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, float32_tensors, hf_shapes, stacked_shapes, transformers_config
from owpo_megatron.families.config_file import read_config_file, text_fields

# What is not carried: weights in any form, and what a conversion writes anew.
_LEFT_OUT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.distcp"),
    *("*.safetensors.index.json", "*.bin.index.json", "conversion.json", "manifest.json", ".*"),
)
_TEMPLATES = "additional_chat_templates"  # the one folder of an HF folder that belongs to it
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def carry_files(template: Path, folder: Path) -> None:
    """Copy all but the weights of an HF folder: config, tokenizer, templates, licence, model card and so on.

    The config of a multimodal folder becomes that of its text model.
    """
    for file in sorted(template.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _LEFT_OUT):
            shutil.copy(file, folder / file.name)
    if (template / _TEMPLATES).is_dir():
        shutil.copytree(template / _TEMPLATES, folder / _TEMPLATES, dirs_exist_ok=True)
    if text_fields(read_config_file(template)) is not None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # seconds

        config = transformers_config(template)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)


def state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a config.json: a float32 run may start from a bfloat16 or FP8 template."""
    config = json.loads(config_file.read_text())
    config.pop("quantization_config", None)
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[field] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")


class ShardFiles:
    """The .safetensors files of a model in an existing folder, laid out beforehand and filled in any order.

    Every tensor goes straight to its place on the disk, so nothing is held; several threads may write.

    Args:
        float32: tensors that are float32 whatever the dtype of the others.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_shard_bytes: int,
        float32: Container[str] = (),
    ):
        self._folder = folder
        self._dtypes = {name: torch.float32 if name in float32 else dtype for name in shapes}
        self._total = 0
        shards: list[dict[str, int]] = [{}]  # name -> bytes
        for name, shape in shapes.items():
            size = torch.Size(shape).numel() * self._dtypes[name].itemsize
            if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
                shards.append({})
            shards[-1][name] = size
            self._total += size
        count = len(shards)
        self._names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        )
        self._place: dict[str, tuple[str, int]] = {}  # name -> (file, offset of its first byte)
        for file, sizes in zip(self._names, shards, strict=True):
            self._lay_out(file, sizes, shapes)

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Put a tensor, or its rows from `first_row` on, where they belong."""
        assert tensor.dtype == self._dtypes[name], f"{name} is {tensor.dtype}, not {self._dtypes[name]}"
        file, offset = self._place[name]
        data = bytes_of(tensor)
        offset += first_row * tensor[:1].numel() * tensor.element_size()
        descriptor = os.open(self._folder / file, os.O_WRONLY)
        try:
            written = 0
            while written < data.nbytes:
                written += os.pwrite(descriptor, data[written:], offset + written)
        finally:
            os.close(descriptor)

    def write_index(self) -> None:
        """The list of which tensor is in which file, where there are several."""
        if len(self._names) == 1:
            return
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: file for name, (file, _) in sorted(self._place.items())},
        }
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: str, sizes: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        """The file with its header and its full length (https://github.com/huggingface/safetensors#format)."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in sizes.items():
            header[name] = {
                "dtype": _SAFETENSORS_TYPES[self._dtypes[name]],
                "shape": list(shapes[name]),
                "data_offsets": [end, end + size],
            }
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        end = 0
        for name, size in sizes.items():
            self._place[name] = (file, start + end)
            end += size
        path = self._folder / file
        if path.is_file() and path.stat().st_size == start + end:
            return  # of an attempt that goes on
        with path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(start + end)


class HFWriter:
    """A context manager that takes tensors one by one; the folder appears complete, or not at all.

    Tensors go to the disk as they come; nothing is held.

    Args:
        folder: the HF folder to make.
        template: an HF folder of the same model; config, tokenizer, generation config and chat template come from it.
        model: decides which tensors must come.
        max_shard_bytes: a file's weights do not exceed this, unless one tensor does.
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
        self._template = Path(template)
        self._max_shard_bytes = max_shard_bytes
        self._expected, self._float32 = stacked_shapes(hf_shapes(model)), float32_tensors(model)
        self._came: set[str] = set()
        self._files: ShardFiles | None = None
        self._dtype = torch.float32
        self._held: dict[str, torch.Tensor] = {}  # float32 ones that came before the others' dtype was known
        refuse_no_config(self._template)
        self._work = Unfinished(Path(folder), {"pid": os.getpid()}, overwrite)

    def __enter__(self) -> HFWriter:
        self._work.__enter__()
        self._work.start_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._work.discard()
            self._work.__exit__()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, in any order and on any device; all but a router's constants have one dtype."""
        assert name in self._expected, f"{name} is no tensor of this model"
        assert name not in self._came, f"{name} came twice"
        assert tuple(tensor.shape) == self._expected[name], f"{name} {tuple(tensor.shape)} != {self._expected[name]}"
        self._came.add(name)
        if self._files is None and name in self._float32:
            self._held[name] = tensor.clone()
            return
        if self._files is None:
            self._dtype = tensor.dtype
            self._files = ShardFiles(self._work.path, self._expected, self._dtype, self._max_shard_bytes, self._float32)
            for held, early in self._held.items():
                self._files.write(held, early)
        self._files.write(name, tensor)

    def _finish(self) -> None:
        missing = [name for name in self._expected if name not in self._came]
        assert not missing, f"{len(missing)} tensors never came: {', '.join(missing[:8])}"
        assert self._files is not None
        self._files.write_index()
        carry_files(self._template, self._work.path)
        state_dtype(self._work.path / "config.json", self._dtype)
        self._work.finish()


def refuse_no_config(template: Path) -> None:
    """Raises UserError where the folder has no config.json."""
    if not (template / "config.json").is_file():
        raise UserError("template", template, "holds no config.json; give the HF folder the model came from")


def write_hf(
    folder: Path, template: Path, model: HFModel, weights: Iterable[tuple[str, torch.Tensor]], is_main: bool
) -> None:
    """Write a policy as an HF folder, replacing one that is there. Collective over the ranks that hold it.

    Args:
        template: HF folder of the model, for everything beside the weights.
        weights: (HF name, full tensor) on the main rank; the others walk through their share of it.
    """
    if not is_main:
        deque(weights, maxlen=0)
        return
    with HFWriter(folder, template, model, overwrite=True) as writer:
        for name, tensor in weights:
            writer.add(name, tensor)


def digest(rows: Iterable[torch.Tensor]) -> str:
    """sha256 of a tensor's bytes, given as its consecutive rows."""
    sha = hashlib.sha256()
    for piece in rows:
        sha.update(bytes_of(piece))
    return sha.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row order, without a copy where it is contiguous and on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
