#!/usr/bin/env python3
"""Long connections: servers that answer every line, and clients that speak when they are told to.

  lines.py serve ADDRESS:PORT...             answers each line with ADDRESS; to the line `later` once more, after two seconds
  lines.py clients COUNT NETWORK TARGET      COUNT connections to TARGET, each from an address of its own in NETWORK; for each
                                             line of its input, `speak` or `wait`, tells how many got their answer: each
                                             client speaks in turn, or waits for its server to speak
"""
import asyncio
import ipaddress
import random
import socket
import sys

LIMIT = 30  # seconds, of which a connection needs one or two


async def serve(endpoints):
    async def answer(reader, writer):
        name = writer.get_extra_info("sockname")[0].encode() + b"\n"
        while line := await reader.readline():
            writer.write(name)
            if line == b"later\n":
                await asyncio.sleep(2)
                writer.write(name)
        writer.close()

    for endpoint in endpoints:
        host, port = endpoint.rsplit(":", 1)
        await asyncio.start_server(answer, host, int(port))
    print("ready", flush=True)
    await asyncio.Event().wait()


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer, self.server = reader, writer, None

    @classmethod
    async def connect(cls, source, target):
        host, port = target.rsplit(":", 1)
        made = socket.socket()
        made.setblocking(False)
        # A sign of life after three seconds of silence: a gateway learns of a connection from its client.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            made.setsockopt(socket.IPPROTO_TCP, option, 3)
        made.bind((source, 0))
        await asyncio.get_running_loop().sock_connect(made, (host, int(port)))
        return cls(*await asyncio.open_connection(sock=made))

    async def heard(self):
        """True if the server of this connection, and no other, has answered."""
        try:
            line = await asyncio.wait_for(self.reader.readline(), LIMIT)
        except (OSError, asyncio.TimeoutError):
            return False
        self.server = self.server or line
        return line != b"" and line == self.server

    async def speak(self, text="hello"):
        self.writer.write(text.encode() + b"\n")
        return await self.heard()


async def clients(count, network, target):
    addresses = ipaddress.ip_network(network)
    made = [await Client.connect(str(addresses[number]), target) for number in range(1, count + 1)]
    for command in map(str.strip, iter(sys.stdin.readline, "")):
        random.shuffle(made)
        if command == "wait":
            answers = await asyncio.gather(*(client.heard() for client in made))
        else:
            answers = await asyncio.gather(*(client.speak(command) for client in made))
        print(sum(answers), flush=True)


def main():
    match sys.argv[1:]:
        case ["serve", *endpoints]:
            asyncio.run(serve(endpoints))
        case ["clients", count, network, target]:
            asyncio.run(clients(int(count), network, target))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
