"""Rows survive kills, are never written twice, and a bar of progress tells the truth."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litchi import record
from litchi.config import BadInput
from litchi.record import (
    METRICS,
    Progress,
    Recorder,
    append,
    clock,
    drop_torn_line,
    need,
    progress_line,
    read,
    require,
    table,
)

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
rows = st.lists(st.dictionaries(st.text(min_size=1), values, max_size=4), max_size=6)


def steps(folder):
    return [row["step"] for row in read(folder)]


@given(rows=rows)
def test_rows_come_back_as_they_were_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("run")
    recorder = Recorder(folder)
    for step, row in enumerate(rows):
        recorder.write(step, row)
    assert read(folder / METRICS) == read(folder) == [{"step": step, **row} for step, row in enumerate(rows)]


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_torn_line_costs_that_row_alone(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    path = folder / METRICS
    for step in range(4):
        Recorder(folder).write(step, {"loss": 0.5, "name": "é\n"})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    survivors = whole[:cut].count(b"\n")
    assert steps(folder) == list(range(survivors))
    Recorder(folder).write(9, {})
    assert steps(folder) == [*range(survivors), 9]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    append(tmp_path / METRICS, b'{"step": 0}\n{"st\n[1]\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl:2 is not JSON"):
        read(tmp_path)


def test_a_missing_file_has_no_rows_and_nothing_to_mend(tmp_path):
    drop_torn_line(tmp_path / METRICS)
    assert read(tmp_path / METRICS) == read(tmp_path) == []


@given(written=st.lists(st.integers(0, 20), max_size=10), step=st.integers(0, 21))
def test_a_rewound_run_writes_no_row_twice(tmp_path_factory, written, step):
    folder = tmp_path_factory.mktemp("run")
    recorder = Recorder(folder)
    for s in written:
        recorder.write(s, {})
    recorder.rewind(step)
    assert steps(folder) == [s for s in written if s < step]
    recorder.write(step, {})
    assert steps(folder)[-1] == step


def test_a_killed_process_leaves_whole_rows(tmp_path):
    endless = """
import sys
from pathlib import Path
from litchi.record import Recorder
recorder, step = Recorder(Path(sys.argv[1])), 0
while True:
    recorder.write(step, {"text": "x" * 500})
    step += 1
    if step == 50:
        print("going", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", endless, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    found = steps(tmp_path)
    assert len(found) >= 50 and found == list(range(len(found)))


def test_numbers_of_other_libraries_become_floats(tmp_path):
    numpy = pytest.importorskip("numpy")
    Recorder(tmp_path).write(1, {"loss": numpy.float32(0.5)})
    assert read(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_progress_in_a_log_is_plain_lines(capsys):
    with Progress(4, "train", done=2, every=0.0) as progress:
        progress.advance(note="text 0.5")
        progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train 3/4 (75%) ") and lines[0].endswith("left; text 0.5")
    assert lines[-1].startswith("train 4/4 (100%) ") and "left" not in lines[-1]


def test_progress_is_quiet_between_its_lines(capsys):
    with Progress(100, "train", every=3600.0) as progress:
        for _ in range(100):
            progress.advance()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_rate_counts_only_this_process():
    progress = Progress(400, "train", done=100)
    progress.done = 120
    assert progress_line(progress, 20, 8.0, "") == "train 120/400 (30%) 2.5/s, 1m52s left"
    assert progress_line(Progress(None, "read", done=7), 7, 14.0, "") == "read 7 2s each"
    assert progress_line(Progress(0, "read"), 0, 1.0, "") == "read 0/0 (0%) 0/s"


def test_times_read_as_people_say_them():
    assert [clock(s) for s in (0, 59.6, 112, 3600, 11_220)] == ["0s", "1m00s", "1m52s", "1h00m", "3h07m"]


def test_a_table_is_aligned_and_cuts_nothing(capsys):
    table("Scores", ["task", "score"], [["[b]draw[/b]", 0.51234], ["x" * 300, 12.0]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("[b]draw[/b]") and line.endswith("0.5123") for line in lines)
    assert any("x" * 300 in line for line in lines)
    ends = [len(line) for line in lines if line.endswith(("0.5123", "12"))]
    assert len(set(ends)) == 1


def test_a_missing_extra_names_the_command():
    with pytest.raises(BadInput, match=r"litchi_nowhere needs the extra 'serve': pip install 'litchi\[serve\]'"):
        need("serve", "litchi_nowhere")
    assert need("serve", "litchi.record") is record
    with pytest.raises(BadInput, match=r"litchi_nowhere needs the extra 'serve': pip install 'litchi\[serve\]'"):
        require("serve", "this", "litchi_nowhere")
    assert "this" not in sys.modules, "it was looked for only"


def test_tensorboard_shows_the_rows(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'litchi[board]'")
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.write(1, {"loss": 0.5, "name": "text is left out"})
    recorder.rewind(1)
    recorder.write(1, {"loss": 0.25})
    assert list((tmp_path / "tensorboard").glob("events.*"))
