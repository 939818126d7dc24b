"""The application: bundles behind OpenAI's images API, a form of our own with progress, a page, and metrics."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from slipcast.errors import Cancelled, RequestError, ResourceError, SlipcastError
from slipcast.run.pipeline import Pipeline
from slipcast.run.program import ProgramPipeline
from slipcast.serve.forms import Generate, ImagesRequest
from slipcast.serve.jobs import BusyError, ClosingError, Drawer, Job, Served
from slipcast.serve.limits import Limits, problem

LOOK_S = 0.2  # how often it is seen whether a client is still there
KEPT_BYTES = 2**28  # of pictures that are there by URL, the last ones
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
INVALID, BROKEN, NOT_FOUND = "invalid_request_error", "server_error", "not_found"
# Of a pipeline's call, what the form says, or what is not for strangers to say.
OWN = {
    "self", "guard", "prompt", "seed", "num_images_per_prompt", "output_type", "on_long_prompt",
    "callback_on_step_end", "latents",
}  # fmt: skip
NAMES = {"negative_prompt", "num_inference_steps", "guidance_scale", "width", "height"}  # of Pipeline's call, besides
NEVER_FRAMED = {"X-Frame-Options": "DENY", "Content-Security-Policy": "frame-ancestors 'none'"}


@dataclass(frozen=True)
class Settings:
    """`queue`: how many requests may wait; `together`: images of one call at most; `timeout_s`: from a request to its
    pictures; `keys`: one of which a client has to send; none: anyone may ask."""

    queue: int = 64
    together: int = 8
    timeout_s: float = 600.0
    keys: tuple[str, ...] = ()


class ProblemError(Exception):
    """An answer that is no picture."""

    def __init__(self, status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.body, self.headers = status, problem(message, kind), dict(headers or {})


def make_app(pipes: Mapping[str, Served], settings: Settings) -> FastAPI:
    """`pipes`: loaded bundles by the name that clients ask for; the first is the default. They are closed with it.
    `app.state.stop()` ends all that is asked for, soon, and is to be called before the server ends."""
    desk = _Desk(pipes, settings)
    shelf = _Shelf()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.drawer.close)

    app = FastAPI(title="slipcast serve", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Limits, keys=settings.keys)
    app.state.stop, began = desk.drawer.stop, int(time.time())

    @app.exception_handler(ProblemError)
    async def told(_: Request, error: ProblemError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(problem(f"{where}: {first['msg']}"[:500], INVALID), 400)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(problem(str(error.detail), INVALID), error.status_code, error.headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        if desk.drawer.waiting >= settings.queue:
            raise ProblemError(503, "the queue is full", BROKEN)
        return {"status": "ready", "waiting": desk.drawer.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(desk.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> HTMLResponse:
        text = files("slipcast.serve").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers=NEVER_FRAMED)

    def model_record(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "slipcast"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_record(name) for name in pipes]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return model_record(desk.find(name))

    @app.post("/v1/images/generations")
    async def generations(form: ImagesRequest, request: Request) -> Response:
        own = form.as_generate()
        job, ended = desk.begin(own)
        try:
            while not ended.done() and not await request.is_disconnected() and not job.over:
                await asyncio.wait([ended], timeout=LOOK_S)
        finally:
            job.gone = True  # whether it was drawn or not
        desk.check(job, ended.done())
        contents = await asyncio.to_thread(lambda: [_encode(each, own.output_format) for each in job.pictures])
        data = []
        for content, seed in zip(contents, job.seeds, strict=True):
            if form.response_format == "url":
                place = shelf.put(content, own.output_format)
                data.append({"url": str(request.url_for("stored", name=place)), "seed": seed})
            else:
                data.append({"b64_json": base64.b64encode(content).decode(), "seed": seed})
        size = "x".join(map(str, job.pictures[0].size))
        answer = {"created": int(time.time()), "data": data, "output_format": own.output_format, "size": size}
        body = await asyncio.to_thread(json.dumps, answer)
        return Response(body, media_type="application/json")

    @app.get("/images/{name}", name="stored")
    async def stored(name: str) -> Response:
        if not (found := shelf.get(name)):
            raise ProblemError(404, "there is no such picture, or it is there no longer", NOT_FOUND)
        return Response(found[0], media_type=f"image/{found[1]}")

    @app.post("/generate")
    async def generate(form: Generate) -> StreamingResponse:
        steps: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job, ended = desk.begin(form, lambda *at: _call_in(loop, steps.put_nowait, at))
        ended.add_done_callback(lambda _: steps.put_nowait(None))

        async def events() -> AsyncIterator[str]:
            try:
                async with asyncio.timeout_at(loop.time() + job.deadline - time.monotonic()):
                    while at := await steps.get():
                        yield _event("progress", {"step": at[0], "steps": at[1]})
            except TimeoutError:
                pass
            finally:
                job.gone = True
            try:
                desk.check(job, ended.done())
                for picture, seed in zip(job.pictures, job.seeds, strict=True):
                    content = await asyncio.to_thread(_encode, picture, form.output_format)
                    told = {"b64_json": base64.b64encode(content).decode(), "seed": seed, "format": form.output_format}
                    yield _event("picture", told)
                yield _event("done", {"seconds": round(job.seconds, 4), "model": job.model})
            except ProblemError as error:
                yield _event("error", error.body["error"])

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return app


class _Desk:
    """Takes what clients ask for, and counts what becomes of it."""

    def __init__(self, pipes: Mapping[str, Served], settings: Settings) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self._requests = Counter("slipcast_requests", "Requests to draw, by outcome.", ["model", "outcome"], **own)
        self._images = Counter("slipcast_images", "Pictures drawn.", ["model"], **own)
        self._seconds = Histogram(
            "slipcast_call_seconds", "Time of a call, of one request or several.", ["model"], buckets=SECONDS, **own
        )
        self._together = Histogram(
            "slipcast_call_images", "Pictures of a call.", ["model"], buckets=(1, 2, 4, 8, 16), **own
        )
        waiting = Gauge("slipcast_waiting", "Requests in the queue.", **own)
        self._pipes, self._settings = pipes, settings
        self.drawer = Drawer(pipes, settings.queue, settings.together, self._drawn)
        waiting.set_function(lambda: self.drawer.waiting)

    def find(self, name: str | None) -> str:
        """The name of a bundle; the first one's, where none is asked for. ProblemError where there is no such."""
        found = name or next(iter(self._pipes))
        if found not in self._pipes:
            raise ProblemError(404, f"there is no model {found[:100]!r}; there are {', '.join(self._pipes)}", NOT_FOUND)
        return found

    def begin(
        self, form: Generate, tell: Callable[[int, int], None] = lambda *_: None
    ) -> tuple[Job, asyncio.Future[None]]:
        """A job in the queue, and what is done when it has ended; ProblemError for what cannot be asked."""
        model = self.find(form.model)
        pipe, loop = self._pipes[model], asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end(job: Job) -> None:
            self._requests.labels(model, type(job.error).__name__ if job.error else "ok").inc()
            _call_in(loop, lambda: None if ended.done() else ended.set_result(None))

        prompt, arguments = _asked(pipe, form)
        first = form.seed if form.seed is not None else secrets.randbits(32)
        seeds = tuple(first + i for i in range(form.n))
        deadline = time.monotonic() + self._settings.timeout_s
        job = Job(model, prompt, seeds, arguments, deadline, end, tell)
        try:
            self.drawer.put(job)
        except BusyError as busy:
            self._requests.labels(model, "BusyError").inc()
            raise ProblemError(429, str(busy), "rate_limit_error", {"Retry-After": str(busy.retry_s)}) from None
        except ClosingError as error:
            raise ProblemError(503, error.message, BROKEN) from None
        return job, ended

    def check(self, job: Job, ended: bool) -> None:
        """ProblemError, where it has no pictures, with what may be told of why: a client's mistakes in full."""
        error = job.error
        if isinstance(error, ClosingError):
            raise ProblemError(503, error.message, BROKEN)
        if isinstance(error, Cancelled) or not ended:
            raise ProblemError(504, "it was not drawn in time", BROKEN)
        if isinstance(error, RequestError):
            lines = [error.message, *(f"{what}: {said}" for what, said in _parts(error) if said is not None)]
            raise ProblemError(400, "; ".join(lines)[:2000], INVALID)
        if isinstance(error, ResourceError):
            raise ProblemError(507, "memory or disk ran out", BROKEN)
        if error:
            what = type(error).__name__ if isinstance(error, SlipcastError) else "a defect; the server's log has it"
            raise ProblemError(500, f"drawing failed: {what}", BROKEN)

    def _drawn(self, model: str, images: int, seconds: float) -> None:
        self._images.labels(model).inc(images)
        self._seconds.labels(model).observe(seconds)
        self._together.labels(model).observe(images)


def _parts(error: RequestError) -> tuple[tuple[str, object], ...]:
    # What comes next is for whoever has the bundle, and not for whoever asks a server.
    return ("expected", error.expected), ("got", error.got)


def _asked(pipe: Served, form: Generate) -> tuple[str | None, dict[str, Any]]:
    """The prompt, and the arguments of a call besides; ProblemError for those that it cannot have."""
    names, described = form.arguments.keys(), isinstance(pipe, Pipeline)
    if wrong := sorted(names & OWN) or sorted(names - NAMES if described else []):
        raise ProblemError(400, f"arguments.{wrong[0]}: it is not an argument that the bundle takes", INVALID)
    takes = pipe.manifest.takes_prompt
    if takes and form.prompt is None:
        raise ProblemError(400, f"prompt is missing: {pipe.manifest.name} draws what a text says", INVALID)
    takes = takes or (isinstance(pipe, ProgramPipeline) and "prompt" in pipe.program.arguments)
    return form.prompt if takes else None, _without_size(pipe, form.arguments)


def _without_size(pipe: Served, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without width and height, where the pipeline's call has no such arguments, and they are what it draws anyway."""
    asked = {name: arguments[name] for name in ("height", "width") if name in arguments}
    if not asked or not isinstance(pipe, ProgramPipeline) or asked.keys() & pipe.program.fixed.keys():
        return dict(arguments)
    shape = pipe.manifest.specs(pipe.program)[pipe.program.results[0]].shape
    drawn = dict(zip(("height", "width"), shape[-2:], strict=True))
    if any(drawn[name] != size for name, size in asked.items()):
        size = f"{drawn['width']}x{drawn['height']}"
        raise ProblemError(400, f"size: this bundle draws {size}, and no other", INVALID)
    return {name: value for name, value in arguments.items() if name not in asked}


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    loop.call_soon_threadsafe(function, *arguments)


def _encode(picture: Any, form: str) -> bytes:
    stream = io.BytesIO()
    if form == "jpeg":
        picture.convert("RGB").save(stream, "JPEG", quality=95)
    else:
        picture.save(stream, form.upper(), **({"lossless": True} if form == "webp" else {}))
    return stream.getvalue()


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class _Shelf:
    """The last pictures that are there by URL, under names that nobody guesses."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._bytes = 0

    def put(self, content: bytes, form: str) -> str:
        """Its name; the oldest make room."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._kept[name] = content, form
        self._bytes += len(content)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= len(self._kept.popitem(last=False)[1][0])
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Its bytes and their form, if it is there."""
        return self._kept.get(name)
