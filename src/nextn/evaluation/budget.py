"""What multi-token prediction would weigh and cost on a model, of which only the config is needed.

Trunk and heads are built as they are, on the meta device: nothing is allocated, and counts are those of real modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nextn.config import ConfigError, MultiTokenConfig, OutputConfig, field_value
from nextn.evaluation.costs import (
    BATCHES,
    Costs,
    Machine,
    Option,
    best_n,
    cheapest,
    costs_of,
    stored_bytes,
    stored_parameters,
    tau_of,
    usual_outputs,
)
from nextn.evaluation.report import narrow_table
from nextn.formats import FormatError, native
from nextn.formats.checks import read_json
from nextn.model import MultiTokenModel
from nextn.trunk import HostError, Trunk

AUTO = "auto"
KINDS: dict[str, dict[str, Any]] = {
    "recurrent": {"heads": "sequential", "recurrent": True},
    "distinct": {"heads": "sequential"},
    "parallel": {"heads": "parallel"},
    "eagle3": {"heads": "eagle3"},
    "shared_kv": {"heads": "shared_kv"},
}
ASSUMED = [0.7]
OF_OPTIONS = {"n", "heads", "recurrent", "output"}  # fields of the heads that have options of their own


@dataclass(frozen=True)
class Budget:
    """What is asked of `budget`.

    heads, outputs, n: the combinations; outputs in short form or `auto`; default: all kinds, the usual outputs, 2 … 8.
    depths: `auto`: say which n is the fastest.
    fields: further fields of `MultiTokenConfig`, such as drafter_width.
    conditional: acceptance of draft 1, 2, …, given that all earlier ones stand; the last one holds for the rest.
    measured: what `nextn compress --json` wrote: acceptance by output, which takes the place of `conditional`.
    keep: for `auto`: the share of the acceptance to keep.
    batch, context: rows of a step, and positions in each row's cache.
    bandwidth, rate: bytes and operations a second of the machine.
    width: bytes a weight.
    trust_remote_code: run the code that the model's repository brings.
    """

    model: str
    heads: Sequence[str] = ()
    outputs: Sequence[str] = ()
    n: Sequence[int] = ()
    depths: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    conditional: Sequence[float] = ()
    measured: Path | None = None
    keep: float = 0.95
    batch: int = 1
    context: int = 1024
    bandwidth: float = 1e11
    rate: float = 1e13
    width: int = 2
    trust_remote_code: bool = False


@dataclass
class Entry:
    """One combination, and all that is said of it."""

    heads: str
    output: str
    n: int
    parameters: int
    output_parameters: int
    output_part: tuple[int, int]  # parameters of one output, and the width of states that it reads
    bytes: int
    costs: Costs
    operations: int
    acceptance: str  # `measured`, `given` or `assumed`
    tau: float
    speedup: float
    stops_paying: int | None
    slow_batches: list[int]

    @property
    def draft_share(self) -> float:
        """What a draft reads, on average, beside what a plain step of the trunk reads."""
        return self.costs.draft_weights / self.costs.trunk.met()

    @property
    def verify_reads(self) -> float:
        """What a verification at batch 1 reads beside a plain step: more only where tokens choose experts."""
        return self.costs.trunk.read(self.n) / self.costs.trunk.read(1)

    def figures(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "heads": self.heads,
            "output": self.output,
            "n": self.n,
            "parameters": {"heads": self.parameters, "output": self.output_parameters},
            "bytes": self.bytes,
            "draft_weights": round(self.costs.draft_weights),
            "draft_over_trunk": self.draft_share,
            "output_operations": self.operations,
            "verification_reads_over_trunk": self.verify_reads,
            "verification_operations_over_trunk": self.n,
            "acceptance": self.acceptance,
            "tau": self.tau,
            "speedup": self.speedup,
            "stops_paying_at_batch": self.stops_paying,
            "slower_at_batches_too": self.slow_batches,
        }


def budget(asked: Budget, console: Console) -> dict[str, Any]:
    """Build all combinations, print what they weigh and cost, and give it as JSON has it.

    Raises:
        ConfigError, FormatError, HostError: for a config, an output or a host that cannot be used.
    """
    base = on_meta(asked.model, asked.trust_remote_code)
    trunk = Trunk(base)
    measured = _measured(asked.measured)
    ns = list(asked.n) or list(range(2, 9))
    if min(ns) < 2:
        raise ConfigError(f"n must be at least 2 (the next token and one more), not {min(ns)}.")
    outputs, reasons = _outputs(asked, trunk, measured)
    entries: list[Entry] = []
    left_out: dict[str, dict[int, str]] = {}
    for kind in asked.heads or KINDS:
        for output in outputs:
            for n in ns:
                try:
                    entries.append(_entry(asked, base, kind, output, n, measured))
                except (ConfigError, HostError) as error:
                    left_out.setdefault(f"{kind}, {output}", {})[n] = str(error).rstrip(".")
    if not entries:
        raise ConfigError(f"{next(iter(next(iter(left_out.values())).values()))}.")
    if asked.depths not in (None, AUTO):
        raise ConfigError(f"--depths is {asked.depths}; give auto, or numbers with --n.")
    built = sorted({entry.n for entry in entries})
    shown_n = 4 if 4 in built else built[-1]
    shown = [entry for entry in entries if entry.n == shown_n]
    if asked.depths == AUTO:
        chosen = _depths(entries)
        shown = [entry for entry, _ in chosen]
        reasons += [f"{entry.heads}, {entry.output}: {why}" for entry, why in chosen]
    for each in (weights_table(entries, ns), outputs_table(entries), steps_table(shown, asked)):
        console.print(each)
    reasons.insert(0, separate_sentence(outputs, trunk, shown_n))
    for what, whys in left_out.items():
        of = "" if len(whys) == len(ns) else f" at n = {', '.join(map(str, whys))}"
        reasons.append(f"{what} is left out{of}: {next(iter(whys.values()))}")
    for reason in reasons[:8]:
        console.print(f"{reason}.", highlight=False)
    if len(reasons) > 8:
        console.print(f"… and {len(reasons) - 8} more sentences of this kind, which --json has.", highlight=False)
    sources = ", ".join(sorted({entry.acceptance for entry in shown}))
    console.print(
        "[dim]Draft: the weights that it meets, its output included, beside those that a token meets in the trunk. "
        "Verify: what that reads beside a plain step / how often it multiplies. Acceptance: "
        f"{sources}. Speed-up: expected over plain decoding, from {asked.bandwidth / 1e9:,.0f} GB/s and "
        f"{asked.rate / 1e12:,.1f} TFLOP/s at {asked.context:,} positions. Pays below: the batch from which on "
        "drafting is slower than plain decoding. Whether the host's rotation and logits suit the heads is not checked "
        "here, but where they are attached.[/dim]"
    )
    return {
        "model": asked.model,
        "trunk": {"parameters": _count(base), "weights_met": round(entries[0].costs.trunk.met())},
        "entries": [entry.figures() for entry in entries],
        "left_out": left_out,
        "reasons": reasons,
        "machine": {"bandwidth": asked.bandwidth, "rate": asked.rate},
        "batch": asked.batch,
        "context": asked.context,
    }


def fields_of(changes: Sequence[str]) -> dict[str, Any]:
    """`field=value`, with YAML for the value.

    Raises:
        ConfigError: where one cannot be read.
    """
    fields = dict(map(field_value, changes))
    for name in fields:
        if name in OF_OPTIONS:
            raise ConfigError(f"--set {name} would change what --n, --heads and --output state; use these.")
        if name not in MultiTokenConfig.model_fields:
            raise ConfigError(f"--set {name}: heads have no such field.")
    return fields


def shares_of(stated: str | None) -> list[float]:
    """`0.8,0.7` as numbers.

    Raises:
        ConfigError: where they are not shares.
    """
    try:
        shares = [float(share) for share in stated.split(",")] if stated else []
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"--acceptance is {stated}; give shares between 0 and 1, such as 0.8,0.7.")
    return shares


def on_meta(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model without weights, from a config file, a directory, a hub name, or the base of heads.

    Raises:
        FormatError: where there is no such config, or transformers cannot build it.
    """
    with native.opening(f"The config of {model}"):
        path = Path(model)
        if path.suffix == ".json":
            config = AutoConfig.for_model(**read_json(path))
        else:
            name = native.base_of(model) if native.has_heads(model) else model
            config = native.load_config(name, trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config.get_text_config(), dtype=torch.bfloat16, trust_remote_code=trust_remote_code
            )


def _entry(asked: Budget, base: PreTrainedModel, kind: str, output: OutputConfig, n: int, measured: Measured) -> Entry:
    if kind not in KINDS:
        raise ConfigError(f"There are no {kind} heads; choose from {', '.join(KINDS)}.")
    fields: dict[str, Any] = {"n": n, "output": output.model_dump()} | KINDS[kind] | asked.fields
    config = MultiTokenConfig(**fields)
    with torch.device("meta"):
        model = MultiTokenModel(base, config)
    heads, table = stored_parameters(model.heads)
    costs = costs_of(model)
    machine = Machine(asked.bandwidth, asked.rate, asked.width)
    found = measured.get((kind, str(output)))
    source = "measured" if found else "given" if asked.conditional else "assumed"
    tau = tau_of(found["conditional"] if found else asked.conditional or ASSUMED, n)
    width = model.heads.output_width(config, model.trunk) if output.has_own_table else model.trunk.width
    return Entry(
        heads=kind,
        output=str(output),
        n=n,
        parameters=heads,
        output_parameters=table,
        output_part=(table // len(list(model.heads.output.parts())), width),
        bytes=stored_bytes(model.heads),
        costs=costs,
        operations=model.heads.output.operations(model.trunk),
        acceptance=source,
        tau=tau,
        speedup=costs.speedup(machine, asked.batch, asked.context, tau),
        stops_paying=costs.stops_paying(machine, asked.context, tau),
        slow_batches=costs.slow_batches(machine, asked.context, tau),
    )


Measured = dict[tuple[str, str], dict[str, Any]]  # by kind of heads and output


def _measured(path: Path | None) -> Measured:
    """Conditional acceptance and share kept, from what compress wrote; what it ended with comes last, and holds."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
        return {
            (each["heads"], each["output"]): {
                "conditional": [share for share in each["acceptance"]["conditional"] if share is not None] or [0.0],
                "kept": each["kept"],
            }
            for each in [*found["tried"], found["after"]]
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(f"{path} is not what `nextn compress --json` writes.") from None


def _outputs(asked: Budget, trunk: Trunk, measured: Measured) -> tuple[list[OutputConfig], list[str]]:
    """The outputs in question, and why, where they were chosen."""
    if list(asked.outputs) != [AUTO]:
        if asked.outputs:
            return [OutputConfig.parse(each) for each in asked.outputs], []
        usual = {config.kind: config for config in usual_outputs(trunk.vocab_size, trunk.width)}  # the smallest of each
        return [OutputConfig(kind="separate"), *usual.values()], []
    if not measured:
        raise ConfigError("--output auto compares measured acceptance: give --measured, from nextn compress --json.")
    options = []
    for (kind, name), figures in measured.items():
        if asked.heads and kind not in asked.heads:
            continue
        fields: dict[str, Any] = {"output": OutputConfig.parse(name).model_dump()} | KINDS[kind] | asked.fields
        with torch.device("meta"):
            output = MultiTokenModel(trunk.model, MultiTokenConfig(**fields)).heads.output
        options.append(Option(name, output.operations(trunk), figures["kept"]))
    if not options:
        raise ConfigError(f"{asked.measured} was measured on other heads than {', '.join(asked.heads)}.")
    chosen, why = cheapest(options, asked.keep)
    return [OutputConfig.parse(chosen.name)], [why]


def _depths(entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """For each pair of heads and output the entry whose n is the fastest, and why."""
    groups: dict[tuple[str, str], dict[int, Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.heads, entry.output), {})[entry.n] = entry
    found = []
    for by_n in groups.values():
        n, why = best_n({n: entry.speedup for n, entry in by_n.items()})
        found.append((by_n[n], why))
    return found


# --- what is printed ----------------------------------------------------------------------------------------------


def weights_table(entries: Sequence[Entry], ns: Sequence[int]) -> Table:
    """What heads weigh without their output, by kind and n."""
    trunk = entries[0].costs.trunk
    title = f"heads, without their output; a token meets {short(trunk.met())} weights of the trunk"
    shown = narrow_table(title, ("heads", *(f"n = {n}" for n in ns)))
    for kind in dict.fromkeys(entry.heads for entry in entries):
        by_n = {entry.n: entry.parameters for entry in entries if entry.heads == kind}
        shown.add_row(kind, *(short(by_n[n]) if n in by_n else "–" for n in ns))
    return shown


def outputs_table(entries: Sequence[Entry]) -> Table:
    """What one output stores and multiplies, by the width of the states that it reads."""
    met = entries[0].costs.trunk.met()
    columns = ("output", "width", "stored", "bytes", "multiplications a draft", "of trunk")
    shown = narrow_table("outputs", columns)
    rows = dict.fromkeys((entry.output, *entry.output_part, entry.operations) for entry in entries)
    for output, stored, width, operations in rows:
        cells = short(stored), f"{short(2 * stored)}B", short(operations), f"{operations / met:.1%}"
        shown.add_row(output, f"{width:,}", *cells)
    return shown


def separate_sentence(outputs: Sequence[OutputConfig], trunk: Trunk, n: int) -> str:
    """What separate outputs for all depths would weigh, and what each compression makes of it."""
    one = trunk.vocab_size * trunk.width
    compressed = []
    for config in outputs:
        if config.kind in ("low_rank", "trimmed", "clustered"):
            with torch.device("meta"):
                built = MultiTokenModel(trunk.model, MultiTokenConfig(recurrent=True, output=config))
            stored = stored_parameters(built.heads)[1]
            left = stored * (n - 1) if config.has_own_table else stored
            compressed.append(f"{config} {short(left) if left else 'nothing, its rows being the trunk’s'}")
    makes = f". Of it would be left: {'; '.join(compressed)}" if compressed else ""
    return (
        f"One separate output weighs {short(one)} parameters ({short(2 * one)}B in bfloat16), {n - 1} of them, one for "
        f"each depth of n = {n}, {short((n - 1) * one)} ({short(2 * (n - 1) * one)}B){makes}"
    )


def steps_table(entries: Sequence[Entry], asked: Budget) -> Table:
    """What a step costs and brings."""
    columns = ("heads", "output", "n", "draft", "verify", "τ", "speed-up", "pays below")
    shown = narrow_table(f"a step, batch {asked.batch}", columns, left=2)
    for entry in entries:
        shown.add_row(
            entry.heads,
            entry.output,
            str(entry.n),
            f"{entry.draft_share:.1%}",
            f"{entry.verify_reads:.2f} / {entry.n}",
            f"{entry.tau:.2f}",
            f"{entry.speedup:.2f}",
            _pays_below(entry),
        )
    return shown


def _pays_below(entry: Entry) -> str:
    if entry.stops_paying == 1:
        return "never"
    stops = f"over {BATCHES[-1]:,}" if entry.stops_paying is None else f"{entry.stops_paying:,}"
    slow = entry.slow_batches
    return f"{stops}, not {slow[0]}–{slow[-1]}" if len(slow) > 1 else f"{stops}, not {slow[0]}" if slow else stops


def short(count: float) -> str:
    """1,234,567 as `1.23M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def _count(base: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in base.parameters())
