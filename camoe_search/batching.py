# SPDX-License-Identifier: Apache-2.0
"""Requests that wait for an answer are answered together."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Batcher:
    """Answers requests in batches, in a thread of its own.

    While one batch is answered, requests gather; they are the next batch. So a request alone waits for nothing, and
    many at once cost what one batch of them costs.

    Args:
        answer: requests -> for each an answer, or the exception that it gets.
        size: requests of a batch at most.
    """

    def __init__(self, answer: Callable[[list], list], size: int):
        self.answer, self.size = answer, size
        self._waiting: deque[tuple[object, Future]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")

    def submit(self, request) -> Future:
        """The answer, as soon as there is one."""
        future: Future = Future()
        self._waiting.append((request, future))
        self._thread.submit(self._answer_waiting)  # finds nothing to do if an earlier one took this request along
        return future

    def _answer_waiting(self):
        batch = []
        while self._waiting and len(batch) < self.size:
            request, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():  # else nobody waits for it any more
                batch.append((request, future))
        if not batch:
            return
        try:
            answers = self.answer([request for request, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
