"""A model family as one frozen record. A file of families defines one or a few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reading import HFConfig
from owpo_megatron.families.rules import Rule

_GATE_UP = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
_QKV = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}


@dataclass(frozen=True)
class EngineNames:
    """Names and fusions of the family's HF tensors in SGLang (see `engine.EngineLayout`).

    Args:
        fused: module of a dense HF tensor -> SGLang's module, and the tensor's place in it.
        expert: an expert's gate, up and down projection.
        ties: SGLang ties the head where the config does. False: it keeps a head of its own, which is sent as well.
        windows: SGLang computes this family's attention window. False: it attends to all tokens.
    """

    fused: Mapping[str, tuple[str, int]] = field(default_factory=lambda: _QKV | _GATE_UP)
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ties: bool = True
    windows: bool = False

    def __hash__(self) -> int:
        return hash((tuple(self.fused.items()), self.expert, self.ties, self.windows))


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Args:
        name: name of the family, in errors and in conversion.json.
        model_types: values of config.json's model_type.
        read: an HF config -> the model's description. Raises UserError for what megatron-core would get wrong.
        rules: the weight rules of such a model; those of the output layer are there for a tied model, too.
        engine: names and layout in the engine.
        ignored: regular expressions of HF tensors that are left out; `{num_layers}` is the model's number of layers
            (the name of the first one for multi-token prediction).
        special: what distinguishes the family, for docs/families.md.
    """

    name: str
    model_types: tuple[str, ...]
    read: Callable[[HFConfig], HFModel]
    rules: Callable[[HFModel], tuple[Rule, ...]]
    engine: EngineNames = EngineNames()
    ignored: tuple[str, ...] = ()
    special: str = ""

    def ignored_in(self, model: HFModel) -> list[str]:
        """The regular expressions of left out tensors, for one model."""
        return [pattern.replace("{num_layers}", str(model.num_layers)) for pattern in self.ignored]
