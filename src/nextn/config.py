"""What is predicted, by which heads, through which output, at which weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Tap = Literal["post_norm", "pre_norm", "before_last_layer"] | list[int]


class ConfigError(ValueError):
    """A config that cannot be used; the message says what is wrong and what to do."""


class Strict(BaseModel):
    """A config whose errors are sentences."""

    model_config = ConfigDict(extra="forbid")
    what: ClassVar[str] = "config"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_readable(error, self.what)) from None


class OutputConfig(BaseModel):
    """The projection to the vocabulary.

    kind: `shared` (the trunk's unembedding), `separate` (a table of its own for each module of the heads), `low_rank`
        (a table of its own that is a product of two thin ones), `trimmed` (a subset of the trunk's rows) or `clustered`
        (a state chooses clusters of tokens, and only those are scored).
    size: how many tokens a trimmed output can name.
    rank: of a low-rank table.
    clusters, top_clusters: how many clusters a clustered output has, and how many of them it scores for a state
        (default: 32).
    own: whether a trimmed or clustered output has rows of its own, rather than the trunk's.
    each: whether each module of the heads has such an output of its own.
    """

    model_config = ConfigDict(extra="forbid")
    kind: Literal["shared", "separate", "low_rank", "trimmed", "clustered"] = "shared"
    size: int | None = Field(default=None, ge=1)
    rank: int | None = Field(default=None, ge=1)
    clusters: int | None = Field(default=None, ge=2)
    top_clusters: int | None = Field(default=None, ge=1)
    own: bool = False
    each: bool = False

    @model_validator(mode="after")
    def _sized(self) -> OutputConfig:
        if self.own and self.kind not in ("trimmed", "clustered"):
            raise ValueError("output.own goes with trimmed and clustered; separate and low_rank always have own rows")
        for name, kind in (("size", "trimmed"), ("rank", "low_rank"), ("clusters", "clustered")):
            if (getattr(self, name) is not None) != (self.kind == kind):
                raise ValueError(f"give output.{name} for a {kind} output, and only for that")
        if self.kind == "clustered":
            self.top_clusters = self.top_clusters or min(32, self.clusters or 0)
            if self.top_clusters > (self.clusters or 0):
                raise ValueError(f"output.top_clusters is {self.top_clusters}, but there are {self.clusters} clusters")
        elif self.top_clusters is not None:
            raise ValueError("output.top_clusters goes with a clustered output")
        if self.each and not (self.has_own_table and self.kind != "separate"):
            raise ValueError("output.each goes with low_rank, and with own rows; a separate output is one each already")
        return self

    @property
    def has_own_table(self) -> bool:
        """Whether states meet rows that belong to the heads, and may have another width than the trunk's."""
        return self.kind in ("separate", "low_rank") or self.own

    def __str__(self) -> str:
        """Such as `trimmed:8192`, `low_rank:64`, `clustered:512:32,own`; `parse` reads it."""
        sizes = [self.size or self.rank or self.clusters, self.top_clusters]
        flags = [name for name in ("own", "each") if getattr(self, name)]
        return ",".join([":".join([self.kind, *(str(size) for size in sizes if size)]), *flags])

    @classmethod
    def parse(cls, stated: str, **more: Any) -> OutputConfig:
        """The config that a short form such as `trimmed:8192` stands for.

        Args:
            more: fields beside it.

        Raises:
            ConfigError: where it cannot be read.
        """
        first, *flags = stated.split(",")
        kind, *sizes = first.split(":")
        names = {"low_rank": ["rank"], "trimmed": ["size"], "clustered": ["clusters", "top_clusters"]}.get(kind, [])
        try:
            if len(sizes) > len(names):
                raise ValueError(f"{kind} takes {len(names) or 'no'} numbers")
            given = dict(zip(names, map(int, sizes), strict=False))
            if twice := sorted(given.keys() & more.keys()):
                raise ValueError(f"its {twice[0]} is given twice")
            if strange := set(flags) - {"own", "each"}:
                raise ValueError(f"there is no {strange.pop()}")
            return cls(**{"kind": kind} | given | more | dict.fromkeys(flags, True))
        except ValidationError as error:
            raise ConfigError(_readable(error, f"output {stated}")) from None
        except ValueError as error:
            raise ConfigError(
                f"The output {stated} is not usable: {error}; write shared, separate, low_rank:RANK, trimmed:SIZE or "
                "clustered:CLUSTERS:TOP, with ,own or ,each behind it."
            ) from None


class WeightsConfig(BaseModel):
    """Weights w_1 … w_n of the loss Σ w_k · L_k.

    preset: `gloeckle` (all 1), `deepseek` (w_1 = 1, the rest scale / (n-1)), `fastmtp` (w_1 = 0, w_k ∝ decay^(k-2),
    summing to 1) or `list`.
    """

    model_config = ConfigDict(extra="forbid")
    preset: Literal["gloeckle", "deepseek", "fastmtp", "list"] = "fastmtp"
    scale: float = Field(default=0.3, ge=0)
    decay: float = Field(default=0.6, gt=0, le=1)
    values: list[float] | None = None

    @model_validator(mode="after")
    def _listed(self) -> WeightsConfig:
        if (self.values is not None) != (self.preset == "list"):
            raise ValueError("give weights.values with preset 'list', and only with that")
        return self

    def check_length(self, n: int) -> None:
        """Refuse a list that is not n long; the next token alone needs no weight."""
        if n > 1 and self.values is not None and len(self.values) != n:
            raise ValueError(f"weights.values has {len(self.values)} entries, but n is {n}")

    def by_depth(self, n: int) -> list[float]:
        """[w_1, …, w_n]; [1] for n = 1, whatever the preset."""
        if n == 1 or self.preset == "gloeckle":
            return [1.0] * n
        if self.preset == "deepseek":
            return [1.0] + [self.scale / (n - 1)] * (n - 1)
        if self.preset == "fastmtp":
            raw = [self.decay ** (k - 2) for k in range(2, n + 1)]
            return [0.0] + [weight / sum(raw) for weight in raw]
        assert self.values is not None
        return self.values


class ObjectiveConfig(BaseModel):
    """What the heads are trained to follow.

    follows: `text` (negative log-likelihood of the tokens), or the trunk's own distribution p by the head's q: `kl`
        (forward Kullback-Leibler), `tv` (total variation, 1 - Σ min(p, q), which is the share of rejected samples) or
        `lk` (both: λ·KL + (1-λ)·TV with λ = exp(-3 Σ min(p, q)); arXiv:2602.23881).
    temperature: of both distributions.
    """

    model_config = ConfigDict(extra="forbid")
    follows: Literal["text", "kl", "tv", "lk"] = "text"
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _warm(self) -> ObjectiveConfig:
        if self.follows == "text" and self.temperature != 1.0:
            raise ValueError("objective.temperature applies to kl, tv and lk only")
        return self


class PhaseConfig(BaseModel):
    """Weights that hold until a share of the training is done."""

    model_config = ConfigDict(extra="forbid")
    until: float = Field(default=1.0, gt=0, le=1)
    weights: WeightsConfig


class ScheduleConfig(BaseModel):
    """How the weights of the heads change while they are trained, and on what they are trained.

    phases: weights one after the other, such as DeepSeek-V3's 0.3 and then 0.1; after the last one, and without any,
        the weights of the config.
    curriculum: `forward` adds one depth after the other, `reverse` takes the furthest away one after the other, in n
        equal parts of the training (arXiv:2505.22757).
    start: the share of the training before which heads have no weight.
    share, share_of: heads are trained on a random share of the `positions`, which saves their outputs, or of the
        `sequences` of a batch (at least one), which saves their layers too. Their loss is scaled up, so that its
        expectation stays.
    """

    model_config = ConfigDict(extra="forbid")
    phases: list[PhaseConfig] = []
    curriculum: Literal["none", "forward", "reverse"] = "none"
    start: float = Field(default=0.0, ge=0, lt=1)
    share: float = Field(default=1.0, gt=0, le=1)
    share_of: Literal["positions", "sequences"] = "positions"

    @model_validator(mode="after")
    def _ordered(self) -> ScheduleConfig:
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)):
            raise ValueError("schedule.phases must end one after the other (until: rising)")
        return self

    def weights_at(self, progress: float, usual: WeightsConfig, n: int, least: int = 1) -> list[float]:
        """[w_1, …, w_n] when a share `progress` of the training is done; depths up to `least` always have theirs."""
        phase = next((phase.weights for phase in self.phases if progress < phase.until), usual)
        weights = phase.by_depth(n)
        deepest = {"none": n, "forward": 1 + int(progress * n), "reverse": n - int(progress * n)}[self.curriculum]
        if progress < self.start:
            deepest = 1
        return [weight if depth <= max(deepest, least) else 0.0 for depth, weight in enumerate(weights, start=1)]


class MultiTokenConfig(Strict):
    """Multi-token prediction on top of a causal language model.

    n: how many tokens are predicted, the next one included; heads of depth 2 … n are added, so n-1 drafts a step.
        n = 1 is plain next-token prediction, for comparison: no heads are added, the fields about heads have no effect,
        and the trunk is trained (`freeze_trunk: false`).
    heads: `sequential` (they see the tokens between; DeepSeek-V3), `parallel` (they do not; Gloeckle et al.), `eagle3`
        (sequential and recurrent, in the shape that engines read as EAGLE-3) or `shared_kv` (sequential and recurrent,
        with the trunk's own keys and values; Gemma 4).
    recurrent: sequential only; one module for all depths (FastMTP) rather than one each.
    dense: on a host with experts, build heads from its dense layers rather than from its last one (MiMo, LongCat).
    drafter_width, drafter_layers, drafter_heads: shared_kv only; the width of its thin layers (default: half the
        trunk's), their number, and that of their query heads (default: the trunk's).
    state_noise: recurrent only; how many of the states that a step reads in training are taken from a shorter chain
        for the same place, as the states of a drafting step are better or worse (Nemotron 3 Ultra).
    head: parallel only; each head is a `transformer` layer (Gloeckle), one `linear` map, or a `residual_mlp` (Medusa).
    chaining: parallel only; whether a head reads the trunk's state (`none`), that of the head before it (`causal`) or
        that of the head after it, furthest first (`anticausal`; both Gloeckle et al., appendix).
    tap: the trunk state that the heads read. Default: `before_last_layer` for parallel transformer heads, `pre_norm`
        where these are chained causally (the trunk's last layer being the first of the chain), `post_norm` for all
        others. A list of layers takes the states that go into them: EAGLE-3 fuses three (default: the third, the middle
        and the third to last), other heads mix them with learned weights. Taps are not convertible into each other.
    output: the projection to the vocabulary.
    weights: the loss's weights per depth.
    objective: what the heads are trained to follow.
    freeze_trunk: whether only the heads are trained.

    Raises:
        ConfigError: with one sentence a problem.
    """

    what: ClassVar[str] = "multi-token config"
    n: int = Field(default=4, ge=1)
    heads: Literal["sequential", "parallel", "eagle3", "shared_kv"] = "sequential"
    recurrent: bool = False
    dense: bool = False
    drafter_width: int | None = Field(default=None, ge=1)
    drafter_layers: int = Field(default=4, ge=1)
    drafter_heads: int | None = Field(default=None, ge=1)
    state_noise: float = Field(default=0.0, ge=0, le=1)
    head: Literal["transformer", "linear", "residual_mlp"] = "transformer"
    chaining: Literal["none", "causal", "anticausal"] = "none"
    tap: Tap | None = None
    output: OutputConfig = OutputConfig()
    weights: WeightsConfig = WeightsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    freeze_trunk: bool = True

    @model_validator(mode="after")
    def _fitting(self) -> MultiTokenConfig:
        if self.tap is None and self.heads != "eagle3":
            layered = self.heads == "parallel" and self.head == "transformer"
            branch: Tap = "pre_norm" if self.chaining == "causal" else "before_last_layer"
            self.tap = branch if layered else "post_norm"
        if self.recurrent and self.heads != "sequential":
            raise ValueError("recurrent applies to sequential heads only")
        if self.state_noise and not (self.recurrent or self.heads == "eagle3"):
            raise ValueError("state_noise applies to recurrent heads only")
        if isinstance(self.tap, list) and (not self.tap or min(self.tap) < 0 or len(set(self.tap)) < len(self.tap)):
            raise ValueError("tap names layers, counted from 0, each once")
        if self.heads == "eagle3" and not (self.tap is None or (isinstance(self.tap, list) and len(self.tap) == 3)):
            raise ValueError("eagle3 fuses the states of three layers: give tap as a list of three, or leave it out")
        if self.dense and self.heads not in ("parallel", "sequential"):
            raise ValueError("dense applies to parallel and sequential heads only")
        if self.heads != "shared_kv" and (self.drafter_width or self.drafter_heads):
            raise ValueError("drafter_width and drafter_heads apply to shared_kv heads only")
        if self.heads != "parallel" and (self.head != "transformer" or self.chaining != "none"):
            raise ValueError("head and chaining apply to parallel heads only")
        self.weights.check_length(self.n)
        if not self.freeze_trunk and not self.weights.by_depth(self.n)[0]:
            raise ValueError(
                "freeze_trunk is false, but weights leave the next token out (w_1 = 0), so that the trunk would forget "
                "it: use weights.preset gloeckle or deepseek"
            )
        if self.heads != "shared_kv" and "drafter_layers" in self.model_fields_set and self.drafter_layers != 4:
            raise ValueError("drafter_layers applies to shared_kv heads only")
        if self.dense and self.head != "transformer":
            raise ValueError("dense applies to transformer heads only")
        if self.n == 1:
            if self.freeze_trunk:
                raise ValueError(
                    "n is 1, which adds no heads, and freeze_trunk is true, so that nothing would be trained: set "
                    "freeze_trunk to false, or n to at least 2"
                )
            self.tap, self.output, self.objective = "post_norm", OutputConfig(), ObjectiveConfig()
        return self

    @property
    def kind(self) -> str:
        """`parallel`, `distinct`, `recurrent`, `eagle3` or `shared_kv`; `none` for n = 1."""
        if self.n == 1:
            return "none"
        if self.heads != "sequential":
            return self.heads
        return "recurrent" if self.recurrent else "distinct"


def field_value(change: str) -> tuple[str, Any]:
    """`field=value`, with YAML for the value, as a pair.

    Raises:
        ConfigError: where it cannot be read.
    """
    name, equals, value = change.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {change} is no field=value.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {change}: the value is not YAML.") from None


def _readable(error: ValidationError, what: str) -> str:
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        if where == "n" and problem["type"] == "greater_than_equal":
            message = f"must be at least 1 (the next token alone; at least 2 with heads), not {problem['input']}"
        problems.append(f"{where}: {message}" if where else message)
    return f"The {what} is not usable: {'; '.join(problems)}."


def cache_directory() -> Path:
    """Where nextn keeps what it fetched and compiled: $NEXTN_CACHE, else nextn in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NEXTN_CACHE") or Path(home) / "nextn")
