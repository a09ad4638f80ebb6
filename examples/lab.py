#!/usr/bin/env python3
"""Servers that say who they are, and a client that asks them: for the demo and the tests.

  lab.py serve tcp|udp ADDRESS:PORT...     answers every connection with ADDRESS
  lab.py ask tcp|udp ADDRESS:PORT COUNT    makes COUNT connections, one after the other,
                                           and prints a line with each answer

IPv6 addresses go in brackets: [fd00::1]:80.
"""
import selectors
import socket
import sys

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def endpoint(text):
    host, port = text.rsplit(":", 1)
    host = host.strip("[]")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))


def serve(kind, endpoints):
    selector = selectors.DefaultSelector()
    for family, address in map(endpoint, endpoints):
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        if kind == socket.SOCK_STREAM:
            server.listen(1024)
        selector.register(server, selectors.EVENT_READ, address[0].encode())
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if kind == socket.SOCK_STREAM:
                connection, _ = key.fileobj.accept()
                with connection:
                    connection.sendall(key.data)
            else:
                _, client = key.fileobj.recvfrom(64)
                key.fileobj.sendto(key.data, client)


def ask(kind, target, count):
    family, address = endpoint(target)
    for _ in range(count):
        with socket.socket(family, kind) as client:
            client.settimeout(5)
            try:
                client.connect(address)
                if kind == socket.SOCK_DGRAM:
                    client.send(b"?")
                print(client.recv(64).decode())
            except OSError as error:
                print(type(error).__name__)


if __name__ == "__main__":
    command, kind, *rest = sys.argv[1:]
    if command == "serve":
        serve(KINDS[kind], rest)
    else:
        ask(KINDS[kind], rest[0], int(rest[1]))
