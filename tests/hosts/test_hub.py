"""What the hub tells of processes that come, are silent, break off, fail and leave."""

import socket
from contextlib import suppress

import pytest

from advmoe_jax.hosts import hub
from advmoe_jax.hosts.hub import Hub, Line


@pytest.fixture
def meet():
    """(count, silence) -> what opens a line as a process of that number."""
    opened = []

    def create(count, silence=hub.SILENCE, service=1):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        opened.append(Hub(port, count, service, silence))

        def come(index, of=count):
            line = Line(socket.create_connection(("localhost", port), timeout=60))
            opened.append(line.connection)
            line.say("P", f"{index} {of} host{index}")
            return line, (said for said in line.heard() if said[0] != "beat")

        create.port = port
        return come

    yield create
    for one in opened[::-1]:
        one.close(0) if isinstance(one, Hub) else one.close()


def test_all_begin_once_all_have_come_and_end_once_all_are_through(meet):
    come = meet(2)
    (first, one), (second, two) = come(0), come(1)
    assert next(one) == next(two) == ("start", "")
    first.say("through")
    second.say("through")
    assert next(one) == next(two) == ("done", "")
    second.connection.close()  # nobody is lost any more
    first.say("bye")
    assert next(one, None) is None


def test_all_stop_at_the_step_after_the_furthest_ones(meet):
    come = meet(3)
    lines, heard = zip(*(come(index) for index in range(3)), strict=True)
    assert [next(said) for said in heard] == [("start", "")] * 3
    lines[1].say("stop")
    lines[2].say("stop")  # told as well: nothing is asked twice
    assert [next(said) for said in heard] == [("steps", "")] * 3
    for line, steps in zip(lines, (4, 7, 6), strict=True):
        line.say("steps", str(steps))
    assert [next(said) for said in heard] == [("stop", "8")] * 3


def test_who_cannot_be_one_of_them_is_refused(meet):
    come = meet(2)
    come(0)
    assert next(come(0)[1]) == ("refused", "there is a process 0 already")
    assert next(come(2)[1]) == ("refused", "there is a process 2 already")
    assert next(come(1, of=3)[1]) == ("refused", "the first process is one of 2, this of 3")
    with socket.create_connection(("localhost", meet.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(60)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_one_whose_line_breaks_is_lost_for_all_others(meet):
    come = meet(3)
    lines = [come(index) for index in range(3)]
    assert [next(said) for _, said in lines] == [("start", "")] * 3
    lines[1][0].connection.shutdown(socket.SHUT_RDWR)
    for index in (0, 2):
        assert next(lines[index][1]) == ("lost", f"75 process 1 of 3 on host1 {hub.GONE}")


def test_one_that_is_silent_is_lost(meet):
    come = meet(1, silence=0.1)
    said = come(0)[1]
    assert [next(said), next(said)] == [
        ("start", ""),
        ("lost", f"75 process 0 of 1 on host0 {hub.silent(0.1)}"),
    ]


def test_one_that_fails_says_why_and_with_which_code(meet):
    come = meet(2)
    (_, one), (second, two) = come(0), come(1)
    assert next(one) == next(two) == ("start", "")
    second.say("failed", "2 disk\nfull")
    second.connection.shutdown(socket.SHUT_RDWR)
    assert next(one) == ("lost", "2 process 1 of 2 on host1 has ended: disk full")


def test_a_tunnel_hands_on_both_ways(meet):
    with socket.create_server(("127.0.0.1", 0)) as service:
        meet(1, service=service.getsockname()[1])
        with socket.create_connection(("localhost", meet.port), timeout=60) as here:
            here.sendall(b"Tquestion")
            there, _ = service.accept()
            with there:
                assert there.recv(8) == b"question"
                there.sendall(b"answer")
                assert here.recv(6) == b"answer"
