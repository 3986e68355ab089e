"""Configuration of a run: a YAML file, dotted overrides, strict fields.

Imports no torch. Unknown fields, values of the wrong type and contradictions are refused with one `UserError` that
names the field, the value and the remedy. The resolved configuration is saved in the run folder and loads again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from owpo_megatron.config.checks import ChecksConfig
from owpo_megatron.config.data import DataConfig
from owpo_megatron.config.environment import EnvironmentConfig
from owpo_megatron.config.file import Section, first_mistake, read_mapping
from owpo_megatron.config.launch import LaunchConfig
from owpo_megatron.config.method import AlgorithmConfig, RolloutConfig
from owpo_megatron.config.optimizer import OptimizerConfig
from owpo_megatron.config.reference import (
    ReferenceConfig,
    TeacherConfig,
    check_reference,
    check_teachers,
    check_whole_vocabulary,
)
from owpo_megatron.config.reward import RewardConfig
from owpo_megatron.config.sinks import ProfileConfig, SinksConfig
from owpo_megatron.config.verifier import Rule, VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.methods.catalogue import find_method, make_method

log = logging.getLogger(__name__)

HF_FILES = "hf"  # folder inside a converted megatron folder, with the HF folder's config.json, tokenizer and the like


def hf_folder(path: Path, field: str = "model.path") -> Path:
    """Return the folder with a model's config.json and tokenizer: `path` itself, or hf/ inside a converted folder.

    Raises:
        UserError: neither has a config.json that can be read.
    """
    if not path.is_dir():
        remedy = (
            "no such folder; name an HF folder or a converted megatron folder (hf download OWNER/NAME --local-dir "
            "FOLDER makes one; for a small model: owpo quickstart)"
        )
        raise UserError(field, path, remedy)
    for folder in (path, path / HF_FILES):
        file = folder / "config.json"
        if file.is_file():
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                raise UserError(field, path, f"its config.json is not JSON ({error}); copy the model again") from error
            return folder
    if (path / "checkpoints").is_dir():
        raise UserError(field, path, "is a run's folder; name its best/ or one of its checkpoints/step_N")
    raise UserError(field, path, f"has neither config.json (HF) nor {HF_FILES}/config.json (converted)")


class ModelConfig(Section):
    path: Path
    """HF checkpoint folder, a megatron folder made by `owpo convert import`, or OWNER/NAME[@REVISION] on the hub, which
    is downloaded before anything starts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policy's weights and activations; master weights and gradients are float32."""
    head: Literal["exact", "fp8_refined"] = "exact"
    """Vocabulary head of every pass: policy, old and reference alike. `fp8_refined`: FP8 over the vocabulary, with the
    target and the best candidates recomputed exactly, and the loss formed from that; log-probs and gradients are
    checked against `exact` at the start, with a fallback to it."""

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, given: Any) -> Any:
        if isinstance(given, dict) and "logprob" in given:
            log.warning("model.logprob is now model.head, and holds for the training pass too; rename it")
            given = given | {"head": given["logprob"]}
            del given["logprob"]
        return given


class ParallelConfig(Section):
    tp: int = Field(1, gt=0)
    """Tensor-parallel ranks."""
    pp: int = Field(1, gt=0)
    """Pipeline stages."""
    dp: int = Field(1, gt=0)
    """Data-parallel ranks. The run has tp x pp x dp ranks."""
    vpp: int | None = Field(None, ge=2)
    """Virtual pipeline stages per rank (needs pp > 1)."""
    sp: bool = False
    """Sequence parallelism inside the tensor-parallel group (needs tp > 1)."""
    ep: int = Field(1, gt=0)
    """Expert parallelism: distribute a layer's experts over data-parallel ranks; must divide dp."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


class EngineConfig(Section):
    urls: list[str] = []
    """URLs of running SGLang servers; empty: the run starts and stops its own."""
    router: str | None = None
    """URL of an sglang-router: samples go through it, weights go directly to each engine behind it."""
    rendezvous: Path | None = None
    """Folder where engines that others start announce themselves (`owpo serve --rendezvous`, `owpo launch`)."""
    announced: int = Field(1, gt=0)
    """Engines to wait for in `rendezvous`."""
    python: Path | None = None
    """Interpreter of SGLang's environment; null: the one that `make setup` or `owpo setup-engine` made, else this
    one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the run's own servers; `auto` uses NVIDIA GPUs if there are any."""
    host: str = "127.0.0.1"
    """Address that the run's own servers listen on."""
    port: int = Field(0, ge=0, le=65535)
    """Port of the first server; further servers take the following ones. 0: free ports."""
    tp: int = Field(1, gt=0)
    """Tensor-parallel ranks of each server."""
    count: int = Field(1, gt=0)
    """Servers that the run starts; requests are distributed over them."""
    startup_timeout: float = Field(300.0, gt=0)
    """Seconds to wait for the server's first answer."""
    request_timeout: float = Field(600.0, gt=0)
    """Seconds for one response before its engine counts as hung."""
    max_restarts: int = Field(3, ge=0)
    """Maximum restarts per engine; then the run fails."""
    concurrency: int = Field(256, gt=0)
    """Requests in flight per engine."""


class SyncConfig(Section):
    transport: Literal["tensor", "distributed", "disk", "ipc"] = "tensor"
    """How weights reach the engines. `tensor`: in the request, or by shared memory to the run's own engines;
    `distributed`: broadcast over NCCL or gloo; `disk`: safetensors in a folder that the engines see; `ipc`: CUDA
    handles, for engines on the trainer's node."""
    bucket_mb: int = Field(512, gt=0)
    """Largest bucket of weights in MB; up to three buckets are in memory at a time."""
    folder: Path | None = None
    """With `disk`: a folder that every engine sees under the same path and that no other run uses; null: sync/ in the
    run folder."""
    delta: bool = False
    """With `disk`: write only the elements that changed since the last update (few in bfloat16, nearly all in float32).
    For the run's own engines and those of `engine.rendezvous`."""
    mirror: Path = Path("/dev/shm")
    """With `delta`: directory for a full copy of the weights, on the trainer and next to every remote engine. Use a
    tmpfs; every update dirties almost every page."""
    fp8: bool = False
    """Quantise linear weights before sending them (e4m3, 128 x 128 blocks) and start own engines to match. CUDA
    only."""
    verify: Literal["off", "hash", "logprob"] = "off"
    """Check of the delivered weights after every update. `hash`: every tensor of every engine; `logprob`: short samples
    of every engine, recomputed by the trainer."""
    tolerance: float | None = Field(None, gt=0)
    """Largest mean |difference| with `verify: logprob`; null: 1e-4 for float32, 0.05 for bfloat16, 0.2 with fp8."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> SyncConfig:
        if self.delta and self.transport != "disk":
            raise UserError("sync.delta", True, f"only transport disk supports it, not {self.transport}; set it false")
        if self.fp8 and self.verify == "hash":
            raise UserError("sync.verify", "hash", "engines hash quantised weights differently; use logprob")
        return self


Instruction = Literal["boxed", "dapo", "none"]
Estimator = Literal["unbiased", "bootstrap"]


class SetConfig(Section):
    """A built-in set (`owpo eval --list`) or your own file (`source`). A field left null keeps the built-in value."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of a built-in set, or of your own."""
    source: str | None = None
    """A .jsonl, .parquet or .csv file, or `task:NAME` for a generated task's test split."""
    samples: int | None = Field(None, gt=0)
    """Samples per problem."""
    temperature: float | None = Field(None, gt=0)
    """Sampling temperature."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling threshold."""
    limit: int | None = Field(None, gt=0)
    """Use only the first problems."""
    pass_at: list[Annotated[int, Field(gt=0)]] | None = Field(None, min_length=1)
    """Values of k for Pass@k."""
    rule: Rule | None = None
    """The verifier's rule, as `verifier.rule`."""
    instruction: Instruction | None = None
    """As `eval.instruction`."""
    pass_estimator: Estimator | None = None
    """As `eval.pass_estimator`."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, raw: Any) -> Any:
        return {"name": raw} if isinstance(raw, str) else raw


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after."""
    before: bool = True
    """Evaluate before the first step."""
    after: bool = True
    """Evaluate after the last step."""
    samples: int = Field(8, gt=0)
    """Samples per problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Nucleus sampling threshold."""
    limit: int | None = Field(None, gt=0)
    """Use only the first problems of the set; null: all."""
    pass_at: list[Annotated[int, Field(gt=0)]] = Field([1, 8], min_length=1)
    """Values of k for Pass@k; each at most `samples`."""
    pass_estimator: Estimator = "unbiased"
    """Pass@k from n samples: `unbiased`, k of them without replacement; `bootstrap`, with replacement, which is lower
    where few are right."""
    instruction: Instruction = "boxed"
    """With a chat template, the instruction for the answer in problems that have none: to box it; `dapo`, the sentences
    of DAPO's training prompts; or `none`. Not for a run's held-out problems, which are as in training."""
    sets: list[SetConfig] = []
    """Evaluation sets, each with fields of its own; a plain name is short for `{name: ...}`. Empty: the held-out
    problems of `data`, with the fields above."""
    primary: str | None = None
    """Set whose scores are used for curves and for choosing the best checkpoint; null: the first of `sets`."""
    data_dir: Path | None = None
    """Folder with the files of built-in sets; null: that of the variable OWPO_DATA. Missing files come from the hub."""

    @model_validator(mode="after")
    def _sets_are_told_apart(self) -> EvalConfig:
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise UserError("eval.sets", ", ".join(names), "a set is named twice; give each its own name")
        if self.primary is not None and self.primary not in names:
            raise UserError("eval.primary", self.primary, f"must be one of eval.sets: {', '.join(names) or '(empty)'}")
        return self


class CheckpointConfig(Section):
    every: int = Field(20, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept on disk."""
    keep_best: bool = False
    """Keep the weights with the best Pass@1 of the run's evaluations in best/."""
    keep_at_score: float | None = Field(None, gt=0, le=1)
    """Keep the first weights whose evaluation has at least this Pass@1 in reached/: a suboptimal reference for other
    runs (paper, section 5.3); null: do not."""
    export_hf: bool = True
    """Also write the final policy as an HF folder, hf/."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, OWNER/NAME, to which `owpo push` uploads hf/ with its model card; null: the
    command names it."""


class Config(Section):
    """Configuration of a run. `Config.load` reads a file and applies overrides."""

    name: str = "run"
    """Name of the run's folder."""
    seed: int = Field(1, ge=0, lt=2**31)
    """Seed for the order of problems and for sampling."""
    runs_dir: Path = Path("runs")
    """Folder in which the run's folder is created."""
    model: ModelConfig
    data: DataConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    reference: ReferenceConfig = ReferenceConfig()
    teachers: list[TeacherConfig] = []
    """For opd and mopd: teachers by domain, instead of the reference."""
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    sync: SyncConfig = SyncConfig()
    verifier: VerifierConfig = VerifierConfig()
    environment: EnvironmentConfig | None = None
    """Turns with tools; null: responses have one turn, and the verifier alone judges them."""
    reward: RewardConfig = RewardConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    checks: ChecksConfig = ChecksConfig()
    sinks: SinksConfig = SinksConfig()
    profile: ProfileConfig = ProfileConfig()
    launch: LaunchConfig = LaunchConfig()
    megatron: dict[str, Any] = {}
    """Raw fields of megatron-core's TransformerConfig."""
    sglang: dict[str, Any] = {}
    """Raw server arguments of SGLang: `mem_fraction_static: 0.8` becomes `--mem-fraction-static 0.8`."""

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.name

    @model_validator(mode="after")
    def _refreshes_as_its_method(self) -> Config:
        if self.reference.refresh is None:
            own = self.reference.model_copy(update={"refresh": find_method(self.algorithm.name).refresh})
            own.model_fields_set.discard("refresh")
            object.__setattr__(self, "reference", own)  # frozen for everyone else
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> Config:
        par, opt, roll = self.parallel, self.optimizer, self.rollout
        if par.sp and par.tp == 1:
            raise UserError("parallel.sp", True, "sequence parallelism needs parallel.tp > 1; set sp false or raise tp")
        if par.dp % par.ep:
            raise UserError("parallel.ep", par.ep, f"must divide parallel.dp = {par.dp}, whose ranks hold the experts")
        if par.vpp and par.pp == 1:
            raise UserError("parallel.vpp", par.vpp, "virtual stages need parallel.pp > 1; leave vpp out")
        if roll.prompts_per_step % opt.updates_per_step:
            raise UserError(
                "optimizer.updates_per_step",
                opt.updates_per_step,
                f"must divide rollout.prompts_per_step = {roll.prompts_per_step}, so that updates are equal in size",
            )
        check_reference(self.reference, self.eval.every)
        self._has_a_best()
        method = find_method(self.algorithm.name)
        check_teachers(self.teachers, method, self.reference, roll.temperature)
        check_whole_vocabulary(make_method(self.algorithm), self.teachers, self.model.head, self.algorithm.tis_cap)
        if max(self.eval.pass_at) > self.eval.samples:
            raise UserError("eval.pass_at", self.eval.pass_at, f"cannot exceed eval.samples = {self.eval.samples}")
        if roll.oversampling > 1 and not roll.keeps_mixed_groups(method):
            who = method.name if roll.dynamic_sampling is None else "rollout.dynamic_sampling: false"
            remedy = f"{who} keeps every group, none is replaced; leave it out, or set rollout.dynamic_sampling true"
            raise UserError("rollout.oversampling", roll.oversampling, remedy)
        if roll.max_staleness and self.environment is not None:
            remedy = "episodes and training take turns; set 0, or leave environment out"
            raise UserError("rollout.max_staleness", roll.max_staleness, remedy)
        if roll.max_staleness and self.algorithm.tis_cap is None:
            remedy = "tokens of older weights need truncated importance sampling; set algorithm.tis_cap, e.g. 2"
            raise UserError("rollout.max_staleness", roll.max_staleness, remedy)
        for field, value in (
            ("rollout.overlong_tokens", roll.overlong_tokens),
            ("reward.weights", self.reward.weights),
        ):
            if value and not method.uses_rewards:
                remedy = f"{method.name} does not use rewards; leave it out, or use another method (owpo methods)"
                raise UserError(field, value, remedy)
        return self

    def _has_a_best(self) -> None:
        """Check that there are evaluations with a Pass@1 if the best weights are kept."""
        wants = self.eval
        keeps = {name: getattr(self.checkpoint, name) for name in ("keep_best", "keep_at_score")}
        for name, value in keeps.items():
            if value and not (wants.every or wants.after):
                raise UserError(f"checkpoint.{name}", value, "nothing is evaluated; set eval.every, or leave it out")
        chooses = any(keeps.values()) or self.reference.refresh == "best_of_stage"
        if chooses and not wants.sets and 1 not in wants.pass_at:
            raise UserError("eval.pass_at", wants.pass_at, "the best weights are chosen by Pass@1; add 1")

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Config:
        """Read a YAML file (and what it includes) and apply `dotted.field=value` overrides (values are YAML).

        Raises:
            UserError: the file is missing or not YAML, or a field is unknown, ill-typed or contradictory.
        """
        return cls.build(read_mapping(Path(path), overrides))

    @classmethod
    def build(cls, raw: dict[str, Any]) -> Config:
        """Validate a plain mapping; the first mistake raises a `UserError`."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise first_mistake(error, Config) from error

    def save(self, path: Path) -> None:
        """Write the resolved configuration, including every default."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
