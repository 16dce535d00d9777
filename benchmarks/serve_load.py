# SPDX-License-Identifier: Apache-2.0
"""How `camoe serve` holds up: the time of one search, of many at once, and of as many in one call of the index.

    python benchmarks/serve_load.py --count 100000 --parallel 200

The index holds random vectors, and the model is a stand-in that turns a text into a random vector at once: this
measures server and search, not a text tower. Client and server share the machine.
"""

import argparse
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from served_index import served_index
from synthetic_index import random_vectors

from camoe_search.serve import PAGE_SIZE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="moments")
    parser.add_argument("--width", type=int, default=2048, help="entries of a folded vector")
    parser.add_argument("--parallel", type=int, default=200, help="searches at once")
    parser.add_argument("--single", type=int, default=20, help="searches one after the other")
    options = parser.parse_args()
    with served_index(options.count, options.width) as (index, port):
        seconds_of(port, 0)  # maps the files
        single = [seconds_of(port, number) for number in range(options.single)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(options.parallel) as pool:
            parallel = list(pool.map(lambda number: seconds_of(port, 1000 + number), range(options.parallel)))
        total = time.perf_counter() - begin
        queries = random_vectors(options.parallel, options.width, seed=0)
        begin = time.perf_counter()
        index.search_vectors(queries, PAGE_SIZE)
        batch = time.perf_counter() - begin
    print(f"{options.count} moments of {options.width} entries")
    print(f"one search            median {milliseconds(single, 50)}, p95 {milliseconds(single, 95)}")
    print(
        f"{options.parallel} searches at once  median {milliseconds(parallel, 50)}, p95 {milliseconds(parallel, 95)}"
    )
    print(f"all of them in        {total:.2f} s, {options.parallel / total:.1f} a second")
    print(f"as one batch          {batch:.2f} s without a server; with one, {total / batch:.2f} times that")


def seconds_of(port: int, number: int) -> float:
    """From a request to the whole of its answer."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", f"/api/search?q=query+{number}")
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    if answer.status != 200 or len(found["hits"]) != PAGE_SIZE:
        raise RuntimeError(f"query {number} was answered {answer.status} with {found}")
    return time.perf_counter() - begin


def milliseconds(seconds: list[float], percentile: int) -> str:
    return f"{1000 * np.percentile(seconds, percentile):.0f} ms"


if __name__ == "__main__":
    main()
