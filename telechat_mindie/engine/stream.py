"""Where a caller picks up the outputs of its request."""

from __future__ import annotations

import asyncio
import queue

from telechat_mindie.engine.output import Output


class OutputStream:
    """Iterates over the outputs of one request, waiting for each; ends after the one with a finish reason.

    The engine must be running in another thread.
    """

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._is_over = False

    def deliver(self, output: Output) -> None:
        """Called by the engine."""
        self._outputs.put(output)

    def get(self, timeout: float | None = None) -> Output:
        """The next output.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: none came in time.
        """
        try:
            output = self._outputs.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no output of request {self.request_id} within {timeout} s") from None
        self._is_over = output.finish_reason is not None
        return output

    def __iter__(self) -> OutputStream:
        return self

    def __next__(self) -> Output:
        if self._is_over:
            raise StopIteration
        return self.get()


class AsyncOutputStream:
    """The same for coroutines of the event loop in which it was made."""

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._is_over = False

    def deliver(self, output: Output) -> None:
        """Called by the engine, from its own thread.

        Raises:
            RuntimeError: the event loop is closed.
        """
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    def __aiter__(self) -> AsyncOutputStream:
        return self

    async def __anext__(self) -> Output:
        if self._is_over:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._is_over = output.finish_reason is not None
        return output
