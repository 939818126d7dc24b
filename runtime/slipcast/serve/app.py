"""The application: bundles behind OpenAI's images API, a form of our own with progress, a page, and metrics."""

from __future__ import annotations

import asyncio
import base64
import hmac
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

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from slipcast.errors import Cancelled, RequestError, ResourceError, SlipcastError
from slipcast.run.program import ProgramPipeline
from slipcast.serve.forms import Generate, ImagesRequest
from slipcast.serve.jobs import BusyError, Drawer, Job, Served
from slipcast.serve.limits import LimitBody

LOOK_S = 0.2  # how often it is seen whether a client is still there
KEPT = 256  # pictures that are there by URL, the last ones
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class Settings:
    """`queue`: how many requests may wait; `together`: images of one call at most; `timeout_s`: from a request to its
    pictures; `keys`: one of which a client has to send; none: anyone may ask."""

    queue: int = 64
    together: int = 8
    timeout_s: float = 600.0
    keys: tuple[str, ...] = ()


class Problem(Exception):  # noqa: N818 - it is what a client is told
    """An answer that is no picture, as OpenAI's API words it."""

    def __init__(self, status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": None}}


def make_app(pipes: Mapping[str, Served], settings: Settings) -> FastAPI:
    """`pipes`: loaded bundles by the name that clients ask for; the first is the default. They are closed with it."""
    numbers = _Numbers()
    drawer = Drawer(pipes, settings.queue, settings.together, numbers.drawn)
    numbers.waiting.set_function(lambda: drawer.waiting)
    shelf = _Shelf()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(drawer.close)

    app = FastAPI(title="slipcast serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(LimitBody)
    began, guarded = int(time.time()), [Depends(_needs_key(settings.keys))]

    @app.exception_handler(Problem)
    async def told(_: Request, problem: Problem) -> JSONResponse:
        return JSONResponse(problem.body, problem.status, problem.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(Problem(400, f"{where}: {first['msg']}"[:500], INVALID).body, 400)

    async def draw(form: Generate, request: Request) -> Job:
        """A job that has ended with pictures; Problem where it has not, or where the client is gone."""
        job, ended = _begin(form, pipes, settings, drawer)
        while not ended.done():
            await asyncio.wait([ended], timeout=LOOK_S)
            if not ended.done() and await request.is_disconnected():
                job.gone = True
        return _checked(job, numbers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        if drawer.waiting >= settings.queue:
            raise Problem(503, "the queue is full", "server_error")
        return {"status": "ready", "waiting": drawer.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(numbers.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return files("slipcast.serve").joinpath("page.html").read_text("utf-8")

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "created": began, "owned_by": "slipcast"} for name in pipes]
        return {"object": "list", "data": listed}

    @app.post("/v1/images/generations", dependencies=guarded)
    async def generations(form: ImagesRequest, request: Request) -> dict[str, Any]:
        own = form.as_generate()
        job = await draw(own, request)
        data = []
        for picture, seed in zip(job.pictures, job.seeds, strict=True):
            content = await asyncio.to_thread(_encode, picture, own.output_format)
            if form.response_format == "url":
                place = shelf.put(content, own.output_format)
                data.append({"url": str(request.url_for("stored", name=place)), "seed": seed})
            else:
                data.append({"b64_json": base64.b64encode(content).decode(), "seed": seed})
        size = "x".join(map(str, job.pictures[0].size))
        return {"created": int(time.time()), "data": data, "output_format": own.output_format, "size": size}

    @app.get("/images/{name}", name="stored")
    async def stored(name: str) -> Response:
        if not (found := shelf.get(name)):
            raise Problem(404, "there is no such picture, or it is there no longer", "not_found")
        return Response(found[0], media_type=f"image/{found[1]}")

    @app.post("/generate", dependencies=guarded)
    async def generate(form: Generate, request: Request) -> StreamingResponse:
        steps: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job, ended = _begin(form, pipes, settings, drawer, lambda *at: _call_in(loop, steps.put_nowait, at))
        ended.add_done_callback(lambda _: steps.put_nowait(None))

        async def events() -> AsyncIterator[str]:
            try:
                while at := await steps.get():
                    yield _event("progress", {"step": at[0], "steps": at[1]})
                done = _checked(job, numbers)
                for picture, seed in zip(done.pictures, done.seeds, strict=True):
                    content = await asyncio.to_thread(_encode, picture, form.output_format)
                    told = {"b64_json": base64.b64encode(content).decode(), "seed": seed, "format": form.output_format}
                    yield _event("picture", told)
                yield _event("done", {"seconds": round(done.seconds, 4), "model": done.model})
            except Problem as problem:
                yield _event("error", problem.body["error"])
            finally:
                job.gone = True

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return app


INVALID = "invalid_request_error"


def _needs_key(keys: tuple[str, ...]) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        # All are compared, so that time tells nothing.
        fits = [hmac.compare_digest(sent.encode(), key.encode()) for key in keys]
        if keys and not (scheme.lower() == "bearer" and any(fits)):
            raise Problem(401, "no API key of this server was sent", "authentication_error")

    return check


def _begin(
    form: Generate, pipes: Mapping[str, Served], settings: Settings, drawer: Drawer,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Job, asyncio.Future[None]]:  # fmt: skip
    """A job in the queue, and what is done when it has ended; Problem where there is no room, or no such model."""
    model = form.model or next(iter(pipes))
    if model not in pipes:
        raise Problem(404, f"there is no model {model[:100]!r}; there are {', '.join(pipes)}", "not_found")
    if reserved := sorted(OWN & form.arguments.keys()):
        raise Problem(400, f"arguments.{reserved[0]}: it is not an argument of the pipeline's", INVALID)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end(_: Job) -> None:
        _call_in(loop, lambda: None if ended.done() else ended.set_result(None))

    first = form.seed if form.seed is not None else secrets.randbits(32)
    takes_prompt = pipes[model].manifest.takes_prompt
    prompt = form.prompt if takes_prompt else form.prompt or None  # OpenAI's form has one in any case
    if prompt is None and takes_prompt:
        raise Problem(400, f"prompt is missing: {model} draws what a text says", INVALID)
    arguments = _without_size(pipes[model], form.arguments)
    seeds = tuple(first + i for i in range(form.n))
    deadline = time.monotonic() + settings.timeout_s
    job = Job(model, prompt, seeds, arguments, deadline, end, tell)
    try:
        drawer.put(job)
    except BusyError as busy:
        raise Problem(429, str(busy), "rate_limit_error", {"Retry-After": str(busy.retry_s)}) from None
    return job, ended


# Of a pipeline's call, what the form says, or what is not for strangers to say.
OWN = {
    "guard",
    "prompt",
    "seed",
    "num_images_per_prompt",
    "output_type",
    "on_long_prompt",
    "callback_on_step_end",
    "latents",
}


def _without_size(pipe: Served, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without width and height, where the pipeline's call has no such arguments, and they are what it draws anyway."""
    asked = {name: arguments[name] for name in ("height", "width") if name in arguments}
    if not asked or not isinstance(pipe, ProgramPipeline) or asked.keys() & pipe.program.fixed.keys():
        return dict(arguments)
    shape = pipe.manifest.specs(pipe.program)[pipe.program.results[0]].shape
    drawn = dict(zip(("height", "width"), shape[-2:], strict=True))
    if any(drawn[name] != size for name, size in asked.items()):
        size = f"{drawn['width']}x{drawn['height']}"
        raise Problem(400, f"size: this bundle draws {size}, and no other", INVALID)
    return {name: value for name, value in arguments.items() if name not in asked}


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    loop.call_soon_threadsafe(function, *arguments)


def _checked(job: Job, numbers: _Numbers) -> Job:
    """The job, if it has pictures. Problem with what may be told of why it has none: a client's mistakes in full."""
    error = job.error
    outcome = "ok" if not error else type(error).__name__
    numbers.requests.labels(job.model, outcome).inc()
    if not error:
        return job
    if isinstance(error, RequestError):
        raise Problem(400, str(error), INVALID)
    if isinstance(error, Cancelled):
        raise Problem(503, error.message, "server_error", {"Retry-After": "1"})
    if isinstance(error, ResourceError):
        raise Problem(507, "memory or disk ran out", "server_error")
    what = type(error).__name__ if isinstance(error, SlipcastError) else "a defect; the server's log has it"
    raise Problem(500, f"drawing failed: {what}", "server_error")


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

    def put(self, content: bytes, form: str) -> str:
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._kept[name] = content, form
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        return self._kept.get(name)


class _Numbers:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("slipcast_requests", "Requests that ended, by outcome.", ["model", "outcome"], **own)
        self._images = Counter("slipcast_images", "Pictures drawn.", ["model"], **own)
        self._seconds = Histogram(
            "slipcast_call_seconds", "Time of a call, of one request or several.", ["model"], buckets=SECONDS, **own
        )
        self._together = Histogram(
            "slipcast_call_images", "Pictures of a call.", ["model"], buckets=(1, 2, 4, 8, 16), **own
        )
        self.waiting = Gauge("slipcast_waiting", "Requests in the queue.", **own)

    def drawn(self, model: str, images: int, seconds: float) -> None:
        self._images.labels(model).inc(images)
        self._seconds.labels(model).observe(seconds)
        self._together.labels(model).observe(images)
