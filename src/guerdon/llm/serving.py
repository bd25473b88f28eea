"""An OpenAI-compatible server for a language policy: chat, completions, log-probs, streams.

What a parameter cannot do here is refused, not ignored; left out are tools, images, and the alternatives to drawn
tokens. There are no keys: it listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from guerdon.errors import ConfigError, DataError, GuerdonError, near
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Completion, Sampling, completion_seeds
from guerdon.language.sampling.local import before_stop
from guerdon.language.templates import prompt_ids
from guerdon.llm.engine import Engine, StoppedError
from guerdon.llm.local import pieces

NEUTRAL: dict[str, Any] = {  # parameters that are taken only where they change nothing
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "top_logprobs": 0,
    "best_of": 1,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "response_format": {"type": "text"},
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]

    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False


class Body(_Strict):
    """What chats and completions have in common."""

    model: str
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # 0 and -1 for all
    stop: str | list[str] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        for name, neutral in NEUTRAL.items():
            if said.get(name, neutral) not in (neutral, None):
                raise ValueError(f"'{name}' can only be {json.dumps(neutral)} here")
        return {name: value for name, value in said.items() if name not in NEUTRAL and value is not None}

    def sampling(self, max_tokens: int) -> Sampling:
        """How the tokens are drawn."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stop:
            raise _RefusedError("an empty string is no stop string", "stop")
        top_k = max(self.top_k, 0)
        return Sampling(
            max_new_tokens=max_tokens, temperature=self.temperature, top_k=top_k, top_p=self.top_p, stop=stop
        )


class ChatBody(Body):
    """A conversation to be answered."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(256, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name, which goes first
    logprobs: bool = False


class CompletionBody(Body):
    """Texts, or their token ids, to be continued."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: bool = False
    return_token_ids: bool = False


class _RefusedError(Exception):
    """A request that cannot be answered, in OpenAI's terms."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def serve(
    policy: Policy, *, name: str, host: str = "127.0.0.1", port: int = 8000, say: Callable[[str], None] = print
) -> None:
    """Serve a policy until Ctrl-C or SIGTERM.

    Args:
        name: by which requests call the model.
        port: 0 takes one that is free.
        say: is told the address once the server listens.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"serve cannot listen at {host}, port {port}: {error}. Choose another --port.") from error
    engine = Engine(policy)
    server = _Server(uvicorn.Config(make_app(engine, name), log_level="warning", timeout_graceful_shutdown=5))
    server.engine = engine
    place = f"[{host}]" if ":" in host else host
    say(f"{name} at http://{place}:{listening.getsockname()[1]}/v1. Ctrl-C stops it.")
    with listening, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    engine: Engine

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Answers under way end after their current token, so that nobody waits for the last of them."""
        self.engine.close()
        super().handle_exit(sig, frame)


def make_app(engine: Engine, name: str) -> FastAPI:
    """The web application; `engine` computes and `name` is the one model it has."""
    app = FastAPI(title="guerdon serve", openapi_url=None)
    served = _Served(engine, name)

    async def chat(body: ChatBody, request: Request) -> Response:
        return await _unless_gone(request, served.chat(body))

    async def complete(body: CompletionBody, request: Request) -> Response:
        return await _unless_gone(request, served.complete(body))

    async def models() -> Response:
        card = {"id": name, "object": "model", "created": served.started, "owned_by": "guerdon"}
        return JSONResponse({"object": "list", "data": [card]})

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)

    async def problem(request: Request, error: Exception) -> Response:
        return _problem(error, f"{request.method} {request.url.path}")

    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, problem)
    return app


async def _unless_gone(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """The answer, or what was wrong; nothing more is computed for a client that has hung up."""
    task = asyncio.create_task(answering)
    while not (await asyncio.wait({task}, timeout=1.0))[0]:
        if await request.is_disconnected():
            task.cancel()
    if task.cancelled():
        return Response(status_code=499)
    error = task.exception()
    return task.result() if error is None else _problem(error)


class _Served:
    """What the pages do."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name
        self.tokenizer = engine.policy.tokenizer
        self.started = int(time.time())

    async def chat(self, body: ChatBody) -> Response:
        self._check_model(body.model)
        turns = [{"role": turn.role, "content": turn.text()} for turn in body.messages]
        ids = prompt_ids(turns, self.tokenizer)
        return await self._answer([ids], body, body.max_completion_tokens or body.max_tokens, _ChatShape(body))

    async def complete(self, body: CompletionBody) -> Response:
        self._check_model(body.model)
        given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
        if given and isinstance(given[0], int):
            given = [given]
        vocabulary = self.engine.policy.model.model.config.vocab_size
        if not given or not all(
            prompt and (isinstance(prompt, str) or 0 <= min(prompt) <= max(prompt) < vocabulary) for prompt in given
        ):
            raise _RefusedError(f"a prompt is empty, or holds token ids beyond the {vocabulary} there are", "prompt")
        if body.stream and body.echo:
            raise _RefusedError("a stream cannot echo its prompt", "echo")
        if not body.max_tokens and not body.echo:
            raise _RefusedError("max_tokens can only be 0 with echo", "max_tokens")
        ids = [prompt_ids(prompt, self.tokenizer) if isinstance(prompt, str) else prompt for prompt in given]
        echoes = await self._echoes(given, ids, body) if body.echo else [_Echo()] * len(given)
        return await self._answer(ids, body, body.max_tokens, _CompletionShape(body, echoes))

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f"there is no model '{name}'.{near(name, [self.name])} This server has '{self.name}'."
            raise _RefusedError(message, "model", "model_not_found", 404)

    async def _echoes(self, given: list[Any], prompts: list[list[int]], body: CompletionBody) -> list[_Echo]:
        """The prompts as their answers begin with them; beginnings that they share are computed once."""
        for ids in prompts:
            self._check_length(ids, body.max_tokens)
        if body.logprobs is None:
            scores = [np.zeros(len(ids) - 1) for ids in prompts]
        else:
            scores = await self.engine.score([(ids[:1], ids[1:]) for ids in prompts])
        found = []
        for prompt, ids, logps in zip(given, prompts, scores, strict=True):
            tokens, known = pieces(ids, self.tokenizer), [None, *logps.tolist()]
            text = prompt if isinstance(prompt, str) else "".join(tokens)
            own = 0 if text.startswith(tokens[0]) else 1  # a start token is no part of the text
            found.append(_Echo(text, tokens[own:], known[own:]))
        return found

    def _check_length(self, ids: Sequence[int], new: int) -> None:
        try:
            self.engine.check(len(ids), new)
        except DataError as error:
            raise _RefusedError(str(error), None, "context_length_exceeded") from error

    async def _answer(self, prompts: list[list[int]], body: Body, max_tokens: int, shape: _Shape) -> Response:
        for ids in prompts:
            self._check_length(ids, max_tokens)
        sampling = body.sampling(max_tokens)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        head = {"id": f"{shape.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}

        def sample(number: int, listener: Callable[[int, int, float], None] | None = None) -> Awaitable[Any]:
            ids = prompts[number]
            own = (lambda k, *drawn: listener(number * body.n + k, *drawn)) if listener else None
            return self.engine.sample(ids, completion_seeds(body.n, seed, *ids), sampling, own)

        if body.stream:
            stream = self._stream(len(prompts), sample, body, sampling, head, shape, sum(map(len, prompts)))
            return StreamingResponse(stream, media_type="text/event-stream")
        if max_tokens:
            drawn = await asyncio.gather(*map(sample, range(len(prompts))))
        else:
            drawn = [[Completion([], np.zeros(0), False, "")] * body.n for _ in prompts]
        completions = [completion for own in drawn for completion in own]
        choices = [
            {
                "index": index,
                **shape.whole(index, completion, pieces(completion.tokens, self.tokenizer)),
                "finish_reason": "stop" if completion.finished else "length",
            }
            for index, completion in enumerate(completions)
        ]
        usage = _usage(sum(map(len, prompts)), completions)
        return JSONResponse({**head, "object": shape.object, "choices": choices, "usage": usage})

    async def _stream(
        self,
        prompts: int,
        sample: Callable[..., Awaitable[list[Completion]]],
        body: Body,
        sampling: Sampling,
        head: dict[str, Any],
        shape: _Shape,
        read: int,
    ) -> AsyncIterator[str]:
        """Server-sent events: a chunk for what each token adds, one for each end, the usage where it is asked for."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int, float] | None]()

        def listener(index: int, token: int, logp: float) -> None:
            loop.call_soon_threadsafe(told.put_nowait, (index, token, logp))

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return _event({**head, "object": shape.chunk, "choices": choices, **more})

        drawing = asyncio.gather(*(sample(number, listener) for number in range(prompts)))
        drawing.add_done_callback(lambda _: told.put_nowait(None))
        texts = [_Growing(self.tokenizer, sampling.stop) for _ in range(prompts * body.n)]
        try:
            for index in range(len(texts)):
                if opening := shape.opening():
                    yield event([{"index": index, **opening, "finish_reason": None}])
            while (drawn := await told.get()) is not None:
                index, token, logp = drawn
                added, piece = texts[index].add(token)
                if added or shape.logprobs:
                    part = shape.part(added, piece, logp, token)
                    yield event([{"index": index, **part, "finish_reason": None}])
            completions = [completion for own in drawing.result() for completion in own]
            for index, completion in enumerate(completions):
                rest = completion.text[len(texts[index].sent) :]
                reason = "stop" if completion.finished else "length"
                yield event([{"index": index, **shape.part(rest), "finish_reason": reason}])
            if body.stream_options.include_usage:
                yield event([], usage=_usage(read, completions))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(json.loads(bytes(_problem(error).body)))
        finally:
            drawing.cancel()


class _Growing:
    """The text of a completion as its tokens come; what may turn out to be a stop string or half a character waits."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.sent = ""

    def add(self, token: int) -> tuple[str, str]:
        """What a token adds to what can be shown, and its own text."""
        self.tokens.append(token)
        text = before_stop(self.tokenizer.decode(self.tokens, skip_special_tokens=True), self.stop).rstrip("\ufffd")
        waits = max((k for stop in self.stop for k in range(len(stop)) if text.endswith(stop[:k])), default=0)
        text = text[: len(text) - waits]
        added, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return added, pieces(self.tokens[-2:], self.tokenizer)[-1]


@dataclass(frozen=True)
class _Echo:
    """A prompt with which its completions begin."""

    text: str = ""
    tokens: Sequence[str] = ()
    logps: Sequence[float | None] = ()


class _ChatShape:
    """How answers to chats look."""

    prefix, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody):
        self.logprobs = body.logprobs

    def whole(self, index: int, completion: Completion, tokens: Sequence[str]) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text}
        return {"message": message, "logprobs": self._logprobs(tokens, completion.logps.tolist())}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, text: str, piece: str = "", logp: float | None = None, token: int = 0) -> dict[str, Any]:
        listed = None if logp is None else self._logprobs([piece], [logp])
        return {"delta": {"content": text} if text else {}, "logprobs": listed}

    def _logprobs(self, tokens: Sequence[str], logps: Sequence[float]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                {"token": token, "logprob": logp, "bytes": list(token.encode()), "top_logprobs": []}
                for token, logp in zip(tokens, logps, strict=True)
            ]
        }


class _CompletionShape:
    """How completions look."""

    prefix, object, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionBody, echoes: list[_Echo]):
        self.logprobs = body.logprobs is not None
        self.body, self.echoes = body, echoes

    def whole(self, index: int, completion: Completion, tokens: Sequence[str]) -> dict[str, Any]:
        echo = self.echoes[index // self.body.n]
        logprobs = self._logprobs([*echo.tokens, *tokens], [*echo.logps, *completion.logps.tolist()])
        ids = {"token_ids": completion.tokens} if self.body.return_token_ids else {}
        return {"text": echo.text + completion.text, "logprobs": logprobs, **ids}

    def opening(self) -> dict[str, Any]:
        return {}

    def part(self, text: str, piece: str = "", logp: float | None = None, token: int = 0) -> dict[str, Any]:
        listed = None if logp is None else self._logprobs([piece], [logp])
        ids = {"token_ids": [token]} if self.body.return_token_ids and logp is not None else {}
        return {"text": text, "logprobs": listed, **ids}

    def _logprobs(self, tokens: Sequence[str], logps: Sequence[float | None]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        starts = list(itertools.accumulate(map(len, tokens), initial=0))[:-1]
        return {"tokens": tokens, "token_logprobs": logps, "top_logprobs": None, "text_offset": starts}


_Shape = _ChatShape | _CompletionShape


def _usage(read: int, completions: Sequence[Completion]) -> dict[str, int]:
    written = sum(len(completion.tokens) for completion in completions)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _problem(error: BaseException, page: str = "") -> JSONResponse:
    """An error as OpenAI words it; one of ours goes to the log."""
    param = code = None
    if isinstance(error, _RefusedError):
        status, message, param, code = error.status, str(error), error.param, error.code
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = [str(part) for part in first["loc"][1:]]
        status, param = 400, place[0] if place else None
        message = ".".join(place) + ": " * bool(place) + first["msg"].removeprefix("Value error, ")
    elif isinstance(error, HTTPException):
        status, message = error.status_code, f"{error.detail}: {page}"
    elif isinstance(error, GuerdonError):
        status, message = 503 if isinstance(error, StoppedError) else 400, str(error)
    else:
        status, message = 500, "the server failed; its terminal says how"
        logging.getLogger("uvicorn.error").error(message, exc_info=error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)
