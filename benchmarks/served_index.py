# SPDX-License-Identifier: Apache-2.0
"""A server with an index of random vectors, for the benches of `camoe serve`."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import uvicorn
from synthetic_index import random_vectors, write_index

from camoe_search.index import VideoIndex
from camoe_search.serve import listen, make_app


@contextlib.contextmanager
def served_index(count: int, width: int) -> Iterator[tuple[VideoIndex, int]]:
    """An index of `count` moments and the port of its server on this machine; a text gets a random vector at once."""
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), count, width)
        index = VideoIndex(folder)
        # A new seed for each text: no two searches are the same.
        encode = lambda texts: random_vectors(len(texts), width, abs(hash(texts[0])))  # noqa: E731
        index._encoder = SimpleNamespace(encode_texts=encode, weights="random")
        with listen("127.0.0.1", 0) as listener:
            server = uvicorn.Server(uvicorn.Config(make_app({"index": index}), log_level="warning", lifespan="off"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                while not server.started:
                    time.sleep(0.01)
                yield index, listener.getsockname()[1]
            finally:
                server.should_exit = True
                thread.join()
