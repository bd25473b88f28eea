"""A small server that speaks OpenAI's completions protocol as vLLM or llama.cpp do, with faults at will."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from guerdon.language.sampling.base import Completion, Sampling
from guerdon.language.sampling.local import LocalSampler

STANDARD = {"model", "prompt", "seed", "max_tokens", "temperature", "top_p", "stop"}


class OpenAIServer:
    """Serves what a `LocalSampler` draws; a context manager.

    Attributes:
        style: how drawn ids are given back: "vllm", "llama.cpp" or "none".
        ids: "taken" or the status with which prompts of token ids are refused.
        extras: whether parameters beyond OpenAI's own are known.
        shift: added to the ids that are given back, as if the server had another vocabulary.
        key: the API key that requests must carry.
        faults: what goes wrong with the next requests for completions: a status, "close" (in the middle of an answer),
            "stream" (the same, in chunks), "hang" (until the server is closed), "text", "list" or "empty"; of those
            that are streamed also "cut", "stall", "ends" and "error", after two events with text.
        retry_after: seconds that clients are asked to wait after a fault that is a status.
        seen: the bodies of the requests for completions that were answered; busiest: the most of them at a time.
    """

    def __init__(self, sampler: LocalSampler, **attributes: Any):
        self.sampler = sampler
        self.models = ["tiny-one", "tiny-two"]
        self.style, self.ids, self.extras, self.shift, self.delay = "vllm", "taken", True, 0, 0.0
        self.key: str | None = None
        self.retry_after: str | None = None
        self.closed = threading.Event()
        self.faults: list[int | str] = []
        self.seen: list[dict[str, Any]] = []
        self.asked = self.busy = self.busiest = 0
        self.lock = threading.Lock()
        vars(self).update(attributes)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON for a request for a completion."""
        by_ids = isinstance(body["prompt"], list)
        if by_ids and self.ids != "taken":
            return int(self.ids), problem("Input should be a valid string")
        if not self.extras and (unknown := body.keys() - STANDARD):
            return 400, problem(f"Unrecognized request arguments: {sorted(unknown)}")
        prompt = body["prompt"] if by_ids else self.sampler.tokenizer(body["prompt"]).input_ids
        how = Sampling(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_k=body.get("top_k", 0),
            top_p=body.get("top_p", 1.0),
            stop=tuple(body.get("stop", ())),
        )
        time.sleep(self.delay)
        with self.lock:
            self.seen.append(body)
            return 200, self.completion(self.sampler.sample([prompt], [[body.get("seed", 0)]], how)[0][0])

    def completion(self, drawn: Completion) -> dict[str, Any]:
        ids, logps = [t + self.shift for t in drawn.tokens], drawn.logps.tolist()
        choice: dict[str, Any] = {"index": 0, "text": drawn.text, "logprobs": None}
        choice["finish_reason"] = "stop" if drawn.finished else "length"
        if self.style == "vllm":
            choice |= {"token_ids": ids, "logprobs": {"token_logprobs": logps}}
        if self.style == "llama.cpp":
            choice["logprobs"] = {"content": [{"id": t, "logprob": p} for t, p in zip(ids, logps, strict=True)]}
        return {"object": "text_completion", "choices": [choice], "usage": {"completion_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    owner: OpenAIServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.guarded(lambda: (200, {"data": [{"id": name} for name in self.owner.models]}), "/v1/models")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.owner.lock:
            self.owner.asked += 1
            fault = self.owner.faults.pop(0) if self.owner.faults else None
            self.owner.busy += 1
            self.owner.busiest = max(self.owner.busiest, self.owner.busy)
        try:
            if fault == "close":  # in the middle of an answer
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            elif fault == "stream":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b'd\r\n{"choices": [\r\n')
                self.close_connection = True
            elif fault == "hang":
                self.owner.closed.wait()
                self.close_connection = True
            elif fault == "text":
                self.reply(200, b"{not json")
            elif fault in ("list", "empty"):
                self.reply(200, json.dumps([] if fault == "list" else {"choices": []}).encode())
            elif body.get("stream") and fault in (None, "cut", "stall", "ends", "error"):
                self.stream(self.owner.answer(body)[1], fault)
            elif fault is not None:
                self.reply(int(fault), json.dumps(problem("out of order")).encode())
            else:
                self.guarded(lambda: self.owner.answer(body), "/v1/completions")
        finally:
            with self.owner.lock:
                self.owner.busy -= 1

    def stream(self, answer: dict[str, Any], fault: str | None) -> None:
        """The answer in server-sent events of two characters."""
        (choice,) = answer["choices"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def event(content: Any) -> None:
            data = f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        parts = [choice["text"][at : at + 2] for at in range(0, len(choice["text"]), 2)]
        for part in parts[: 2 if fault else None]:
            event({"choices": [{"index": 0, "text": part, "finish_reason": None}]})
        if fault == "stall":
            self.owner.closed.wait()
        self.close_connection = fault in ("cut", "stall")
        if self.close_connection:
            return
        if fault == "error":
            event(problem("out of order"))
        elif fault is None:
            event({"choices": [{"index": 0, "text": "", "finish_reason": choice["finish_reason"]}]})
            event({"choices": [], "usage": answer["usage"] | {"prompt_tokens": 5}})
            event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def guarded(self, answer: Any, path: str) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        if self.path != path:
            status, content = 404, problem(f"no such page: {self.path}")
        elif self.owner.key not in (None, key):
            status, content = 401, problem(f"Incorrect API key provided: {key}")
        else:
            status, content = answer()
        self.reply(status, json.dumps(content).encode())

    def reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status != 200 and self.owner.retry_after is not None:
            self.send_header("Retry-After", self.owner.retry_after)
        self.end_headers()
        self.wfile.write(content)


def problem(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": None}}
