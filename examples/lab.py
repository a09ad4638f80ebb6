#!/usr/bin/env python3
"""Servers that say who they are, and a client that asks them: for the demo and the tests.

  lab.py serve tcp|udp|sctp [--peer] ADDRESS:PORT...
      answers every connection with ADDRESS, and with --peer also with the address it comes from
  lab.py ask tcp|udp|sctp ADDRESS:PORT COUNT [--from PORT] [--timeout SECONDS]
      makes COUNT connections, one after the other, and prints a line with each answer

IPv6 addresses go in brackets: [fd00::1]:80. Of SCTP, which few kernels have sockets for, it is the first packet of an
association and the answer to it (RFC 9260, 3.3.2 and 3.3.3), through raw sockets.
"""
import argparse
import contextlib
import random
import selectors
import socket
import struct
import time

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "sctp": socket.SOCK_RAW}
INIT, INIT_ACK = 1, 2


def endpoint(text):
    host, port = text.rsplit(":", 1)
    host = host.strip("[]")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))


def crc32c(data):
    rest = 0xFFFFFFFF
    for byte in data:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0x82F63B78 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


def with_checksum(packet):
    return packet[:8] + struct.pack("<I", crc32c(packet[:8] + bytes(4) + packet[12:])) + packet[12:]


def sctp(ports, tag, kind, text):
    """A packet with one chunk, INIT or INIT ACK, and in it a parameter with a text."""
    parameter = struct.pack("!HH", 0xC001, 4 + len(text)) + text + bytes(-len(text) % 4)
    chunk = struct.pack("!BBHIIHHI", kind, 0, 20 + len(parameter), 1, 65_536, 1, 1, 1) + parameter
    return with_checksum(struct.pack("!HHII", *ports, tag, 0) + chunk)


def read_sctp(family, packet):
    """The ports, the chunk's kind and its text; None unless it is whole and the checksum right."""
    packet = packet[(packet[0] & 15) * 4:] if family == socket.AF_INET else packet
    if len(packet) < 36 or with_checksum(packet) != packet:
        return None
    length = struct.unpack("!H", packet[34:36])[0]
    return struct.unpack("!HH", packet[:4]), packet[12], packet[36:32 + length]


def opened(family, kind, address):
    """A raw socket has an address, but no port."""
    found = socket.socket(family, kind, socket.IPPROTO_SCTP if kind == socket.SOCK_RAW else 0)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if address:
        found.bind((address[0], 0) if kind == socket.SOCK_RAW else address)
    return found


def serve(kind, endpoints, peer):
    selector = selectors.DefaultSelector()
    for family, address in map(endpoint, endpoints):
        server = opened(family, kind, address)
        if kind == socket.SOCK_STREAM:
            server.listen(1024)
        selector.register(server, selectors.EVENT_READ, address)
    print("ready", flush=True)

    def answer(name, client):
        return f"{name} from {client[0]}".encode() if peer else name.encode()

    while True:
        for key, _ in selector.select():
            name, port = key.data[:2]
            if kind == socket.SOCK_STREAM:
                connection, client = key.fileobj.accept()
                with connection, contextlib.suppress(ConnectionError):  # a check resets its connection
                    connection.sendall(answer(name, client))
                continue
            data, client = key.fileobj.recvfrom(256)
            reply = answer(name, client)
            if kind == socket.SOCK_RAW:
                asked = read_sctp(key.fileobj.family, data)
                if not asked or asked[0][1] != port or asked[1] != INIT:
                    continue
                reply = sctp((port, asked[0][0]), 1, INIT_ACK, reply)
            key.fileobj.sendto(reply, client)


def ask_sctp(family, address, source, timeout):
    deadline = time.monotonic() + timeout
    with opened(family, socket.SOCK_RAW, None) as client:
        client.sendto(sctp((source, address[1]), 0, INIT, b"?"), (address[0], 0))
        while True:
            client.settimeout(max(deadline - time.monotonic(), 0.001))
            answer = read_sctp(family, client.recv(256))
            if answer and answer[0] == (address[1], source) and answer[1] == INIT_ACK:
                return answer[2].decode()


def ask(kind, target, count, source, timeout):
    family, address = endpoint(target)
    if kind == socket.SOCK_RAW:
        first = random.randrange(32_768, 60_000)
        for number in range(count):
            port = source or first + number
            try:
                print(ask_sctp(family, address, port, timeout))
            except OSError as error:
                print(type(error).__name__)
        return
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
