"""Continue a text, or reply to a message, with a language model in a package"""

from __future__ import annotations

import sys

import click
import msgspec

from ryzen_compile.cli.build_options import SEED, limit_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.errors import UsageError

SECTION = "Run"


@click.command("generate")
@click.argument("package")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="PROMPT is a message to the model, put into its chat template.")
@click.option("--system", metavar="TEXT", help="The instructions of a conversation; with --chat.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 selects the most likely token.")
@click.option("--top-k", type=int, default=0, help="Only the K most likely tokens [all].")
@click.option("--top-p", type=float, default=1.0, help="The most likely tokens of this total probability [1].")
@click.option("--min-p", type=float, default=0.0, help="Tokens of this fraction of the largest probability [0].")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: fewer repetitions [1].")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--stop", type=int, multiple=True, metavar="ID", help="An id that ends the text; repeat [the model's].")
@click.option("--variant", help="The variant to run, or the beginning of its name [the first].")
@click.option("--backend", help="Use only this backend.")
@limit_options
@console_options
def command(
    package: str,
    prompt: str,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: tuple[int, ...],
    variant: str | None,
    backend: str | None,
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Continue PROMPT with PACKAGE, and print the text as it is generated. `-` reads the prompt from stdin.

    The package holds a decoder with fixed-size states and its tokenizer, as `export hf:FOLDER`, `rewrite --steps` and `build`
    make it. With -v, the speed and the reason of the end are printed.
    """
    if system is not None and not chat:
        raise UsageError("--system is for conversations", hint="add --chat")

    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.runtime.generation.generate import GenerationOptions
    from ryzen_compile.runtime.single_generation import GenerationRequest, generate_once

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if stop:
        options["stop"] = stop
    request = GenerationRequest(
        package=package,
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        chat=chat,
        system=system,
        options=options,
        variant=variant,
        backend=backend,
    )
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()

    result = generate_once(
        request,
        on_text=show,
        limits=ResourceLimits(memory_bytes=memory_limit_bytes, seconds=time_limit_seconds),
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit({"text": "".join(pieces), **msgspec.structs.asdict(result)})
        return
    click.echo()
    if verbosity > 0:
        count = len(result.tokens)
        speed = f"{count / result.seconds:.1f} tokens/s"
        click.echo(f"{count} tokens in {result.seconds:.2f} s, {speed}; {result.finish_reason}", err=True)
