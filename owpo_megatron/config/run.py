"""Configuration of a run: a YAML file, dotted overrides, strict fields.

Imports no torch. Unknown fields, values of the wrong type and contradictions are refused with one `UserError` that
names the field, the value and the remedy. The resolved configuration is saved in the run folder and loads again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from owpo_megatron.config.checks import ChecksConfig
from owpo_megatron.config.data import DataConfig
from owpo_megatron.config.engine import EngineConfig
from owpo_megatron.config.environment import EnvironmentConfig
from owpo_megatron.config.evaluation import EvalConfig
from owpo_megatron.config.file import Section, first_mistake, read_mapping
from owpo_megatron.config.launch import LaunchConfig
from owpo_megatron.config.method import AlgorithmConfig, RolloutConfig
from owpo_megatron.config.model import ModelConfig
from owpo_megatron.config.optimizer import OptimizerConfig
from owpo_megatron.config.parallel import ParallelConfig
from owpo_megatron.config.reference import (
    ReferenceConfig,
    TeacherConfig,
    check_reference,
    check_teachers,
    check_whole_vocabulary,
)
from owpo_megatron.config.reward import RewardConfig
from owpo_megatron.config.routing import check_routing_replay
from owpo_megatron.config.sinks import ProfileConfig, SinksConfig
from owpo_megatron.config.sync import SyncConfig
from owpo_megatron.config.verifier import VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.methods.catalogue import find_method, make_method
from owpo_megatron.methods.method import Method


class CheckpointConfig(Section):
    every: int = Field(20, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept on disk."""
    asynchronous: bool = False
    """Write checkpoints while the next steps train, one at a time. Their state is kept in host memory as it was, and a
    run that is killed meanwhile resumes from the checkpoint before."""
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
    def recomputation(self) -> dict[str, Any]:
        """Return the raw fields of megatron-core with those of `parallel.recompute`."""
        return self.megatron | self.parallel.recompute_fields

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
        if par.tp % par.expert_tp:
            raise UserError(
                "parallel.etp", par.etp, f"must divide parallel.tp = {par.tp}; leave it out for all of them"
            )
        if par.expert_tp < par.tp and par.ep == 1:
            remedy = (
                "megatron-core 0.16.1 does not reduce such experts' gradients over the tp ranks; set parallel.ep > 1"
            )
            raise UserError("parallel.etp", par.etp, f"{remedy}, or leave it out")
        if par.expert_tp < par.tp and par.tp * par.copies % (par.expert_tp * par.ep):
            most = par.tp * par.copies // par.expert_tp
            remedy = f"must divide parallel.tp * dp * cp / etp = {most}, whose ranks hold the experts"
            raise UserError("parallel.ep", par.ep, remedy)
        if par.expert_tp == par.tp and par.copies % par.ep:
            ranks = f"parallel.dp = {par.dp}" if par.cp == 1 else f"parallel.dp * cp = {par.copies}"
            raise UserError("parallel.ep", par.ep, f"must divide {ranks}, whose ranks hold the experts")
        for name in par.recompute_fields:
            if self.megatron.get(name) is not None:
                remedy = f"parallel.recompute = {par.recompute} sets it; leave one of the two out"
                raise UserError(f"megatron.{name}", self.megatron[name], remedy)
        if par.vpp and par.pp == 1:
            raise UserError("parallel.vpp", par.vpp, "virtual stages need parallel.pp > 1; leave vpp out")
        if roll.prompts_per_step % opt.updates_per_step:
            raise UserError(
                "optimizer.updates_per_step",
                opt.updates_per_step,
                f"must divide rollout.prompts_per_step = {roll.prompts_per_step}, so that updates are equal in size",
            )
        if roll.workers != "auto" and roll.workers > par.world_size:
            remedy = f"each belongs to a rank, and there are {par.world_size}; lower it, or set auto"
            raise UserError("rollout.workers", roll.workers, remedy)
        if roll.workers != "auto" and roll.workers and roll.replay is not None:
            raise UserError("rollout.workers", roll.workers, "recorded rollouts need none; set auto, or leave it out")
        check_reference(self.reference, self.eval.every)
        self._has_a_best()
        method = find_method(self.algorithm.name)
        check_teachers(self.teachers, method, self.reference, roll.temperature)
        check_whole_vocabulary(make_method(self.algorithm), self.teachers, self.model.head, self.algorithm.tis_cap)
        if method.needs_exact_head and self.model.head != "exact":
            remedy = f"{method.name}'s gradient is a difference of log-probs, which FP8 makes too coarse; set exact"
            raise UserError("model.head", self.model.head, remedy)
        if max(self.eval.pass_at) > self.eval.samples:
            raise UserError("eval.pass_at", self.eval.pass_at, f"cannot exceed eval.samples = {self.eval.samples}")
        if roll.oversampling > 1 and not roll.keeps_mixed_groups(method):
            who = method.name if roll.dynamic_sampling is None else "rollout.dynamic_sampling: false"
            remedy = f"{who} keeps every group, none is replaced; leave it out, or set rollout.dynamic_sampling true"
            raise UserError("rollout.oversampling", roll.oversampling, remedy)
        plans = method if roll.plan is None else find_method(roll.plan)
        if self.environment is not None and not plans.takes_episodes:
            remedy = (
                "its plan begins, continues or gives whole responses, which episodes have no place for; use another"
            )
            field = "algorithm.name" if roll.plan is None else "rollout.plan"
            raise UserError(field, plans.name, f"{remedy} (owpo methods), or leave environment out")
        if roll.max_staleness and self.environment is not None:
            remedy = "episodes and training take turns; set 0, or leave environment out"
            raise UserError("rollout.max_staleness", roll.max_staleness, remedy)
        if roll.max_staleness and self.algorithm.tis_cap is None:
            remedy = "tokens of older weights need truncated importance sampling; set algorithm.tis_cap, e.g. 2"
            raise UserError("rollout.max_staleness", roll.max_staleness, remedy)
        if roll.surplus:
            self._can_cut(plans)
        check_routing_replay(self, plans)
        for field, value in (
            ("rollout.overlong_tokens", roll.overlong_tokens),
            ("reward.weights", self.reward.weights),
        ):
            if value and not method.uses_rewards:
                remedy = f"{method.name} does not use rewards; leave it out, or use another method (owpo methods)"
                raise UserError(field, value, remedy)
        return self

    def _can_cut(self, plans: type[Method]) -> None:
        """Raise where responses cannot be cut and continued."""
        roll, why = self.rollout, ""
        if roll.max_staleness < 2:
            why = "what goes on in the next step is two steps old there; set rollout.max_staleness to 2 or more"
        elif plans.plan is not Method.plan:
            why = f"{plans.name} asks for responses in a way of its own, which has no place for surplus groups; set 0"
        elif roll.stop:
            why = "a text of rollout.stop that a cut divides would not be found; set 0, or leave stop out"
        elif roll.replay is not None:
            why = "recorded responses are complete; set 0"
        elif self.engine.router is not None:
            why = "a router does not pass on which response to cut; set 0, or give engine.urls"
        if why:
            raise UserError("rollout.surplus", roll.surplus, why)

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
