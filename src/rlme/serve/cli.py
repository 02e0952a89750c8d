"""The functions behind `rlme serve` and `rlme cache stats|clear`."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file: section.key=value. Repeatable."),
]
CacheFile = Annotated[Path, typer.Argument(help="The cache file.")]


def serve(
    config: Annotated[Path, typer.Argument(help="Configuration with questions and evaluators (a run's will do).")],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8765,
    token_env: Annotated[
        str, typer.Option(help="Environment variable with the bearer token; required beyond this machine.")
    ] = "RLME_SERVE_TOKEN",
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request body, in MiB.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Completions judged together at most.")] = 256,
    max_waiting: Annotated[int, typer.Option(min=1, help="Completions waiting at most; more are refused.")] = 4096,
    grace: Annotated[int, typer.Option(min=0, help="Seconds to finish running requests when stopped.")] = 60,
) -> None:
    """Serve a reward over HTTP: prompts and completions in, rewards and every judgement out (page: /docs)."""
    from rlme.config_file import apply_overrides, beside, read_yaml, validate
    from rlme.errors import InputError

    token = os.environ.get(token_env, "").strip() or None
    if token is None and not _loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines, which needs a bearer token: put one into the "
            f"environment variable {token_env}"
        )
    try:
        import uvicorn

        from rlme.serve.app import create_app
    except ImportError as error:
        raise InputError(f"rlme serve needs {error.name}: pip install 'rlme[serve]'") from None
    from rlme.serve.batcher import scorer
    from rlme.serve.config import ServeConfig, check_labels, make_evaluators, make_reward

    content = apply_overrides(read_yaml(config), overrides or [])
    content.pop("run_info", None)  # of a run's own config.yaml
    checked = validate(ServeConfig, content, str(config))
    for spec in checked.evaluators:
        spec.model = beside(config, spec.model) if spec.model else None
    with _listen(host, port) as listening:  # before the models are loaded: who asks meanwhile waits
        evaluators = make_evaluators(checked)
        check_labels(checked, evaluators)
        for evaluator in evaluators:
            typer.echo(f"evaluator {getattr(evaluator, 'summary', evaluator.name)}")
        # A model in this process answers one batch at a time; endpoints wait for the network, so batches overlap.
        workers = 4 if all(spec.endpoint for spec in checked.evaluators) else 1
        app = create_app(
            [scorer(make_reward(checked, evaluators)) for _ in range(workers)],
            evaluators=evaluators,
            token=token,
            description="Questions: " + "; ".join(q.ask for q in checked.questions.values()),
            max_body=max_body_mb << 20,
            max_batch=max_batch,
            max_waiting=max_waiting,
        )
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"reward server on http://{shown}:{port} (documentation: /docs; Ctrl-C ends it)")
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])


def _loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    from rlme.errors import InputError

    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: {error.strerror}; expected an address of this machine and a free port "
            "(--port 0 takes any)"
        ) from None


def cache_stats(
    path: CacheFile,
    table: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the table as JSON.")] = None,
) -> None:
    """How many answers the cache holds, of which evaluators, and its size."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rlme.result_files import check_writable

    check_writable(table)
    from rlme.evaluators.cache import read_stats

    stats = read_stats(_existing(path))
    shown = Table(title=f"{stats.answers} answers, {stats.bytes / 1e6:.1f} MB", title_justify="left")
    shown.add_column("evaluator")
    shown.add_column("answers", justify="right")
    for name, n in sorted(stats.by_evaluator.items()):
        shown.add_row(Text(name), str(n))
    Console().print(shown)
    if table is not None:
        content = {"answers": stats.answers, "bytes": stats.bytes, "by_evaluator": stats.by_evaluator}
        table.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def cache_clear(path: CacheFile) -> None:
    """Forget every answer."""
    from rlme.evaluators.cache import JudgeCache

    typer.echo(f"{JudgeCache(_existing(path)).clear()} answers forgotten")


def _existing(path: Path) -> Path:
    from rlme.errors import InputError

    if not path.is_file():
        raise InputError(f"{path}: no such file; the judge cache is a SQLite file written by earlier runs")
    return path
