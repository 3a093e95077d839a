"""``rl-mlx ps``: what a running server has in memory."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rl_mlx.cli.options import Json
from rl_mlx.cli.terminal import note, print_json, size
from rl_mlx.errors import BackendUnavailable

NAME = "ps"


def command(
    url: Annotated[
        str, typer.Option(help="The server's address.", metavar="URL")
    ] = "http://127.0.0.1:8642",
    api_key: Annotated[
        str | None,
        typer.Option(help="Its API key.", metavar="KEY", envvar="RL_MLX_API_KEY"),
    ] = None,
    json: Json = False,
) -> None:
    """List the models that a running server has loaded."""
    models = _ask(url, api_key)
    if json:
        print_json(models)
        return
    if not models:
        note("no model is loaded; a request loads one")
        return
    width = max(len(m["name"]) for m in models)
    for m in models:
        until = f"until {m['expires_at']}" if m["expires_at"] else "for ever"
        print(
            f"{m['name']:<{width}}  {size(m['size']):>8}  {m['backend']:<10}"
            f"  {m['running']} running, {m['waiting']} waiting  {until}"
        )


def _ask(url: str, api_key: str | None) -> list[dict[str, Any]]:
    import json
    import urllib.error
    import urllib.request

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(url.rstrip("/") + "/api/ps", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)["models"]
    except urllib.error.HTTPError as error:
        hint = "; give --api-key" if error.code == 401 else ""
        words = error.read().decode("utf-8", "replace").strip()
        raise BackendUnavailable(f"{url} refused ({error.code}): {words[:200]}{hint}") from error
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "reason", error)
        raise BackendUnavailable(
            f"no server answers at {url} ({reason}); start one by: rl-mlx serve"
        ) from error
    return found
