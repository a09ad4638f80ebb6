#!/usr/bin/env python3
"""Servers that die and come back at a word, and a client that connects steadily: for the tests and benchmarks of health checks.

  switched.py serve
      obeys lines of standard input, and answers each with the time (CLOCK_MONOTONIC) at which it was done:
      up ADDRESS:PORT...     answers every connection with ADDRESS
      down ADDRESS:PORT...   nobody listens any more
      reset ADDRESS:PORT...  accepts, and resets
  switched.py load ADDRESS:PORT RATE SECONDS
      makes RATE connections a second, whatever becomes of them; prints for each the time at which it began, the time that
      it took, and the answer or the error
"""
import collections
import errno
import os
import select
import socket
import struct
import sys
import time

LIMIT = 4.0  # seconds that a connection may take
ERRORS = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset"}


def endpoint(text):
    host, port = text.rsplit(":", 1)
    host = host.strip("[]")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))


def serve():
    poll = select.epoll()
    poll.register(0, select.EPOLLIN)
    open_, listeners, unread = {}, {}, b""

    def close(name):
        if name in open_:
            listener, _ = open_.pop(name)
            del listeners[listener.fileno()]
            listener.close()

    def obey(word, *names):
        for name in names:
            close(name)
            if word != "down":
                family, address = endpoint(name)
                listener = socket.create_server(address, family=family, backlog=4096)
                listener.setblocking(False)
                open_[name] = listener, word
                listeners[listener.fileno()] = name
                poll.register(listener, select.EPOLLIN)
        print(time.monotonic(), flush=True)

    while True:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                text = os.read(0, 65536)
                if not text:
                    return
                *lines, unread = (unread + text).split(b"\n")
                for line in lines:
                    obey(*line.decode().split())
            elif descriptor in listeners:
                name = listeners[descriptor]
                listener, word = open_[name]
                for _ in range(64):
                    try:
                        connection, _ = listener.accept()
                    except BlockingIOError:
                        break
                    try:
                        if word == "reset":
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        else:
                            connection.send(name.encode())
                    except OSError:
                        pass
                    connection.close()


def load(target, rate, seconds):
    family, address = endpoint(target)
    poll = select.epoll()
    running, order, done = {}, collections.deque(), []
    first = time.monotonic()
    count, total = 0, int(rate * seconds)

    def end(descriptor, answer):
        client, began, _ = running.pop(descriptor)
        client.close()
        done.append((began, time.monotonic() - began, answer))

    def start():
        client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        began = time.monotonic()
        client.connect_ex(address)
        running[client.fileno()] = client, began, count
        order.append((client.fileno(), count, began))
        poll.register(client, select.EPOLLIN)

    while count < total or running:
        now = time.monotonic()
        while count < total and first + count / rate <= now:
            start()
            count += 1
        while order and order[0][2] + LIMIT <= now:
            descriptor, number, _ = order.popleft()
            if descriptor in running and running[descriptor][2] == number:
                end(descriptor, "timeout")
        pause = first + count / rate - time.monotonic() if count < total else 0.05
        for descriptor, _ in poll.poll(max(pause, 0)):
            try:
                answer = running[descriptor][0].recv(128).decode() or "closed"
            except BlockingIOError:
                continue
            except OSError as error:
                answer = ERRORS.get(error.errno, os.strerror(error.errno))
            end(descriptor, answer)
    for began, took, answer in sorted(done):
        print(f"{began:.6f} {took:.6f} {answer.replace(' ', '_')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    elif sys.argv[1:2] == ["load"]:
        load(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
    else:
        sys.exit(__doc__)
