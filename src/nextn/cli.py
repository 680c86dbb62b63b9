"""The command line: one short function a verb. Parse, call, print."""

from __future__ import annotations

import json
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    help="Multi-token prediction for any Hugging Face causal language model: train heads, decode losslessly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

DType = Literal["auto", "float32", "bfloat16"]
Kind = Literal["recurrent", "distinct", "parallel"]


TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's repository brings. Read it before.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Run as machine code: compiled once, in minutes, and kept.")]


def _plainly(verb: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends in one sentence and exit status 1, without a traceback."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except (ValueError, OSError) as error:
            Console(stderr=True).print(Text.assemble(("nextn: ", "red"), str(error)))
            raise typer.Exit(1) from None

    return run


def _refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ValueError: where one of them is on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out.")


def _with_bar(answers: Iterable[Any], total: int, tokens_of: Callable[[Any], int]) -> Iterator[Any]:
    """The same answers, with a bar of how many there are, the time left and their tokens."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[t]}")
    with Progress(TextColumn("answers"), *columns) as bar:
        task, tokens = bar.add_task("", total=total, t=""), 0
        for answer in answers:
            tokens += tokens_of(answer)
            bar.update(task, advance=1, t=f"{tokens:,} tokens")
            yield answer


def _answer_prompts(
    records: list[dict[str, Any]],
    out: Path,
    open_model: Callable[[], tuple[Any, Any]],
    max_new_tokens: int,
    sampling: Any,
) -> Any:
    """Answer the prompts that `out` does not answer yet, appending to it.

    Args:
        sampling: whose seed gives each record one of its own, the same whenever it is answered.

    Returns:
        the `Acceptance`; None where nothing was to be done.
    """
    from dataclasses import replace

    from nextn.decoding.sampling import prompt_seeds
    from nextn.distill import distill, encoded, remaining
    from nextn.evaluation.acceptance import Acceptance
    from nextn.formats.native import writable
    from nextn.lock import FileLock

    seeds = {id(record): seed for record, seed in zip(records, prompt_seeds(sampling.seed, len(records)), strict=True)}
    writable(out.parent)
    with FileLock(out):  # from before it is read, so that no prompt is answered by two processes
        todo = remaining(records, out)
        if not todo:
            console.print(f"{out} answers all {len(records)} prompts: nothing is changed")
            return None
        engine, tokenizer = open_model()
        context = engine.trunk.max_length
        prompts = encoded(tokenizer, todo, context)
        if left_out := len(todo) - len(prompts):
            what = "1 prompt is" if left_out == 1 else f"{left_out} prompts are"
            console.print(f"{what} too long for the context of {context} tokens and left out")
        samplings = [replace(sampling, seed=seeds[id(record)]) for record, _ in prompts]
        results = distill(engine, tokenizer, prompts, out, max_new_tokens, samplings)
        return Acceptance.of(_with_bar(results, len(prompts), lambda result: len(result.tokens)), engine.n)


@app.command()
@_plainly
def attach(
    base: Annotated[str, typer.Argument(help="The model to attach heads to: a directory or a hub name.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines with prompt and answer, or text; repeatable.")],
    out: Annotated[Path, typer.Option(help="Where the heads go; training goes on from here when killed.")],
    n: Annotated[int, typer.Option(help="Tokens predicted, the next one included: n - 1 drafts a step.")] = 4,
    heads: Annotated[Kind, typer.Option(help="One module for all depths, one each, or parallel heads.")] = "recurrent",
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Tokens that drafts can name, most frequent first; 0: all.")
    ] = 8192,
    epochs: Annotated[float, typer.Option(min=1e-3, help="Passes over the data.")] = 3.0,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Peak learning rate, falling to a tenth. Default: by width and kind."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a packed block.")] = 512,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Blocks in a batch. Default: 2, more for more than 2,000 steps."),
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the heads: half a minute, and then faster steps.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order of the data.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train heads on a frozen model."""
    from nextn.config import MultiTokenConfig
    from nextn.recipe import Recipe
    from nextn.recipe import train as run

    school = {"heads": "parallel"} if heads == "parallel" else {"recurrent": heads == "recurrent"}
    recipe = Recipe(
        base=base,
        heads=MultiTokenConfig(n=n, **school),
        vocabulary=vocabulary or None,
        data=[str(file) for file in data],
        length=length,
        compile="heads" if compile else False,
        seed=seed,
        training={
            "num_train_epochs": epochs,
            "save_steps": save_steps,
            **({} if learning_rate is None else {"learning_rate": learning_rate}),
            **({} if batch is None else {"per_device_train_batch_size": batch}),
        },
    )
    run(recipe, out, say=console.print, trust_remote_code=trust_remote_code)


def _list_recipes(wanted: bool) -> None:
    """`nextn train --list`."""
    if not wanted:
        return
    from nextn.recipe_files import shipped_recipes

    table = Table("name", "what", "source")
    for recipe in shipped_recipes():
        table.add_row(Text(recipe.name, no_wrap=True), recipe.what, recipe.source)
    console.print(table)
    raise typer.Exit


@app.command()
@_plainly
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that ships: see --list.")],
    out: Annotated[Path, typer.Option(help="Where the result goes; training goes on from here when killed.")],
    base: Annotated[str | None, typer.Option(help="The model to start from, over the recipe's.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Files or hub datasets, over the recipe's; repeatable.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="field=value, over the recipe's: training.max_steps=100.")
    ] = None,
    _list: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_recipes, help="List the recipes that ship.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train by a recipe: from scratch, heads on a frozen model, or both together."""
    from accelerate import PartialState

    from nextn.recipe import Recipe
    from nextn.recipe import train as run

    given = {name: value for name, value in (("base", base), ("data", data)) if value}
    run(Recipe.read(recipe, given, change or []), out, say=console.print, trust_remote_code=trust_remote_code)
    PartialState().wait_for_everyone()  # of several processes, the first one writes
    PartialState().destroy_process_group()


@app.command()
@_plainly
def compress(
    heads: Annotated[
        str, typer.Argument(help="Heads that nextn wrote (a directory or a hub name), or the bundled model's name.")
    ],
    out: Annotated[Path, typer.Option(help="Where the heads go.")],
    output: Annotated[
        str,
        typer.Option(help="shared, separate, low_rank, trimmed, clustered (or short: trimmed:8192), or auto."),
    ],
    size: Annotated[int | None, typer.Option(help="trimmed: how many tokens drafts can name.")] = None,
    rank: Annotated[int | None, typer.Option(help="low_rank: its rank.")] = None,
    clusters: Annotated[int | None, typer.Option(help="clustered: how many clusters of tokens.")] = None,
    top_clusters: Annotated[int | None, typer.Option(help="clustered: how many a state scores.")] = None,
    own: Annotated[bool, typer.Option("--own", help="trimmed, clustered: rows of its own, not the trunk's.")] = False,
    each: Annotated[bool, typer.Option("--each", help="An output for each module of the heads.")] = False,
    depths: Annotated[
        str | None, typer.Option(help="Predict so many tokens, no more than before; auto: as many as pay here.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Text: counted for a trimmed output, trained on with --steps; repeatable.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Count only records of this category.")] = None,
    script: Annotated[
        list[str] | None, typer.Option(help="Keep only tokens of this script, such as latin; repeatable.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="A JSON list of the token ids that a trimmed output keeps.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(min=0, max=1, help="auto: the share of the acceptance to keep. Default: 0.95.")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of recovery training.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(min=1e-9, help="Of recovery training. Default: 5e-4.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `prompt` and `category`, to measure on. Default: the demo's.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many prompts, from each category in turn.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a prompt.")] = 96,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Give trained heads a smaller output or fewer depths, and say what acceptance that cost."""
    from nextn.compress import AUTO, Compression
    from nextn.compress import compress as run
    from nextn.config import OutputConfig
    from nextn.evaluation.report import check_report, write_report

    check_report(json_file)
    fields: dict[str, Any] = {"size": size, "rank": rank, "clusters": clusters, "top_clusters": top_clusters}
    fields |= {"own": own or None, "each": each or None}
    given = {name: value for name, value in fields.items() if value is not None}
    if output == AUTO and given:
        raise ValueError(f"--output auto chooses by itself; leave --{next(iter(given)).replace('_', '-')} out.")
    wanted = Compression(
        heads=heads,
        output=output if output == AUTO else str(OutputConfig.parse(output, **given)),
        depths=int(depths) if depths and depths.isdigit() else depths,
        data=data or [],
        category=category,
        scripts=script or [],
        tokens=tokens,
        keep=keep,
        steps=steps,
        learning_rate=learning_rate,
        prompts=prompts,
        count=count,
        new_tokens=new_tokens,
        trust_remote_code=trust_remote_code,
    )
    found = run(wanted, out, console)
    write_report(json_file, found)


@app.command()
@_plainly
def budget(
    model: Annotated[str, typer.Argument(help="A config file, a directory, a hub name; only the config is needed.")],
    heads: Annotated[
        list[str] | None,
        typer.Option(help="recurrent, distinct, parallel, eagle3, shared_kv; repeatable; default: all."),
    ] = None,
    n: Annotated[list[int] | None, typer.Option(help="Tokens predicted; repeatable. Default: 2 to 8.")] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(help="Such as trimmed:8192; repeatable; auto: by --measured. Default: one of each."),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the heads: drafter_width=256; repeatable.")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="auto: say which n is the fastest.")] = None,
    acceptance: Annotated[
        str | None, typer.Option(help="Conditional, of draft 1, 2, …: 0.8,0.7. The last one holds for the rest.")
    ] = None,
    measured: Annotated[Path | None, typer.Option(help="Acceptance by output, from nextn compress --json.")] = None,
    keep: Annotated[float, typer.Option(min=0, max=1, help="auto: the share of the acceptance to keep.")] = 0.95,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 1,
    context: Annotated[int, typer.Option(min=0, help="Positions in the cache of each row.")] = 1024,
    bandwidth: Annotated[
        float | None, typer.Option(min=1e-3, help="GB/s. Default: as measured on this machine.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="TFLOP/s. Default: as measured here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what heads and outputs would weigh and cost on a model, and when drafting would pay; allocates nothing."""
    import torch

    from nextn.evaluation.budget import Budget, fields_of, shares_of
    from nextn.evaluation.budget import budget as run
    from nextn.evaluation.report import check_report, write_report
    from nextn.evaluation.roofline import measure_machine
    from nextn.formats.bundled import best_dtype

    check_report(json_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here = measure_machine(best_dtype(), 2**29, device) if bandwidth is None or rate is None else {}
    asked = Budget(
        model=model,
        heads=heads or (),
        outputs=output or (),
        n=n or (),
        depths=depths,
        fields=fields_of(change or []),
        conditional=shares_of(acceptance),
        measured=measured,
        keep=keep,
        batch=batch,
        context=context,
        bandwidth=here["bandwidth"] if bandwidth is None else bandwidth * 1e9,
        rate=here["rate"] if rate is None else rate * 1e12,
        width=best_dtype().itemsize if here else 2,
        trust_remote_code=trust_remote_code,
    )
    found = run(asked, console)
    write_report(json_file, found)


@app.command()
@_plainly
def generate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="What nextn wrote (a directory or a hub name); with --heads 1 any causal model.")
    ],
    prompt: Annotated[str | None, typer.Argument(help="What the user says.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt, or before each.")] = None,
    messages: Annotated[
        Path | None, typer.Option(help="A chat to answer: JSON, a list of messages with role and content.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `prompt` or `messages`, answered side by side into --out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --prompts: where answers are appended; what is answered there is skipped.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="With --prompts: how many are answered side by side.")] = 16,
    chat: Annotated[bool, typer.Option("--chat", help="Hold a conversation in the terminal.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer. Default: 128; with --chat 1024.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="1: the plain model alone. Default: all heads.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the best token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens of this share.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens of this share of the best one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: against what was said already.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed gives the same text, with drafts and without. Default: another one each time."
        ),
    ] = None,
    tree: Annotated[
        Path | None, typer.Option(help="A tree of drafts (JSON), where it pays; --depth all: always.")
    ] = None,
    depth: Annotated[
        str, typer.Option(help="Drafts a step reads: a number, all, or auto (as far as it pays).")
    ] = "auto",
    dtype: Annotated[DType, typer.Option(help="Dtype of trunk and heads.")] = "auto",
    compile: Compile = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer a prompt, a chat or a file of prompts, or hold a conversation; say what the drafts were worth."""
    from nextn.decoding.sampling import Sampling
    from nextn.decoding.tree import Tree
    from nextn.formats.native import open_for_decoding
    from nextn.prompts import read_chat, read_questions

    ways = {"a prompt": prompt is not None, "--messages": messages, "--prompts": prompts, "--chat": chat}
    given = [way for way, value in ways.items() if value]
    if len(given) != 1:
        raise ValueError(
            f"Give one of a prompt, --messages, --prompts and --chat, not {' and '.join(given) or 'none'}."
        )
    if prompts is None:
        _refuse_given(context, ("out", "rows"), "goes with --prompts")
    elif out is None:
        raise ValueError("--prompts needs --out, the file that answers are appended to.")
    if prompt is not None and not prompt.strip():
        raise ValueError("The prompt is empty: give some text.")
    seed = secrets.randbelow(2**31) if seed is None else seed  # PyTorch's generator begins alike in every process
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if heads == 1 and tree is not None:
        raise ValueError("--heads 1 is the plain model, which reads no tree: leave --tree out.")
    if not (depth in ("auto", "all") or depth.isdigit()):
        raise ValueError(f"--depth is {depth!r}; give a number, all or auto.")
    settings: dict[str, Any] = (
        {}
        if heads == 1
        else {
            "depth": {"auto": "auto", "all": None}[depth] if depth in ("auto", "all") else int(depth),
            "tree": None if tree is None else Tree.read(tree),
        }
    )

    def open_model() -> tuple[Any, Any]:
        count = rows if prompts else 1
        engine, tokenizer = open_for_decoding(model, heads, dtype, count, trust_remote_code, keep=chat, **settings)
        return engine.compile(sampling=not sampling.is_greedy) if compile else engine, tokenizer

    with_system = {} if system is None else {"system": system}
    used = f", seed {seed}" if sampling.by_chance else ""
    longest = max_new_tokens or (1024 if chat else 128)
    if prompts is not None and out is not None:
        records = [record | with_system for record in read_questions(prompts)]
        figures = _answer_prompts(records, out, open_model, longest, sampling)
        if figures is not None:
            Console(stderr=True).print(f"[dim]τ {figures.tau:.2f}{used}[/dim]")
    elif chat:
        _chat(open_model, system, longest, sampling, used)
    else:
        question = {"prompt": prompt} if messages is None else {"messages": read_chat(messages)}
        _answer(question | with_system, open_model, longest, sampling, used)


def _answer(
    question: dict[str, Any],
    open_model: Callable[[], tuple[Any, Any]],
    max_new_tokens: int,
    sampling: Any,
    used: str,
) -> None:
    """Answer one prompt or chat, streaming.

    Args:
        used: ends the line of figures.
    """
    from nextn.data import TextStream, question_ids
    from nextn.evaluation.acceptance import Acceptance

    engine, tokenizer = open_model()
    ids, text = question_ids(tokenizer, question), TextStream(tokenizer)

    def stream(_index: int, tokens: list[int], _origins: list[int]) -> None:
        _show("".join(text.push(token) for token in tokens))

    ((_, result),) = engine.generate([ids], max_new_tokens, stream, sampling)
    _show(text.flush() + "\n")
    if result.error is not None:
        raise ValueError(str(result.error))
    figures = Acceptance.of([result], engine.n)
    Console(stderr=True).print(f"[dim]{len(result.tokens)} tokens, τ {figures.tau:.2f}{used}[/dim]")


def _chat(
    open_model: Callable[[], tuple[Any, Any]], system: str | None, max_new_tokens: int, sampling: Any, used: str
) -> None:
    """`nextn generate --chat`."""
    from contextlib import suppress

    from nextn.conversation import Conversation, converse
    from nextn.data import check_chats

    engine, tokenizer = open_model()
    check_chats(tokenizer)
    with suppress(ImportError):  # editing and a history of lines, where the system has them
        import readline  # noqa: F401
    errors, sign = Console(stderr=True), "> " if sys.stdin.isatty() else ""

    def note(text: str) -> None:
        errors.print(Text(text, "dim"))

    converse(Conversation(engine, tokenizer, system, max_new_tokens, sampling), lambda: input(sign), _show, note)
    if used:
        note(used.removeprefix(", "))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
@_plainly
def distill(
    context: typer.Context,
    prompts: Annotated[Path, typer.Option(help="JSON lines with a `prompt` each.")],
    out: Annotated[Path, typer.Option(help="Where answers are appended; prompts answered there are skipped.")],
    base: Annotated[
        str | None, typer.Argument(help="The model that answers: a directory or a hub name. Or give --server.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="A server with OpenAI's API that answers, such as vLLM's; OPENAI_API_KEY is sent if set."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --server: the model's name there. Default: the only one.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --server: how many prompts are asked at once.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer this many prompts at most.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Prompts answered side by side.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer; the context ends one too.")] = 256,
    dtype: Annotated[DType, typer.Option(help="Dtype of the model.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the order of the prompts.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make training text: let the base model answer prompts, in batches, resumable.

    With --server another program runs the model. Heads learn to draft for the model that wrote the text: answers of
    another model than the base are not the base's own text, and drafts trained on them are accepted less often.
    """
    import random

    from nextn.data import read_prompts
    from nextn.decoding.sampling import GREEDY
    from nextn.distill import interleaved
    from nextn.formats.native import open_for_decoding

    if (base is None) == (server is None):
        raise ValueError("Give the model that answers, or --server; not both.")
    if server is None:
        _refuse_given(context, ("model", "concurrency"), "goes with --server")
    else:
        _refuse_given(context, ("rows", "dtype", "trust_remote_code"), "is of a model that runs here, not of --server")
    records = read_prompts(prompts)
    random.Random(seed).shuffle(records)
    records = interleaved(records)[:limit]
    if server is not None:
        _ask_server(server, model, records, out, max_new_tokens, concurrency)
    elif base is not None:
        name = base
        _answer_prompts(
            records, out, lambda: open_for_decoding(name, 1, dtype, rows, trust_remote_code), max_new_tokens, GREEDY
        )


def _ask_server(
    url: str, model: str | None, records: list[dict[str, Any]], out: Path, max_new_tokens: int, concurrency: int
) -> None:
    """`nextn distill --server`."""
    import os

    from nextn.distill import distill_from, remaining
    from nextn.formats.native import writable
    from nextn.lock import FileLock
    from nextn.openai_client import ChatServer

    writable(out.parent)
    with FileLock(out):
        todo = remaining(records, out)
        if not todo:
            console.print(f"{out} answers all {len(records)} prompts: nothing is changed")
            return
        server = ChatServer.connect(url, model, os.environ.get("OPENAI_API_KEY") or None)
        console.print(f"{server.model} answers, at {server.url}", highlight=False)
        answers = distill_from(server, todo, out, max_new_tokens, concurrency)
        for _ in _with_bar(answers, len(todo), lambda answer: answer.num_tokens):
            pass


@app.command()
@_plainly
def info(
    directory: Annotated[Path, typer.Argument(help="What nextn wrote: a directory or a hub name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a directory holds: base, hash, heads, parameters and bytes of each part."""
    from nextn.formats.native import contents

    found = contents(directory)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(title=str(directory), title_justify="left")
    for column in ("part", "parameters", "bytes"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, size in found["parts"].items():
        table.add_row(part, f"{size['parameters']:,}", f"{size['bytes']:,}")
    for key in ("base", "hash", "heads", "n", "output", "tap"):
        console.print(f"{key:>8}  {found[key]}", highlight=False, soft_wrap=True)
    console.print(table)


@app.command()
@_plainly
def bench(
    model: Annotated[
        str, typer.Argument(help="What nextn wrote (a directory or a hub name), or the name of the bundled model.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `prompt` and `category`. Default: those of the demo.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="So many prompts, from each category in turn.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a prompt.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="How often each contender answers each prompt.")] = 3,
    dtype: Annotated[
        DType, typer.Option(help="Dtype of nextn, transformers and vLLM; auto: bfloat16 where the CPU has it.")
    ] = "auto",
    gguf: Annotated[list[Path] | None, typer.Option(help="The model for llama.cpp (xllamacpp); repeatable.")] = None,
    vllm_python: Annotated[str | None, typer.Option(help="The Python of an environment that has vLLM.")] = None,
    replay: Annotated[
        str | None, typer.Option(help="Replay acceptances: a file of an earlier --json, or a τ such as 2.4.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Rows, like 1,2,4,8: measure our engine over our own plain one at each.")
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="With --batch: temperatures, like 0,0.7,1.")] = None,
    method: Annotated[
        Literal["coupled", "rejection", "block"], typer.Option(help="With --batch: how drafts are verified by chance.")
    ] = "coupled",
    tree: Annotated[
        Path | None, typer.Option(help="With --batch: a tree of drafts (JSON), where it is faster.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile our engine.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots there.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure speed beside transformers, llama.cpp and vLLM, interleaved, with losslessness and a roofline.

    With --batch or --temperature: our engine with heads, drafting as far as it pays, over our own plain one.
    """
    from importlib.util import find_spec

    from nextn.evaluation.bench import Settings, conditions, tables
    from nextn.evaluation.bench import bench as run
    from nextn.evaluation.report import check_report, write_report
    from nextn.formats.bundled import best_dtype
    from nextn.formats.native import tokenizer_of

    if html is not None and find_spec("matplotlib") is None:
        raise ValueError("The page needs matplotlib: pip install 'nextn[eval]'.")
    check_report(json_file)
    check_report(html)
    wanted = str(best_dtype()).removeprefix("torch.") if dtype == "auto" else dtype
    settings = Settings(
        model=model,
        prompts=prompts,
        count=count,
        new_tokens=new_tokens,
        repeats=repeats,
        dtype=wanted,
        gguf=gguf or [],
        vllm_python=vllm_python,
        replay=replay,
        eager=eager,
        trust_remote_code=trust_remote_code,
    )
    if batch is None and temperature is None and (tree is not None or method != "coupled"):
        raise ValueError("--tree and --method go with --batch or --temperature.")
    if batch is not None or temperature is not None:
        if html is not None:
            raise ValueError("The page is of a bench beside other engines: leave --html or --batch out.")
        if tree is not None and method != "coupled":
            raise ValueError("A tree is verified by coupled sampling: leave --tree or --method out.")
        _bench_batches(settings, batch or "1", temperature or "0", method, tree, json_file)
        return
    found = run(settings, console)
    for table in tables(found):
        console.print(table)
    console.print(f"[dim]{conditions(found)}[/dim]", highlight=False)
    write_report(json_file, found)
    if html is not None:
        from nextn.evaluation.page import page

        write_report(html, page(found, tokenizer_of(model, trust_remote_code)))


def _bench_batches(
    settings: Any, batch: str, temperature: str, method: str, tree: Path | None, json_file: Path | None
) -> None:
    """`nextn bench --batch`."""
    from nextn.decoding.sampling import Sampling
    from nextn.decoding.tree import Tree
    from nextn.evaluation.batches import Sweep, conditions, numbers, sweep, table
    from nextn.evaluation.report import write_report

    varied = Sweep(
        batches=numbers(batch, "--batch"),
        temperatures=numbers(temperature, "--temperature", float),
        method=Sampling(method="coupled" if method == "coupled" else "rejection", block=method == "block"),
        tree=None if tree is None else Tree.read(tree),
    )
    if settings.gguf or settings.vllm_python or settings.replay:
        raise ValueError("--batch measures our own engines only: leave --gguf, --vllm-python and --replay out.")

    def keep(found: dict[str, Any]) -> None:
        write_report(json_file, found)

    found = sweep(settings, varied, console, keep)
    console.print(table(found["rows"]))
    console.print(f"[dim]{conditions(found)}[/dim]", highlight=False)


@app.command()
@_plainly
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    heads: Annotated[Path | None, typer.Option(help="Other heads for the bundled model than the shipped ones.")] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype of trunk and heads; auto: bfloat16 where the CPU has it.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a prompt.")] = 128,
    compile: Compile = False,
) -> None:
    """Decode a few prompts with a real model, with and without heads, and check the text."""
    from nextn.evaluation.demo import demo as run
    from nextn.evaluation.report import check_report, write_report
    from nextn.formats.bundled import best_dtype, bundled_model, shipped_heads
    from nextn.formats.native import check_tokenizer, load, load_base, load_tokenizer, named_dtype

    check_report(json_file)
    wanted = best_dtype() if dtype == "auto" else named_dtype(dtype)
    directory = str(bundled_model(say=console.print))
    model = load(heads or shipped_heads(), base=load_base(directory, wanted))
    tokenizer = load_tokenizer(directory)
    check_tokenizer(heads or shipped_heads(), tokenizer)
    report = run(model, tokenizer, console, max_new_tokens, compile)
    write_report(json_file, report)


def main() -> None:
    """Entry point of the `nextn` command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that locks are released
    app()


if __name__ == "__main__":
    main()
