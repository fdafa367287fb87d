"""The queue: order, ownership by attempt, recovery, counts."""

import threading

import pytest

from opensora.serving.jobs import CANCELLED, COMPLETED, FAILED, IN_PROGRESS, QUEUED, Gone, JobStore, QueueFull, new_id
from opensora.utils.errors import UserError


@pytest.fixture
def store(tmp_path):
    made = JobStore(tmp_path / "jobs.sqlite")
    yield made
    made.close()


def add(store, shape="a", owner="", limit=100):
    return store.add(new_id(), owner, shape, {"prompt": "p"}, {"seed": 1}, 4, limit)


def test_jobs_are_taken_in_the_order_of_their_arrival(store):
    jobs = [add(store) for _ in range(3)]
    assert [store.take()[0].id for _ in jobs] == [job.id for job in jobs]
    assert store.take() == []


def test_a_batch_has_one_shape_and_starts_with_the_first(store):
    first, other, same, later = add(store), add(store, "b"), add(store), add(store)
    assert [job.id for job in store.take(2)] == [first.id, same.id]
    assert [job.id for job in store.take(5)] == [other.id]
    assert [job.id for job in store.take(5)] == [later.id]


def test_jobs_outlive_their_store(store, tmp_path):
    job = add(store, owner="me")
    again = JobStore(tmp_path / "jobs.sqlite")
    assert again[job.id] == job
    assert again.take()[0].attempts == 1
    assert store[job.id].status == IN_PROGRESS  # seen by the other one


def test_progress_is_percent_and_full_only_when_completed(store):
    add(store)
    (job,) = store.take()
    store.advance(job, 3, 4)
    assert store[job.id].progress == 75
    store.advance(job, 4, 4)
    assert store[job.id].progress == 99
    store.complete(job, {"text": "t"}, {"decode": 0.5})
    assert (store[job.id].progress, store[job.id].status) == (100, COMPLETED)
    assert store[job.id].facts == {"seed": 1, "text": "t"}


@pytest.mark.parametrize("end", ["cancel", "remove"])
def test_a_worker_learns_that_nobody_wants_its_job(store, end):
    add(store)
    (job,) = store.take()
    getattr(store, end)(job.id)
    for write in (
        lambda: store.advance(job, 1, 4),
        lambda: store.complete(job, {}, {}),
        lambda: store.fail(job, "", ""),
    ):
        with pytest.raises(Gone):
            write()
    assert store.get(job.id) is None or store[job.id].status == CANCELLED


def test_a_finished_job_is_not_cancelled(store):
    add(store)
    (job,) = store.take()
    store.complete(job, {}, {})
    assert not store.cancel(job.id)
    assert store[job.id].status == COMPLETED


def test_a_crash_starts_a_job_again_once_and_in_its_place(store):
    job, waiting = add(store), add(store)
    store.take()
    store.recover()
    assert (store[job.id].status, store[job.id].step) == (QUEUED, 0)
    (again,) = store.take()
    assert (again.id, again.attempts) == (job.id, 2)
    store.recover()
    assert store[job.id].status == FAILED
    assert store[job.id].error["code"] == "worker_ended"
    assert store[waiting.id].status == QUEUED
    assert store.totals("failures") == {"worker_ended": 1}


def test_what_an_earlier_attempt_writes_is_refused(store):
    add(store)
    (first,) = store.take()
    store.recover()
    (second,) = store.take()
    with pytest.raises(Gone):
        store.complete(first, {}, {})
    store.complete(second, {}, {})


def test_a_stop_does_not_count_as_an_attempt(store):
    for _ in range(4):
        job = add(store) if not store.ids() else store[next(iter(store.ids()))]
        assert store.take()[0].attempts == 1
        store.give_back()
    assert store[job.id].status == QUEUED


def test_a_full_queue_takes_no_more(store):
    add(store, limit=1)
    with pytest.raises(QueueFull, match="1 jobs are waiting"):
        add(store, limit=1)
    store.take()
    add(store, limit=1)


def test_pages_follow_each_other(store):
    jobs = [add(store, owner=owner) for owner in "abab"]
    newest = store.page(2)
    assert [job.id for job in newest] == [jobs[3].id, jobs[2].id]
    assert [job.id for job in store.page(9, newest[-1])] == [jobs[1].id, jobs[0].id]
    assert [job.id for job in store.page(2, jobs[0], newest_first=False)] == [jobs[1].id, jobs[2].id]
    assert [job.id for job in store.page(9, owner="a")] == [jobs[2].id, jobs[0].id]


def test_places_in_the_queue(store):
    jobs = [add(store) for _ in range(3)]
    assert [store.place(job) for job in jobs] == [0, 1, 2]
    store.take()
    assert store.place(jobs[2]) == 2  # one runs, one waits


def test_many_threads_lose_and_double_nothing(store, tmp_path):
    taken, lock = [], threading.Lock()

    def work():
        own = JobStore(tmp_path / "jobs.sqlite")
        for _ in range(20):
            add(own)
        while jobs := own.take(3):
            with lock:
                taken.extend(job.id for job in jobs)
            for job in jobs:
                own.complete(job, {}, {"decode": 1.0})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 80
    assert store.counts()[COMPLETED] == 80
    assert store.totals("stage_seconds") == {"decode": 80}


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"text" * 200)
    with pytest.raises(UserError, match="cannot be opened as the database"):
        JobStore(tmp_path / "jobs.sqlite")
