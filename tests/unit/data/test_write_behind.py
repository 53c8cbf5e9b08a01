import threading

import pytest

from library.data.write_behind import WriteBehind


def test_jobs_are_done_in_order_and_all_at_the_end_of_the_block() -> None:
    done: list[int] = []
    with WriteBehind() as writer:
        for number in range(50):
            writer.submit(done.append, number)
    assert done == list(range(50))


def test_the_caller_goes_on_until_enough_are_waiting() -> None:
    gate = threading.Event()
    submitted = []

    def submit_five(writer: WriteBehind) -> None:
        for number in range(5):
            writer.submit(gate.wait)
            submitted.append(number)

    with WriteBehind(depth=3) as writer:
        caller = threading.Thread(target=submit_five, args=(writer,))
        caller.start()
        caller.join(0.5)
        assert submitted == [0, 1, 2]  # the fourth waits for the first
        gate.set()
        caller.join(10)
        assert submitted == [0, 1, 2, 3, 4]


def test_an_error_is_raised_and_what_is_behind_it_dropped() -> None:
    gate = threading.Event()
    done: list[int] = []

    def fail() -> None:
        gate.wait()
        raise OSError("full")

    def at_the_end() -> None:
        with WriteBehind(depth=10) as writer:
            writer.submit(done.append, 1)
            writer.submit(fail)
            gate.set()

    def by_a_later_call() -> None:
        with WriteBehind(depth=1) as writer:
            writer.submit(fail)
            writer.submit(done.append, 2)
            raise AssertionError

    for raising in (at_the_end, by_a_later_call):
        with pytest.raises(OSError, match="full"):
            raising()
    assert done == [1]


def test_ctrl_c_finishes_the_job_that_has_begun_and_drops_the_others() -> None:
    begun, gate = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        begun.set()
        gate.wait()
        done.append("begun")

    def stop(writer: WriteBehind) -> None:
        writer.submit(slow)
        writer.submit(done.append, "waiting")
        begun.wait()
        threading.Timer(0.2, gate.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), WriteBehind() as writer:
        stop(writer)
    assert done == ["begun"]
    assert not any(thread.name.startswith("writer") for thread in threading.enumerate())
