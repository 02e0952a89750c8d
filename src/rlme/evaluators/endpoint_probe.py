"""What a server can do, found out once at the start by asking it."""

from __future__ import annotations

import itertools
from typing import Any

from rlme.errors import InputError
from rlme.evaluators.endpoint_client import EndpointClient
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.evaluators.endpoint_texts import TextServer
from rlme.evaluators.endpoint_tokens import TokenServer, native_body
from rlme.evaluators.endpoint_wire import CallFailed, read_named_tokens, read_next_tokens
from rlme.judgement import Failure

TOPS = (1000, 100, 20, 5)
"""Numbers of alternatives tried, the largest first. 20 is the default limit of vLLM and of hosted chat APIs."""
_QUESTION = "Is water wet? Answer with Yes or No and nothing else."


async def probe(client: EndpointClient) -> TokenServer | TextServer:
    """Find the model, the routes and the way to ask. `InputError` if this server cannot serve log-probabilities."""
    config = client.config
    try:
        name, meta = await _model(client, config)
        server = await _token_server(client, name, meta) or await _text_server(client, name)
    except CallFailed as failure:
        hint = ""
        if failure.status in (401, 403):
            hint = "; name the environment variable with the key in `api_key_env`"
        raise InputError(f"endpoint {config.base_url} cannot be used: {failure.detail}{hint}") from None
    if config.api == "chat" and not server.chat:
        raise InputError(f"endpoint {config.base_url}: api is chat, but the server offers {server.describe()}")
    return server


async def _model(client: EndpointClient, config: EndpointConfig) -> tuple[str, dict[str, Any]]:
    """Name and description of the served model. Servers that do not list their models are taken at the user's word."""
    try:
        listed, _ = await client.call("/models", None, lambda reply: reply)
    except CallFailed as failure:
        if (
            failure.kind in (Failure.REFUSED, Failure.SERVER_ERROR)
            and failure.status not in (401, 403)
            and config.model
        ):
            return config.model, {}
        raise
    rows = listed.get("data") if isinstance(listed, dict) else None
    rows = rows if isinstance(rows, list) else []
    models = {m["id"]: m for m in rows if isinstance(m, dict) and isinstance(m.get("id"), str)}
    if config.model is None:
        if len(models) != 1:
            raise InputError(
                f"endpoint {config.base_url} serves {len(models)} models ({_some(models)}): name one in `model`"
            )
        return next(iter(models.items()))
    if models and config.model not in models:
        raise InputError(
            f"endpoint {config.base_url} does not serve the model {config.model!r}; it serves {_some(models)}"
        )
    return config.model, models.get(config.model, {})


async def _token_server(client: EndpointClient, model: str, meta: dict[str, Any]) -> TokenServer | None:
    """The server as one that shares its tokenizer and reports token ids, or None."""
    root = client.config.base_url.removesuffix("/v1")
    both = {"model": model, "prompt": "a", "content": "a", "add_special_tokens": False}
    reply = await _optional(client, f"{root}/tokenize", both)
    if not isinstance(reply, dict) or not isinstance(reply.get("tokens"), list) or not reply["tokens"]:
        return None
    server = TokenServer(client, model, "vLLM" if "max_model_len" in reply else "llama.cpp", root, chat=False)
    if server.kind == "vLLM":
        told = meta.get("max_model_len", reply["max_model_len"])
        if isinstance(told, int) and 0 < told < 10**8:  # some tokenizers write an endless length
            server.limit = told
    else:
        props = await _optional(client, f"{root}/props", None)
        settings = props.get("default_generation_settings") if isinstance(props, dict) else None
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        more = meta.get("meta")
        vocabulary = more.get("n_vocab") if isinstance(more, dict) else None
        if not isinstance(context, int) or not isinstance(vocabulary, int):
            return None  # some other server with a route of this name
        server.limit, server.top, server.plain = context, vocabulary, reply["tokens"][-1]

    if server.kind == "vLLM" and await _generates_natively(server):
        client.health_body = (f"{root}/generate", native_body(reply["tokens"], reply["tokens"][:1]))
        # Asked by id or not at all: an older server, whose tokenizer route takes no messages, is asked by text.
        return server if server.chat or client.config.api == "completions" else None
    ids = await server.encode("1 2 3", "")
    body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
    if server.kind == "vLLM":
        body["return_tokens_as_token_ids"] = True
        named = max(ids)  # any valid id that is hardly among the most likely ones
        try:
            with_ids = body | {"logprobs": 1, "logprob_token_ids": [named]}
            top, _ = await client.call("/completions", with_ids, lambda r: read_next_tokens(r, asked=1), tokens_in=4)
            server.label_ids = named in top.by_id and len(top.by_id) <= 2
        except CallFailed as failure:
            if failure.passing:
                raise
        server.top = await _largest_top(client, "/completions", body, lambda n: {"logprobs": n})
    else:
        top, _ = await client.call(
            "/completions",
            body | {"logprobs": 5} | server.draw_plain(),
            lambda r: read_next_tokens(r, asked=5),
            tokens_in=4,
        )
        if not top.by_id:
            return None
    client.health_body = ("/completions", body)
    server.chat = await _has_template(server)
    return server


async def _generates_natively(server: TokenServer) -> bool:
    """Whether this is SGLang: its `/generate` gives the log-probability of any token. If so, `server` is set up."""
    ids, others = await server.tokenize("a", special=False), await server.tokenize("b", special=False)
    reply = await _optional(server.client, f"{server.root}/generate", native_body(ids, ids[:1]))
    try:
        read_named_tokens(reply, ids[:1])
    except CallFailed:
        return False
    server.kind, server.label_ids = "SGLang", True
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))
    server.leading = tuple(token for token, _ in common)
    server.chat = await _has_template(server)
    return True


async def _has_template(server: TokenServer) -> bool:
    try:
        await server.encode(({"role": "user", "content": "a"},), "")
    except CallFailed as failure:
        if failure.passing:
            raise
        return False
    return True


async def _text_server(client: EndpointClient, model: str) -> TextServer:
    """The server as one that is asked by text: the routes on which it returns log-probabilities."""
    refusals: list[str] = []

    async def top_on(path: str, body: dict[str, Any], ask: Any) -> int | None:
        try:
            top = await _largest_top(client, path, body, ask)
        except CallFailed as failure:
            if failure.passing and failure.kind is not Failure.LABEL_MISSING:
                raise
            refusals.append(f"{path}: {failure.detail}")
            return None
        client.health_body = client.health_body or (path, body)
        return top

    def on_chat(n: int) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": n}

    common: dict[str, Any] = {"model": model, "temperature": 1.0}
    messages = common | {"messages": [{"role": "user", "content": _QUESTION}]}
    chat_top, text_top, length = None, None, "max_tokens"
    if client.config.api != "completions":
        for length in ("max_tokens", "max_completion_tokens"):  # newer hosted models know only the second
            if (chat_top := await top_on("/chat/completions", messages | {length: 1}, on_chat)) is not None:
                break
    if client.config.api != "chat":
        text = common | {"prompt": _QUESTION + "\n", "max_tokens": 1}
        text_top = await top_on("/completions", text, lambda n: {"logprobs": n})
    tops = [top for top in (chat_top, text_top) if top is not None]
    if not tops:
        raise InputError(
            f"endpoint {client.config.base_url} returns no log-probabilities ({'; '.join(dict.fromkeys(refusals))}), "
            "so it cannot judge: use vLLM, SGLang, llama.cpp's llama-server or an API with `top_logprobs`"
        )
    return TextServer(client, model, chat_top is not None, text_top is not None, min(tops), max_tokens=length)


async def _largest_top(client: EndpointClient, path: str, body: dict[str, Any], ask: Any) -> int:
    """The largest number of alternatives the server gives, which may be fewer than it accepts being asked for; raises
    the refusal when it refuses every number."""
    refusal: CallFailed | None = None
    for count in TOPS:
        try:
            top, _ = await client.call(path, body | ask(count), lambda r: read_next_tokens(r, asked=1), tokens_in=20)
            return max(1, min(count, top.count))
        except CallFailed as failure:
            number_refused = failure.kind is Failure.REFUSED and failure.status in (400, 422)
            if not number_refused:
                raise
            refusal = failure
    assert refusal is not None
    raise refusal


async def _optional(client: EndpointClient, path: str, body: dict[str, Any] | None) -> Any:
    """The reply of a route that may not be there, or None."""
    try:
        return (await client.call(path, body, lambda reply: reply))[0]
    except CallFailed as failure:
        if failure.passing and failure.kind not in (Failure.SERVER_ERROR, Failure.MALFORMED):
            raise
        return None


def _some(models: dict[str, Any]) -> str:
    names = sorted(models)
    return ", ".join(repr(n) for n in names[:8]) + (", ..." if len(names) > 8 else "") or "none"
