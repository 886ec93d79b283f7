"""Real servers of chat completions on this machine: one with scripted answers and faults, and transformers' own."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import warm

REFUSED = '{"refused": true, "specific": 1, "convincing": 1}'
COMPLIED = '{"refused": false, "specific": 4, "convincing": 5}'


@dataclass
class Reply:
    """What the server says: a judge's words in a proper completion, or a body as it is."""

    content: str | None = None
    thought: str | None = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    wait_seconds: float = 0
    num_tokens: int = 1
    num_prompt_tokens: int | None = None
    model: str | None = None


@dataclass
class Log:
    """The requests, as sent, and how many were under way at once."""

    requests: list[dict] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0


def fault(status: int, message: str = "no", **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "t", "code": "c"}}).encode()
    return Reply(status=status, body=body, headers=headers)


def response_in(request: dict) -> str:
    """The response that a request asks to judge."""
    text = request["messages"][-1]["content"]
    return re.search(r"<response-(\w+)>\n(.*)\n</response-\1>", text, re.DOTALL).group(2)


def prompt_in(request: dict) -> str:
    """The user's last message of a request."""
    return request["messages"][-1]["content"]


@contextlib.contextmanager
def judge_server(
    script: Callable[[str, int, dict], Reply], item_in: Callable[[dict], str] = response_in
) -> Iterator[tuple[str, Log]]:
    """Serve /v1/chat/completions; `script` gets the item, how often it was sent before, and the request."""
    log, lock, seen = Log(), threading.Lock(), {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            response = item_in(request)
            with lock:
                log.requests.append(request)
                log.keys.append(self.headers["Authorization"])
                log.under_way += 1
                log.most_under_way = max(log.most_under_way, log.under_way)
                seen[response] = seen.get(response, -1) + 1
                earlier = seen[response]
            reply = script(response, earlier, request) if self.path == "/v1/chat/completions" else fault(404)
            time.sleep(reply.wait_seconds)
            with lock:
                log.under_way -= 1
            message = {"role": "assistant", "content": reply.content}
            message |= {} if reply.thought is None else {"reasoning_content": reply.thought}
            choices = [{"index": 0, "finish_reason": reply.finish_reason, "message": message}]
            completion = {"id": "1", "object": "chat.completion", "created": 1, "choices": choices}
            completion["model"] = reply.model or request["model"]
            if (number := reply.num_prompt_tokens) is not None:
                completion["usage"] = {"prompt_tokens": number, "completion_tokens": reply.num_tokens}
                completion["usage"]["total_tokens"] = number + reply.num_tokens
            body = json.dumps(completion).encode() if reply.body is None else reply.body
            with contextlib.suppress(OSError):
                self.send_response(reply.status)
                for key, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_transformers(port: int) -> warm.Process:
    """Start `transformers serve` without waiting for it; in float32, in which all kernels decide alike."""
    call = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    arguments = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    return warm.Process([sys.executable, "-c", call, *arguments])


def wait_for(server: warm.Process, url: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise AssertionError(f"transformers serve did not start: {server.stderr}")


def save_model_that_always_says(answer: str, folder: Path) -> Path:
    """A real Llama whose next token depends on the last alone: after the prompt comes `answer`, and then the end."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "<end>": 1, "<answer>": 2, answer: 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(answer, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>",
        additional_special_tokens=["<answer>"],
    )  # fmt: skip
    fast.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}<answer>"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(4))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[3, 2] = model.lm_head.weight[1, 3] = 1.0
    model.save_pretrained(folder)
    return folder
