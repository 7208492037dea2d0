"""From a configuration to a running server, and to its orderly end.

The HTTP port opens first; the checks, the weights and the engine follow in a thread, so that
`/health` and `/ready` answer from the first moment. vLLM is imported there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import multiprocessing
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp

from adapters.errors import AdapterError
from adapters.thread import in_thread
from server.console import Progress, say
from server.loading import StartFailed, check, environment, load
from server.operation import listening, tracing
from server.operation.access_log import AccessLog, with_ids
from server.operation.auth import Auth
from server.operation.gate import Gate
from server.operation.head_limits import bounded
from server.operation.rate_limits import RateLimits
from server.operation.sides import Side
from server.operation.state import ServerState
from server.settings.config import Config, ConfigInvalid

if TYPE_CHECKING:
    from server.checks.diagnosis import Diagnosis
    from server.engine_vllm import SteeredLLM
    from server.serving import Serving

logger = logging.getLogger("coxswain")

LINGER_S = 3.0
"""How long a server whose engine died still answers, so that probes can read why."""

WATCH_S = 0.2
"""How often the engine's state is looked at."""

SHUTDOWN_S = 5.0
"""How long the engine gets to end by itself."""


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers: we drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Run:
    """One server process, from its first moment to its last. Lives on the event loop.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state = ServerState()
        self.rates = RateLimits.of(config)
        self.gate = Gate(self.state, Auth(config), config.server, config.limits, self.rates)
        self.tracing = tracing.start(config.tracing)
        self.apps = {admin: self._front(admin) for admin in (False, True)}
        self.engine: SteeredLLM | None = None
        self.loading: asyncio.Task[Serving] | None = None
        self.closing = contextlib.AsyncExitStack()
        self.signals = 0
        self.hurry = asyncio.Event()

    def _front(self, admin: bool) -> ASGIApp:
        """The application of a listener, from its outermost step.

        Args:
            admin: of the one that administration has for itself.
        """
        server, inner = self.config.server, self.gate
        side: ASGIApp = inner if server.admin_port is None else Side(inner, admin=admin)
        log = AccessLog(side, self.config.logging, self.tracing)
        return listening.outermost(with_ids(log), server)

    async def run(self) -> int:
        """Serves until a signal, a drain or the engine's end.

        Returns:
            The exit status: 0 after an orderly end, else 1.
        """
        server = self.config.server
        try:
            options = listening.tls_options(server.tls)
            sockets = listening.bind_all(server)
        except OSError as error:
            raise StartFailed([str(error)]) from error
        listeners = [
            _Http(uvicorn.Config(
                app, lifespan="off", log_config=None, access_log=False,
                timeout_keep_alive=server.keep_alive_s, timeout_graceful_shutdown=2,
                http=bounded(server), **options,
            ))
            for app in list(self.apps.values())[: len(sockets)]
        ]  # fmt: skip
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        served = [
            asyncio.create_task(http.serve([one]))
            for http, one in zip(listeners, sockets, strict=True)
        ]
        if server.tls is not None and server.tls.refresh:
            for http in listeners:
                refreshing = asyncio.create_task(listening.refresh(http.config, server.tls))
                self.closing.callback(refreshing.cancel)
        try:
            ports = [0 if one.family == socket.AF_UNIX else one.getsockname()[1] for one in sockets]
            status, last_line = await self._until_end(ports)
        finally:
            listening.cleared(server)
            for http in listeners:
                http.should_exit = True
            # uvicorn shows a traceback for each request that it cuts off.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.gather(*served), SHUTDOWN_S)
            loading = self.loading
            if loading is not None and not loading.done():
                loading.cancel()
                await asyncio.wait([loading])
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.closing.aclose(), SHUTDOWN_S)
            with contextlib.suppress(Exception):
                await self.rates.close()
            if self.tracing is not None:
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(in_thread(self.tracing.close), SHUTDOWN_S)
            await self._stop_engine()
        say(f"coxswain: {last_line}")
        return status

    def _signalled(self) -> None:
        """The first signal asks for an orderly end, the second for an immediate one."""
        self.signals += 1
        self.state.drain.set()
        if self.signals > 1:
            self.hurry.set()

    async def _until_end(self, ports: list[int]) -> tuple[int, str]:
        """Serves; returns the exit status and what to say last."""
        draining = asyncio.create_task(self.state.drain.wait())
        self.loading = loading = asyncio.create_task(self._load(ports))
        await asyncio.wait({draining, loading}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return 0, "stopped while loading"
        try:
            serving = loading.result()
        except StartFailed as error:
            # `/ready` shows it to everybody, and the reasons have paths in them.
            self.state.phase, self.state.reason = "dead", "cannot start; the log says why"
            for problem in error.problems:
                say(f"coxswain: {problem}")
            return 1, "cannot start"
        except Exception as error:
            logger.error("the start failed", exc_info=error)
            return 1, f"cannot start: {type(error).__name__}: {error}"
        watching = asyncio.create_task(self._watch())
        polling = asyncio.create_task(self._poll(serving))
        await asyncio.wait({draining, watching}, return_when=asyncio.FIRST_COMPLETED)
        polling.cancel()
        if watching.done():
            return await self._died(watching.result())
        return await self._drain(watching)

    async def _load(self, ports: list[int]) -> Serving:
        with Progress() as progress:

            def stage(text: str, detail: str = "") -> None:
                self.state.reason = text
                progress.stage(detail or text)

            diagnosis = await in_thread(lambda: _checked(self.config, stage))
            from vllm.exceptions import GenerationError

            from server.adapting.service import PreloadFailed
            from server.app import build_app
            from server.assemble import announce, assemble

            methods = diagnosis.methods
            assert methods is not None
            # Its schema takes seconds, and this process only waits while the engine loads.
            building = asyncio.create_task(in_thread(lambda: build_app(self.config, methods)))
            loaded = await in_thread(lambda: load(self.config, diagnosis, stage))
            self.engine = loaded.engine
            stage("starting the engine")
            await in_thread(_settle_memory)
            try:
                serving = await assemble(
                    self.config, self.state, loaded, self.closing, stage, self.rates
                )
            except PreloadFailed as error:
                raise StartFailed(error.problems) from error
            except GenerationError as error:
                raise StartFailed([str(error)]) from error
            except AdapterError as error:
                raise StartFailed([f"registry: {error}"]) from error
            app = await building
            app.state.serving = serving
            await in_thread(_settle_memory)
            seconds = progress.seconds
        self.gate.inner = app
        self.state.become_ready()
        say(announce(serving, ports, seconds))
        return serving

    async def _watch(self) -> str:
        """Returns why the engine died, once it has."""
        assert self.engine is not None
        # vLLM has no event for it.
        while not self.engine.errored:  # noqa: ASYNC110
            await asyncio.sleep(WATCH_S)
        return f"the engine process ended{_exit_detail(self.engine)}"

    async def _poll(self, serving: Serving) -> None:
        """Keeps the worker's counters fresh for `/metrics` and `/admin/streams`."""
        while True:
            with contextlib.suppress(Exception):  # a dead engine is `_watch`'s business
                serving.counters.update(await serving.engine.counters())
                self.state.hear()
            await asyncio.sleep(self.config.server.counters_every_s)

    async def _died(self, reason: str) -> tuple[int, str]:
        self.state.phase, self.state.reason = "dead", reason
        await asyncio.sleep(LINGER_S)
        return 1, f"engine failure: {reason}. Exit status 1."

    async def _drain(self, watching: asyncio.Task[str]) -> tuple[int, str]:
        """Tells load balancers, then lets running requests finish."""
        state, limit = self.state, self.config.server.drain_timeout_s
        hurry = asyncio.create_task(self.hurry.wait())
        if notice := self.config.server.drain_notice_s:
            state.leaving = True
            say(f"coxswain: not ready from now on; draining in {notice:g} s")
            await asyncio.wait(
                {hurry, watching}, timeout=notice, return_when=asyncio.FIRST_COMPLETED
            )
        state.phase, state.reason = "draining", "the server is asked to end"
        say(f"coxswain: draining, requests in flight: {state.in_flight}, at most {limit:g} s "
            "(a second signal: at once)")  # fmt: skip
        idle = asyncio.create_task(state.idle.wait())
        await asyncio.wait(
            {idle, hurry, watching}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
        )
        if watching.done():
            return await self._died(watching.result())
        cut = f"; requests cut off: {state.in_flight}" if state.in_flight else ""
        return 0, f"ended in order{cut}"

    async def _stop_engine(self) -> None:
        if self.engine is not None:
            engine = self.engine
            # vLLM takes the end that we ask for, too, for a failure, and shows a traceback.
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(
                    in_thread(lambda: engine.shutdown(timeout=SHUTDOWN_S)), 2 * SHUTDOWN_S
                )
        for process in multiprocessing.active_children():
            process.kill()


def _checked(config: Config, stage: Callable[[str], None]) -> Diagnosis:
    """As `check`; has the application's modules imported, too, before the engine's threads run.

    Raises:
        StartFailed: with every reason.
    """
    diagnosis = check(config, stage)
    importlib.import_module("server.app")
    importlib.import_module("server.assemble")
    importlib.import_module("server.engine_vllm")
    return diagnosis


def _exit_detail(engine: Any) -> str:
    """How vLLM's engine process ended, as far as it can be seen."""
    manager = getattr(getattr(engine.engine_core, "resources", None), "engine_manager", None)
    codes = [p.exitcode for p in getattr(manager, "processes", ()) if p.exitcode]
    if not codes:
        return "; its own message is above"
    if codes[0] < 0:
        return f" (killed by signal {-codes[0]}, {signal.Signals(-codes[0]).name})"
    return f" (exit status {codes[0]}); its own message is above"


def serve(config: Config) -> int:
    """Runs a server in this process until its end.

    Returns:
        The exit status.
    """
    notes = environment(config)
    say("; ".join([f"coxswain: opening {listening.address(config.server)}", *notes]))
    try:
        return asyncio.run(Run(config).run())
    except (StartFailed, ConfigInvalid) as error:
        for problem in error.problems:
            say(f"coxswain: {problem}")
        return 1


def _settle_memory() -> None:
    """What is there now stays: Python's collector would walk through all of vLLM again and again,
    and stop the event loop for some tenths of a second each time.
    """
    gc.collect()
    gc.freeze()
