"""POST /v1/chat/completions: from a request to answers, whole or streamed, each stored before its client is told that it is done."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fastalign.data.messages import Message
from fastalign.data.templates import TemplateTraits
from fastalign.errors import TemplateError
from fastalign.serve.config import ServeConfig
from fastalign.serve.decode import Row
from fastalign.serve.engine import Engine, Events, Job, Piece
from fastalign.serve.guard import HEADERS, Caller, ClientGoneError, as_api_error, json_response, read_body
from fastalign.serve.records import Answer
from fastalign.serve.store import Store
from fastalign.serve.wire import ApiError, ChatRequest, parse_chat

log = logging.getLogger("fastalign.serve")

GATHER = 0.002  # seconds; a step of a small model on a CPU takes as long, and reading a prompt longer
SHORT = 2000  # characters of a conversation whose tokens are found sooner than another thread would begin


class Chat:
    """The operation over a store and an engine. Raises TemplateError where the tokenizer has no chat template."""

    def __init__(self, config: ServeConfig, store: Store, engine: Engine) -> None:
        self.config, self.store, self.engine = config, store, engine
        self.tokenizer = engine.models.tokenizer
        if not self.tokenizer.chat_template:
            raise TemplateError(f"{config.model}: its tokenizer has no chat template, which turns a conversation into a prompt; add one")
        self.traits = TemplateTraits.of(self.tokenizer)
        self.post: _Post | None = None
        self.arrived: list[_Arrived] = []

    async def complete(self, request: Request, caller: Caller) -> Response:
        """Answer one request. Raises ApiError and what the queue and the store raise."""
        chat = parse_chat(await read_body(request, self.config.max_body))
        if chat.model != self.config.model_name:
            told = f"there is no model {chat.model!r:.80}; this service has {self.config.model_name!r}"
            raise ApiError(404, told, param="model", code="model_not_found")
        if self.config.log_prompts:
            log.info("conversation: %s", json.dumps(chat.messages, ensure_ascii=False))
        text = self.text(chat.messages)
        prompt = None if len(text) <= SHORT else await asyncio.to_thread(lambda: self.ids([text])[0])
        mailbox = _Mailbox(self._post(), whole=not chat.stream)
        job = await self._submit(_Arrived(chat, mailbox, text, prompt))
        reply = _Reply(self, chat, job, caller)
        if chat.stream:
            return _EventStream(reply.stream(mailbox, request), headers=HEADERS, media_type="text/event-stream")
        return await reply.whole(mailbox, request)

    def text(self, messages: list[Message]) -> str:
        """A conversation as the model reads it, up to where the assistant speaks. Raises ApiError 400 where the template refuses it."""
        try:
            return str(self.tokenizer.apply_chat_template(self.traits.adapt(messages), tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program, and may refuse by any exception
            raise ApiError(400, f"the model's chat template refuses this conversation: {error}", param="messages") from error

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    async def _submit(self, arrived: _Arrived) -> Job:
        """Submit it with all that arrives within `GATHER`: the texts become tokens together, the prompts are read together, and no answer
        is held up for each of them."""
        loop = asyncio.get_running_loop()
        arrived.taken = loop.create_future()
        if not self.arrived:
            loop.call_later(GATHER, self._submit_all)
        self.arrived.append(arrived)
        return await arrived.taken

    def _submit_all(self) -> None:
        arrived, self.arrived = [one for one in self.arrived if not one.taken.cancelled()], []
        try:
            self._tell_all(arrived)
        except Exception as error:  # whatever it is, nobody waits for ever
            for one in arrived:
                if not one.taken.done():
                    one.taken.set_exception(error)

    def _tell_all(self, arrived: list[_Arrived]) -> None:
        short = [one for one in arrived if one.prompt is None]
        for one, prompt in zip(short, self.ids([one.text for one in short])):
            one.prompt = prompt
        jobs: list[tuple[_Arrived, Job]] = []
        for one in arrived:
            try:
                jobs.append((one, self._job(one)))
            except Exception as error:
                one.taken.set_exception(error)
        for (one, job), refused in zip(jobs, self.engine.submit(*(job for _, job in jobs))):
            if refused:
                one.taken.set_exception(refused)
            else:
                one.taken.set_result(job)

    def _job(self, arrived: _Arrived) -> Job:
        chat, prompt = arrived.chat, arrived.prompt
        assert prompt is not None
        sampling = chat.sampling(self._room(len(prompt), chat.max_new_tokens))
        return Job(self.engine.rows(prompt, chat.n, sampling), arrived.mailbox.deliver)

    def _post(self) -> _Post:
        loop = asyncio.get_running_loop()
        if self.post is None or self.post.loop is not loop:
            self.post = _Post(loop)
        return self.post

    def _room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens an answer may have. Raises ApiError 400 where prompt and answer do not fit into the window."""
        if not prompt:
            raise ApiError(400, "the conversation is empty: there is nothing to answer", param="messages")
        window = self.engine.models.window
        if window is None:
            return wanted or self.config.max_new_tokens
        if prompt + (wanted or 1) > window:
            asked = f" and {wanted} for the answer" if wanted else ""
            told = f"this model's window is {window} tokens; the conversation has {prompt}{asked}: shorten it"
            raise ApiError(400, told, param="messages", code="context_length_exceeded")
        return wanted or min(self.config.max_new_tokens, window - prompt)


@dataclass
class _Arrived:
    """A request on its way to the engine."""

    chat: ChatRequest
    mailbox: _Mailbox
    text: str  # of its conversation
    prompt: list[int] | None  # the tokens of the text; None: not yet
    taken: asyncio.Future[Job] = field(init=False)


class _EventStream(StreamingResponse):
    """A stream whose content itself watches for the client to leave: whether Starlette does depends on what the server says of itself."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content: Any = self.body_iterator
        try:
            with suppress(ClientGoneError, OSError):
                await self.stream_response(send)
        finally:
            await content.aclose()


class _Post:
    """From other threads to the event loop: what one step, or one commit, has for many requests goes in one delivery, as waking the loop
    is dear."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._sent: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._called = False

    def send(self, receiver: Callable[[Any], None], content: Any) -> None:
        """Let the loop call `receiver(content)`, after what was sent before."""
        self._sent.append((receiver, content))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                self.loop.call_soon_threadsafe(self._deliver)

    async def result(self, future: Future[None]) -> None:
        """Wait for a future of another thread."""
        done = self.loop.create_future()
        future.add_done_callback(lambda future: self.send(lambda ended: None if done.done() else done.set_result(ended), future))
        (await done).result()

    def _deliver(self) -> None:
        self._called = False  # before the rest, so that what is sent from now on is delivered, too
        while self._sent:
            receiver, content = self._sent.popleft()
            receiver(content)


class _Mailbox:
    """What the engine's thread says, heard on the event loop; of a `whole` answer only the ends of its rows."""

    def __init__(self, post: _Post, *, whole: bool) -> None:
        self.post, self.whole = post, whole
        self.queue: asyncio.Queue[Events] = asyncio.Queue()

    def deliver(self, events: Events) -> None:
        if self.whole and not isinstance(events, Exception):
            events = [piece for piece in events if piece.finished]
        if events:
            self.post.send(self.queue.put_nowait, events)

    async def pieces(self) -> list[Piece]:
        """Raises what the engine reports, and ClientGoneError inside of `watching`."""
        events = await self.queue.get()
        if isinstance(events, Exception):
            raise events
        return events

    @contextmanager
    def watching(self, request: Request) -> Iterator[None]:
        """Hear of it inside when the client leaves."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.queue.put_nowait(ClientGoneError())

        watcher = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watcher.cancel()


class _Reply:
    """The reply to one request."""

    def __init__(self, chat: Chat, asked: ChatRequest, job: Job, caller: Caller) -> None:
        self.store, self.config, self.tokenizer, self.asked, self.job = chat.store, chat.config, chat.tokenizer, asked, job
        self.post = chat._post()
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = time.time()
        self.user = chat.store.user_key(caller.key, asked.user)

    async def whole(self, mailbox: _Mailbox, request: Request) -> Response:
        """All answers at once."""
        left = len(self.job.rows)
        try:
            with mailbox.watching(request):
                while left:
                    left -= sum(piece.finished for piece in await mailbox.pieces())
        finally:
            self.job.cancel()
        began = time.perf_counter()
        await self._store(self.job.rows)
        stored = time.perf_counter() - began
        choices = [
            {
                "index": row.index,
                "answer_id": self._answer_id(row),
                "message": {"role": "assistant", "content": row.text, "refusal": None},
                "logprobs": self._logprobs(row, 0, len(row.tokens)),
                "finish_reason": row.finish_reason,
            }
            for row in self.job.rows
        ]
        took = {"queue": self.job.began - self.job.submitted, "generate": self.job.ended - self.job.began, "store": stored}
        timing = ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in took.items())
        body = {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}
        return json_response(body, headers={"server-timing": timing})

    async def stream(self, mailbox: _Mailbox, request: Request) -> AsyncIterator[str]:
        """Server-sent events, a chunk per step and answer; an error after the first one becomes an event, too."""
        sent = [0] * len(self.job.rows)  # tokens of each answer that the client has heard of
        left = len(sent)
        try:
            with mailbox.watching(request):
                while left:
                    for piece in await mailbox.pieces():
                        row = piece.row
                        if not sent[row.index]:
                            yield self._chunk(row, {"role": "assistant", "content": ""})
                        shown = self._logprobs(row, sent[row.index], piece.count)
                        sent[row.index] = piece.count
                        if piece.text or shown:
                            yield self._chunk(row, {"content": piece.text}, logprobs=shown)
                        if piece.finished:
                            left -= 1
                            await self._store([row])
                            yield self._chunk(row, {}, finish=row.finish_reason)
            if self.asked.include_usage:
                yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ClientGoneError:
            raise
        except Exception as error:
            known = as_api_error(error)
            if known.status == 500:
                log.error("unexpected %s: %s", type(error).__name__, error, exc_info=error)
            yield _event(known.body)
        finally:
            self.job.cancel()

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": int(self.created), "model": self.config.model_name}
        return {**head, "system_fingerprint": self.job.version}

    def _chunk(self, row: Row, delta: dict[str, Any], *, logprobs: Any = None, finish: str | None = None) -> str:
        choice = {"index": row.index, "answer_id": self._answer_id(row), "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.asked.include_usage else {}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _answer_id(self, row: Row) -> str:
        return self.id if len(self.job.rows) == 1 else f"{self.id}-{row.index}"

    def _usage(self) -> dict[str, int]:
        prompt, said = len(self.job.rows[0].prompt), sum(len(row.tokens) for row in self.job.rows)
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}

    def _logprobs(self, row: Row, start: int, end: int) -> dict[str, Any] | None:
        if self.asked.top_logprobs is None:
            return None

        def entry(token: int, logp: float) -> dict[str, Any]:
            text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
            return {"token": text, "logprob": max(logp, -9999.0), "bytes": None if "\ufffd" in text else list(text.encode())}

        content = [
            {**entry(one.token, one.logp), "top_logprobs": [entry(token, logp) for token, logp in one.top]} for one in row.shown[start:end]
        ]
        return {"content": content, "refusal": None}

    async def _store(self, rows: list[Row]) -> None:
        asked = self.asked
        answers = [
            Answer(
                id=self._answer_id(row),
                response=self.id,
                messages=asked.messages,
                prompt_ids=row.prompt,
                text=row.text,
                tokens=tuple(row.tokens),
                logps=tuple(row.logps),
                version=self.job.version,
                user=self.user,
                created=self.created,
                finish_reason=row.finish_reason or "length",
                sampling={"temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed, "index": row.index},
                stopped=row.stream.stopped,
            )
            for row in rows
        ]
        await self.post.result(self.store.add_answers_later(answers))
        if self.config.log_prompts:
            for answer in answers:
                log.info("answer %s: %s", answer.id, json.dumps(answer.text, ensure_ascii=False))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
