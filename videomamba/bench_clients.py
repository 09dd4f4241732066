"""Clients that ask a server on this machine, in a process of their own: `python -m videomamba.bench_clients ADDRESS
CLIENTS REQUESTS SALT`. Prints the seconds that each request took, and how long all of them did, as JSON.

Each client has one connection, and asks again when it was answered; every sentence is another one.
"""

import ipaddress
import json
import sys
import threading
import time
from http.client import HTTPConnection
from urllib.parse import quote, urlsplit

WORDS = [
    "red",
    "blue",
    "green",
    "white",
    "large",
    "small",
    "square",
    "circle",
    "heart",
    "star",
    "moves",
    "turns",
    "grows",
    "shrinks",
    "left",
    "right",
    "up",
    "down",
    "slowly",
    "quickly",
    "over",
    "under",
    "beside",
    "behind",
]


def sentence(salt: int, number: int) -> str:
    """The `number`-th of many different sentences of eight words."""
    number += salt * 1_000_003
    return " ".join(WORDS[(number // len(WORDS) ** place + 7 * place + number) % len(WORDS)] for place in range(8))


def ask(address: str, clients: int, requests: int, salt: int) -> dict[str, object]:
    """`requests` searches, shared by so many clients. Raises RuntimeError where one is refused."""
    host, port = urlsplit(address).hostname, urlsplit(address).port
    assert host is not None
    if not ipaddress.ip_address(host).is_loopback:
        raise RuntimeError("clients ask this machine alone")
    spent: list[float] = []
    refused: list[int] = []

    def run(first: int) -> None:
        connection = HTTPConnection(host, port, timeout=120)
        for number in range(first, requests, clients):
            began = time.perf_counter()
            connection.request("GET", f"/api/search?q={quote(sentence(salt, number))}")
            answer = connection.getresponse()
            answer.read()
            spent.append(time.perf_counter() - began)
            if answer.status != 200:
                refused.append(answer.status)
        connection.close()

    threads = [threading.Thread(target=run, args=(first,)) for first in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused or len(spent) != requests:
        raise RuntimeError(
            f"{requests - len(spent)} of {requests} failed, and {len(refused)} were refused {set(refused)}"
        )
    return {"seconds": spent, "together": time.perf_counter() - began}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ask(sys.argv[1], *map(int, sys.argv[2:]))))
