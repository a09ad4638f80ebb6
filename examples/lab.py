#!/usr/bin/env python3
"""Servers that say who they are, and a client that asks them: for the demo and the tests.

  lab.py serve tcp|udp [--peer] ADDRESS:PORT...
      answers every connection with ADDRESS, and with --peer also with the address it comes from
  lab.py ask tcp|udp ADDRESS:PORT COUNT [--from PORT] [--timeout SECONDS]
      makes COUNT connections, one after the other, and prints a line with each answer

IPv6 addresses go in brackets: [fd00::1]:80.
"""
import argparse
import selectors
import socket

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def endpoint(text):
    host, port = text.rsplit(":", 1)
    host = host.strip("[]")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))


def serve(kind, endpoints, peer):
    selector = selectors.DefaultSelector()
    for family, address in map(endpoint, endpoints):
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        if kind == socket.SOCK_STREAM:
            server.listen(1024)
        selector.register(server, selectors.EVENT_READ, address[0])
    print("ready", flush=True)

    def answer(name, client):
        return f"{name} from {client[0]}".encode() if peer else name.encode()

    while True:
        for key, _ in selector.select():
            if kind == socket.SOCK_STREAM:
                connection, client = key.fileobj.accept()
                with connection:
                    connection.sendall(answer(key.data, client))
            else:
                _, client = key.fileobj.recvfrom(64)
                key.fileobj.sendto(answer(key.data, client), client)


def ask(kind, target, count, source, timeout):
    family, address = endpoint(target)
    for _ in range(count):
        with socket.socket(family, kind) as client:
            client.settimeout(timeout)
            try:
                if source:
                    client.bind(("", source))
                client.connect(address)
                if kind == socket.SOCK_DGRAM:
                    client.send(b"?")
                print(client.recv(128).decode())
            except OSError as error:
                print(type(error).__name__)


def main():
    arguments = argparse.ArgumentParser()
    commands = arguments.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve")
    server.add_argument("kind", choices=KINDS)
    server.add_argument("--peer", action="store_true")
    server.add_argument("endpoints", nargs="+")
    client = commands.add_parser("ask")
    client.add_argument("kind", choices=KINDS)
    client.add_argument("target")
    client.add_argument("count", type=int)
    client.add_argument("--from", type=int, dest="source")
    client.add_argument("--timeout", type=float, default=5)
    given = arguments.parse_args()
    if given.command == "serve":
        serve(KINDS[given.kind], given.endpoints, given.peer)
    else:
        ask(KINDS[given.kind], given.target, given.count, given.source, given.timeout)


if __name__ == "__main__":
    main()
