"""python -m pytest -q extras"""

import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image

from cabins import InputError
from extras import curves

LOG = "step,epoch,loss,bins,lr\n10,0.5,2.5,3.0,0.001\n20,1.0,1.5,2.0,0.002\n"
METRICS = "step,epoch,abs_rel,d1\n20,1,0.4,0.5\n"


def make_run(folder, log=LOG, metrics=METRICS):
    folder.mkdir()
    (folder / "log.csv").write_text(log)
    (folder / "metrics.csv").write_text(metrics)
    return folder


def test_a_curve_is_a_column_over_the_epochs_without_a_row_that_was_cut(tmp_path):
    log = make_run(tmp_path / "a", log=LOG + "30,1.5,0.") / "log.csv"
    assert curves.read_curve(log, "loss") == ([0.5, 1.0], [2.5, 1.5])
    assert curves.read_curve(log.with_name("metrics.csv"), "d1") == ([1.0], [0.5])


def test_each_run_gets_its_figure_and_a_missing_file_is_one_sentence(tmp_path, monkeypatch, capsys):
    good, new = make_run(tmp_path / "good"), make_run(tmp_path / "new")
    (new / "metrics.csv").unlink()  # the first validation has not ended
    monkeypatch.setattr(sys, "argv", ["curves", str(good), str(new), str(tmp_path / "none")])
    with pytest.raises(InputError, match="none/log.csv is missing"):
        curves.main()
    for folder in (good, new):
        with Image.open(folder / "curves.png") as figure:
            assert min(figure.size) > 300
    good_line, new_line = capsys.readouterr().out.splitlines()
    assert "missing" not in good_line and "metrics.csv" in new_line


def test_panels_show_the_columns_of_the_tables(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.extend(figure.axes))
    curves.draw_curves(make_run(tmp_path / "a"))
    lines = {axis.get_title(): axis.lines[0].get_xydata().tolist() for axis in shown}
    assert lines["loss"] == [[0.5, 2.5], [1.0, 1.5]]
    assert (lines["abs_rel"], lines["d1"]) == ([[1.0, 0.4]], [[1.0, 0.5]])
