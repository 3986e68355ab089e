"""conversion.json: what a converted folder holds, tensor by tensor, and the proof that both sides compute the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from owpo_megatron.errors import UserError
from owpo_megatron.run.files import write_whole
from owpo_megatron.run.layout import CONVERSION, MANIFEST


@dataclass(frozen=True)
class Proof:
    """Outcome of comparing the two sides: every tensor's hash, and the logits of one fixed prompt in float32."""

    ok: bool
    tensors: int  # HF tensors whose bits were compared
    tokens: int  # of the prompt
    largest_logit: float
    largest_difference: float  # of a logit
    tolerance: float  # what it may be
    complaint: str = ""  # what is wrong, where it is not ok


@dataclass(frozen=True)
class Conversion:
    """The content of conversion.json.

    tensors: sha256 of each HF tensor's bytes, in `dtype`.
    proof: None where it was asked not to be made.
    """

    family: str
    dtype: str
    tensors: dict[str, str]
    proof: Proof | None

    def write(self, folder: Path) -> None:
        """Replace the folder's conversion.json in one go."""
        write_whole(folder / CONVERSION, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Conversion | None:
        """None where the folder has none.

        Raises:
            UserError: it is not readable.
        """
        file = folder / CONVERSION
        if not file.is_file():
            return None
        try:
            raw = json.loads(file.read_text())
            proof = Proof(**raw.pop("proof")) if raw.get("proof") else raw.pop("proof", None)
            return cls(**raw, proof=proof)
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError("megatron", file, f"is damaged ({error}); convert the model again") from error


def require_proof(folder: Path) -> None:
    """Refuse a converted folder that was never shown to compute what its source computes.

    What a run has written (checkpoints, best/) was never converted and needs none.

    Raises:
        UserError: its proof failed, or there is none.
    """
    if (folder / MANIFEST).is_file():
        return
    conversion = Conversion.read(folder)
    if conversion is None or conversion.proof is None:
        remedy = f"a converted folder without a proof; make it: owpo convert verify --megatron {folder} --hf ITS_SOURCE"
        raise UserError("megatron folder", folder, remedy)
    if not conversion.proof.ok:
        remedy = f"its conversion is wrong: {conversion.proof.complaint}; convert the model again"
        raise UserError("megatron folder", folder, remedy)
