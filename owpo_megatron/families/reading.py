"""Reads a model's description from an HF folder's config.json; the helpers that the families' `read` are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.errors import UserError
from owpo_megatron.families.attention import Attention, LatentAttention
from owpo_megatron.families.catalogue import MODEL_TYPES, family_of
from owpo_megatron.families.config_file import check_config_file, read_config_file, text_fields
from owpo_megatron.families.fits import check_sizes
from owpo_megatron.families.mlp import MLP, Experts
from owpo_megatron.families.model import HFModel, Multipliers, Norms
from owpo_megatron.families.rope import Rope, read_rope

if TYPE_CHECKING:
    from owpo_megatron.families.family import Family

_LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
_SAME_AS = {"kimi_k2": "deepseek_v3"}  # model_types that transformers lacks -> the one with the same model


@dataclass(frozen=True)
class HFConfig:
    """transformers' config of a folder. It knows each type's defaults, and where older files keep their settings."""

    path: Path
    raw: Any

    def get(self, field: str, default: Any = None) -> Any:
        return getattr(self.raw, field, default)

    def require(self, field: str, expected: Any) -> None:
        """Refuse another value than the expected one (which is the default, too).

        Raises:
            UserError: naming the field.
        """
        value = self.get(field, expected)
        if value != expected:
            raise self.refusal(field, value, f"not supported; only {expected} is")

    def refusal(self, field: str, value: Any, remedy: str) -> UserError:
        return UserError(f"{self.path / 'config.json'} {field}", value, remedy)


def read_hf_config(path: Path | str) -> HFModel:
    """Read the description of the model in an HF folder (only config.json is needed).

    Raises:
        UserError: no such folder or config.json, an unknown model_type, or a feature that megatron's model would
            silently lack (unsupported rope scaling, other biases or activations among others).
    """
    path = Path(path)
    family = supported_family(path)
    try:
        model = family.read(HFConfig(path, transformers_config(path)))
        check_sizes(model, f"{path / 'config.json'}")
        return model
    except UserError:
        raise
    except Exception as error:  # transformers' validation has many types, and ends in others where it has none
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError("model.path", path / "config.json", f"describes no {family.name} model: {reason}") from error


def supported_family(path: Path) -> Family:
    """The family of the model in an HF folder, by its config.json alone: imports neither torch nor transformers.

    Raises:
        UserError: as `read_hf_config`, before anything of the family is read.
    """
    file = read_config_file(path)
    kind = (text_fields(file) or file).get("model_type")
    family = family_of("(missing)" if kind is None else str(kind), path)
    if kind in MODEL_TYPES:  # another package's family may name its sizes otherwise
        check_config_file(path, file)
    return family


def transformers_config(folder: Path | str) -> Any:
    """transformers' config object of an HF folder, of the text model where there are others.

    The folder's own code, which some bring along, is not executed.
    """
    from transformers import AutoConfig  # seconds: an unknown model_type is refused before

    raw = read_config_file(Path(folder))
    fields = text_fields(raw) or raw
    kind = str(fields.get("model_type"))
    if fields is raw and kind not in _SAME_AS:
        return AutoConfig.from_pretrained(folder)
    named = {name: value for name, value in fields.items() if name != "model_type"}
    return AutoConfig.for_model(_SAME_AS.get(kind, kind), **named)


def describe(
    config: HFConfig,
    family_name: str,
    attention: Attention | LatentAttention,
    mlp: MLP | Experts,
    norms: Norms | None = None,
    rope: Rope | None = None,
    multipliers: Multipliers | None = None,
    local_rope: Rope | None = None,
) -> HFModel:
    """The core of a description, and the parts. Defaults: RMSNorms before attention and MLP; the config's rope."""
    raw = config.raw
    return HFModel(
        family_name=family_name,
        num_layers=raw.num_hidden_layers,
        hidden_size=raw.hidden_size,
        vocab_size=raw.vocab_size,
        max_positions=raw.max_position_embeddings,
        tied=bool(raw.tie_word_embeddings),
        attention=attention,
        mlp=mlp,
        norms=norms or Norms(raw.rms_norm_eps),
        rope=rope or read_rope(config.path, raw),
        multipliers=multipliers or Multipliers(),
        local_rope=local_rope,
    )


def attention_of(config: HFConfig, **parts: Any) -> Attention:
    """Grouped-query attention by the usual fields; `parts` are further ones of `Attention`."""
    raw = config.raw
    num_heads = raw.num_attention_heads
    return Attention(
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or raw.hidden_size // num_heads,
        **(_window(config) | parts),
    )


def mlp_of(config: HFConfig) -> MLP:
    """The gated MLP with silu."""
    config.require("hidden_act", "silu")
    config.require("mlp_bias", False)
    return MLP(config.raw.intermediate_size)


def _window(config: HFConfig) -> dict[str, Any]:
    """The window and the layers without; transformers leaves it None or 0 where `use_sliding_window` is false."""
    window, kinds = config.get("sliding_window"), config.get("layer_types") or []
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            raise config.refusal("layer_types", kind, f"not supported; use {', '.join(_LAYER_TYPES)}")
    if not window or window >= config.raw.max_position_embeddings:
        return {}
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    return {} if kinds and len(full) == len(kinds) else dict(window=window, full_layers=full)
