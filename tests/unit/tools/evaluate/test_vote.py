"""Blind votes: what a person is shown, what is kept, who may vote, and what it comes to."""

import errno
import json
import os
import threading
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import pandas as pd
import pytest

from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from tools.evaluate.vote import VoteServer, main, show_result
from tools.evaluate.voting import Ballot, read_votes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pairs whose videos are their own names."""
    rows = []
    for index in range(8):
        row = {"pair": f"{index:04d}", "prompt": f"prompt {index}"}
        for side in "ab":
            path = tmp_path / side / f"{index}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{side}{index}")
            row[side] = str(path)
        rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    return tmp_path


@pytest.fixture
def server(folder):
    found = VoteServer(Ballot(folder), 0)
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def ask(server: VoteServer, path: str, vote: dict | None = None, host: str | None = None) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    headers = {"Host": host} if host else {}
    connection.request("POST" if vote else "GET", path, json.dumps(vote) if vote else None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_person_votes_through(server, folder):
    status, page = ask(server, "/")
    assert status == 200
    assert server.token in page.decode()
    shown = []
    while pair := (state := json.loads(ask(server, "/next?rater=Ann")[1])).get("pair"):
        assert state["done"] == len(shown)
        sides = [
            ask(server, "/video?" + urlencode({"rater": "Ann", "pair": pair, "side": s}))[1] for s in ("left", "right")
        ]
        assert sorted(sides) == [f"a{int(pair)}".encode(), f"b{int(pair)}".encode()]
        shown.append((pair, sides[0][:1]))
        vote = {"token": server.token, "rater": "Ann", "pair": pair, "seconds": 2.5}
        choice = "left" if sides[0].startswith(b"b") else "right"  # B is always better
        assert json.loads(ask(server, "/vote", {**vote, "choice": choice})[1]) == {"kept": True}
        assert json.loads(ask(server, "/vote", {**vote, "choice": "tie"})[1]) == {"kept": False}  # once only
    assert [pair for pair, _ in shown] != sorted(pair for pair, _ in shown)  # an order of her own
    assert {left for _, left in shown} == {b"a", b"b"}  # on either side
    votes = read_votes(folder / "votes.csv")
    assert {vote.outcome for vote in votes} == {1.0}
    again = Ballot(folder)  # after a restart
    assert again.next("Ann") is None
    assert again.next("Bob") is not None
    assert again.order("Bob") != again.order("Ann")
    assert (again.result().wins, again.result().rate.mean) == (8, 1)


def test_a_full_disk_costs_one_vote(server, folder, monkeypatch, capsys):
    state = json.loads(ask(server, "/next?rater=Ann")[1])
    vote = {"token": server.token, "rater": "Ann", "pair": state["pair"], "choice": "tie", "seconds": 1}
    assert ask(server, "/vote", vote)[0] == 200
    before = (folder / "votes.csv").read_bytes()

    def write(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    assert ask(server, "/vote", {**vote, "rater": "Ben"})[0] == 507
    monkeypatch.undo()
    assert "a vote cannot be kept: " in capsys.readouterr().err
    assert (folder / "votes.csv").read_bytes() == before
    assert ask(server, "/vote", {**vote, "rater": "Ben"}) == (200, b'{"kept": true}')
    assert [vote.rater for vote in read_votes(folder / "votes.csv")] == ["Ann", "Ben"]
    assert not [*folder.glob(".unfinished*")]


def test_one_server_takes_the_votes(folder):
    with claimed(folder / "votes.csv", is_folder=False), pytest.raises(UserError, match=r"votes\.csv is in use"):
        main([str(folder), "--port", "0"])


def test_who_may_not_vote(server, folder):
    vote = {"token": server.token, "rater": "Ann", "pair": "0000", "choice": "left", "seconds": 1}
    assert ask(server, "/vote", {**vote, "token": "guessed"})[0] == 403
    assert ask(server, "/vote", vote, host="evil.example:80")[0] == 403
    assert ask(server, "/vote", {"pair": "0000"})[0] == 400
    for wrong in ({"choice": "both"}, {"pair": "9999"}, {"rater": ""}, {"rater": "x" * 41}):
        assert json.loads(ask(server, "/vote", {**vote, **wrong})[1]) == {"kept": False}
    for path in ("/video?rater=Ann&pair=..%2Fx&side=left", "/video?rater=Ann&pair=0000&side=up", "/pairs.csv", "/../x"):
        assert ask(server, path)[0] == 404
    assert ask(server, "/", host="evil.example:80")[0] == 403
    assert not (folder / "votes.csv").exists()


def test_results_and_damaged_tables(folder, capsys):
    with pytest.raises(UserError, match="no votes yet"):
        main([str(folder), "--result"])
    ballot = Ballot(folder)
    for rater in ("Ann", "Bob, jr."):
        for pair in list(ballot.files)[:4]:
            ballot.vote(rater, pair, "tie" if pair == "0003" else "left", 1.0)
    show_result(Ballot(folder))
    assert "2 for neither (Ann 4, Bob, jr. 4)" in capsys.readouterr().out
    (folder / "votes.csv").write_text("rater,pair,left,choice,seconds,time\nAnn,0000,c,left,1,1\n")
    with pytest.raises(UserError, match=r"votes.csv, row 2: no vote"):
        Ballot(folder)
    (folder / "a" / "3.mp4").unlink()
    with pytest.raises(UserError, match="not there any more"):
        Ballot(folder)
    with pytest.raises(UserError, match=r"compare.py A B --out"):
        Ballot(folder / "a")
