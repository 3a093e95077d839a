"""``rl-mlx serve``: answer OpenAI's, Anthropic's and Ollama's clients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx.cli.options import ModelFlags, SamplingFlags, takes_flags
from rl_mlx.cli.terminal import note
from rl_mlx.errors import InvalidRequest

if TYPE_CHECKING:
    from rl_mlx.server.settings import ServerSettings

NAME = "serve"


@dataclass(frozen=True)
class ServerFlags:
    """Where the server listens, whom it lets in, and how it ends."""

    host: Annotated[
        str | None, typer.Option(help="Listen at this address. [127.0.0.1]", metavar="HOST")
    ] = None
    port: Annotated[
        int | None, typer.Option(help="Listen at this port; 0: any. [8642]", metavar="N")
    ] = None
    socket: Annotated[
        str | None, typer.Option(help="Listen at a Unix socket instead.", metavar="PATH")
    ] = None
    parallel: Annotated[
        int | None, typer.Option(help="Sequences at once. [MLX 64, llama.cpp 8]", metavar="N")
    ] = None
    keep_alive: Annotated[
        str | None,
        typer.Option(
            help="Unload after so long without a request; -1: never. [5m]", metavar="TIME"
        ),
    ] = None
    alias: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL, as gpt-4o=demo or 'gpt-*=demo'.", metavar="PAIR"),
    ] = None
    template: Annotated[
        Path | None,
        typer.Option(help="A chat template (Jinja) for the named models.", metavar="FILE"),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line.", metavar="FILE")
    ] = None
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Let anybody in who can reach the address.")
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that this host may be called by.", metavar="NAME"),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may call; *: all.", metavar="URL"),
    ] = None
    queue: Annotated[
        int | None,
        typer.Option(help="Requests under way or waiting; more get 429. [512]", metavar="N"),
    ] = None
    max_body: Annotated[
        int | None, typer.Option(help="Largest request in MiB; more get 413. [16]", metavar="N")
    ] = None
    grace: Annotated[
        str | None,
        typer.Option(help="To finish what runs, when told to stop. [30s]", metavar="TIME"),
    ] = None
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log as JSON lines.")] = None
    log_prompts: Annotated[
        bool | None, typer.Option("--log-prompts", help="Log what people ask, too.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields of ``ServerSettings`` that were set. Raises ``InvalidRequest``."""
        from rl_mlx.server.keys import read_keys
        from rl_mlx.server.settings import seconds

        names = ("host", "port", "socket", "insecure", "queue", "log_json", "log_prompts")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.keep_alive is not None:
            found["keep_alive"] = seconds(self.keep_alive, "--keep-alive")
        if self.grace is not None:
            found["grace"] = seconds(self.grace, "--grace")
            if found["grace"] is None:
                raise InvalidRequest(f"--grace must be from 0 s to a year, not {self.grace!r}")
        if self.max_body is not None:
            found["body_limit"] = self.max_body << 20
        if self.api_key_file is not None:
            found["keys"] = read_keys(self.api_key_file)
        found["aliases"] = _aliases(self.alias or [])
        found["hosts"] = tuple(self.allow_host or ())
        found["origins"] = tuple(self.cors_origin or ())
        return found


@takes_flags
def command(
    flags: ModelFlags,
    sampling: SamplingFlags,
    server: ServerFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Loaded at the start, and kept. Others are loaded when they are asked for.",
        ),
    ] = None,
) -> None:
    """Serve models to OpenAI's, Anthropic's and Ollama's clients."""
    from rl_mlx.server import logs
    from rl_mlx.server.app import build
    from rl_mlx.server.run import serve

    settings = _settings(flags, sampling, server, tuple(models or ()))
    logs.configure(as_json=settings.log_json)
    template = server.template.read_text("utf-8") if server.template else None
    serve(
        build(settings, template=template),
        settings,
        lambda address: note(f"rl-mlx answers at {address}; Ctrl-C ends it"),
    )


def _settings(
    flags: ModelFlags, sampling: SamplingFlags, server: ServerFlags, models: tuple[str, ...]
) -> ServerSettings:
    from rl_mlx.server.settings import ServerSettings

    model = flags.settings()
    if server.parallel is not None:
        model = replace(model, parallel=server.parallel)
    sampling.params()  # a value out of range is an error now, not in every request
    return ServerSettings(
        models=models,
        model=replace(model, memory=None),  # the budget is that of all models together
        memory=model.memory,
        sampling=sampling.given(),
        **server.given(),
    )


def _aliases(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, target = pair.partition("=")
        if not (name and equals and target):
            raise InvalidRequest(f"--alias takes NAME=MODEL, not {pair!r}")
        found[name] = target
    return found
