"""``rl-mlx serve``: answer OpenAI's, Anthropic's and Ollama's clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rl_mlx.cli.options import ModelFlags, SamplingFlags, takes_flags
from rl_mlx.cli.terminal import note
from rl_mlx.errors import InvalidRequest

NAME = "serve"


@takes_flags
def command(
    flags: ModelFlags,
    sampling: SamplingFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Loaded at the start, and kept. Others are loaded when they are asked for.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Listen at this address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Listen at this port; 0: any.", metavar="N")] = 8642,
    socket: Annotated[
        str | None, typer.Option(help="Listen at a Unix socket instead.", metavar="PATH")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help="Sequences at once, on llama.cpp.", metavar="N")
    ] = None,
    keep_alive: Annotated[
        str, typer.Option(help="Unload after so long without a request; -1: never.", metavar="TIME")
    ] = "5m",
    alias: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL, as gpt-4o=demo or 'gpt-*=demo'.", metavar="PAIR"),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help="A chat template (Jinja) for the named models.", metavar="FILE"),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line.", metavar="FILE")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let anybody in who can reach the address.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that this host may be called by.", metavar="NAME"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may call; *: all.", metavar="URL"),
    ] = None,
    queue: Annotated[
        int, typer.Option(help="Requests under way or waiting; more get 429.", metavar="N")
    ] = 512,
    max_body: Annotated[
        int, typer.Option(help="Largest request in MiB; more get 413.", metavar="N")
    ] = 16,
    grace: Annotated[
        str, typer.Option(help="To finish what runs, when told to stop.", metavar="TIME")
    ] = "30s",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log as JSON lines.")] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log what people ask, too.")
    ] = False,
) -> None:
    """Serve models to OpenAI's, Anthropic's and Ollama's clients."""
    from rl_mlx.server import logs
    from rl_mlx.server.app import build
    from rl_mlx.server.keys import read_keys
    from rl_mlx.server.run import serve
    from rl_mlx.server.settings import ServerSettings, seconds

    model = flags.settings()
    if parallel is not None:
        options = {**model.backend_options, "parallel": parallel}
        model = replace(model, backend_options=options)
    settings = ServerSettings(
        host=host,
        port=port,
        socket=socket,
        models=tuple(models or ()),
        model=replace(model, memory=None),
        aliases=_aliases(alias or []),
        keep_alive=seconds(keep_alive, "--keep-alive"),
        memory=model.memory,
        sampling={
            **sampling.given(),
            **({"stop": tuple(sampling.stop)} if sampling.stop else {}),
        },
        keys=read_keys(api_key_file) if api_key_file else frozenset(),
        insecure=insecure,
        hosts=tuple(allow_host or ()),
        origins=tuple(cors_origin or ()),
        queue=queue,
        body_limit=max_body << 20,
        grace=seconds(grace, "--grace") or 0.0,
        log_json=log_json,
        log_prompts=log_prompts,
    )
    sampling.params()  # a value out of range is an error now, not in every request
    logs.configure(as_json=log_json)
    source = template.read_text("utf-8") if template else None
    serve(
        build(settings, template=source),
        settings,
        lambda address: note(f"rl-mlx answers at {address}; Ctrl-C ends it"),
    )


def _aliases(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, target = pair.partition("=")
        if not (name and equals and target):
            raise InvalidRequest(f"--alias takes NAME=MODEL, not {pair!r}")
        found[name] = target
    return found
