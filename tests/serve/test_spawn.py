"""Workers are started before it is known what they serve; what was foreseen wrongly leaves nothing behind."""

from __future__ import annotations

import pytest

from litchi.cli import find_checkpoint, main
from litchi.serve import spawn
from litchi.serve.fleet import Fleet
from litchi.serve.spawn import Early, Spawned, early, foreseen, threads_of
from tests.serve.test_fleet import CONFIG, QUESTION, until


@pytest.fixture
def started(monkeypatch) -> list[Spawned]:
    """Every process that is started."""
    found, real = [], spawn.spawn

    def kept(threads: int) -> Spawned:
        found.append(real(threads))
        return found[-1]

    monkeypatch.setattr(spawn, "spawn", kept)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), (0, 1)),
        (("serve.workers=2",), (2, 1)),
        (("serve.workers=2", "serve.workers=3", "serve.port=0"), (3, 1)),
        (("serve.workers=2", "serve.tensor=2"), (2, 2)),
        (("serve.tensor=2",), (1, 2)),
        (("serve.workers=two",), (0, 1)),
        (("serve.workers=-1",), (0, 1)),
        (("serve.workers=99999999999",), (0, 1)),
        (("serve.workers=\u00b2",), (0, 1)),
        (("serve.tensor=0", "serve.workers=2"), (0, 1)),
        (("workers=2", "serve", "=", ""), (0, 1)),
    ],
)
def test_the_command_line_says_how_many_there_will_be(settings, expected, tmp_path) -> None:
    assert foreseen(tmp_path, settings) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"serve": {"workers": 2}}', (2, 1)), ('{"serve": {"workers": "x"}}', (0, 1)), ("[]", (0, 1)), ("{", (0, 1))],
)
def test_so_does_the_run_that_made_a_checkpoint(text: str, expected, tmp_path) -> None:
    (tmp_path / "run.json").write_text(text)
    assert foreseen(tmp_path, ()) == expected
    assert foreseen(tmp_path, ["serve.workers=0"]) == (0, 1)


def test_who_is_not_taken_is_ended(tmp_path, started, monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with early(tmp_path, ["serve.workers=40"]) as found:
        assert len(started) == 2, "at most one a core"
        assert found.take(threads_of(40, 1) + 1) is None, "it was started with another number of threads"
        taken = found.take(threads_of(40, 1))
        assert taken is not None and taken.process.poll() is None
    assert found.take(threads_of(40, 1)) is None
    assert [each.process.returncode is None for each in started] == [each is taken for each in started]
    taken.end.close()  # nobody will tell it anything
    assert taken.process.wait(60) == 0


@pytest.mark.parametrize("setting", ["serve.port=70000", 'serve.envs=["kitchen"]', "serve.wrokers=2"])
def test_a_server_that_is_refused_leaves_no_process(setting: str, started, capsys) -> None:
    assert main(["serve", "tiny", "--set", "serve.workers=2", "--set", setting]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert started and all(each.process.returncode is not None for each in started)


def test_a_checkpoint_that_is_not_there_starts_none(started, capsys) -> None:
    assert main(["serve", "nowhere", "--set", "serve.workers=2"]) == 2
    assert not started


def test_where_no_process_is_to_be_had_none_waits(monkeypatch) -> None:
    def none(threads: int) -> Spawned:
        raise OSError("no memory")

    monkeypatch.setattr(spawn, "spawn", none)
    assert not Early(2, 1).waiting


def test_early_workers_answer_and_one_that_died_is_replaced(started) -> None:
    """Two wait and one of them has been killed: what it was told to serve another is told."""
    threads = threads_of(CONFIG.workers, CONFIG.tensor)
    found = Early(CONFIG.workers, threads)
    waited = [each.process for each in started]
    assert len(waited) == CONFIG.workers == 2
    spawn.end(waited[0])
    fleet = Fleet(find_checkpoint("tiny"), CONFIG, found).start()
    try:
        assert not found.waiting
        assert fleet.complete(QUESTION).text
        until(lambda: sum(member.ready for member in fleet.members) == 2)
        processes = [member.process for member in fleet.members]
        assert waited[1] in processes and waited[0] not in processes and fleet.restarts == 1
    finally:
        fleet.close()
    assert all(process.returncode is not None for process in waited)
