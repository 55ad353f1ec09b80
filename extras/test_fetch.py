"""Fetching, from a server on this machine: python -m pytest -q extras/test_fetch.py"""

import functools
import hashlib
import http.server
import importlib.util
import io
import os
import re
import socket
import struct
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import data
from cabins import InputError
from extras import fetch as fetching

pytest.importorskip("remotezip", reason="remotezip, which is optional, is not installed")
pytest.importorskip("h5py", reason="h5py, which is optional, is not installed")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` by ranges. `faults`: by the end of a path, what goes wrong and how often."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    files: ClassVar[dict[str, bytes]]
    faults: ClassVar[dict[str, list]]
    asked: ClassVar[list[tuple[str, str | None]]]
    connections: ClassVar[list]
    headers_seen: ClassVar[set[str]]
    is_waiting: ClassVar[threading.Event]  # "waits" sends a half, sets this event,
    until: ClassVar[threading.Event]  # and sends the rest after this one

    def setup(self):
        self.connections.append(self.client_address)
        super().setup()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append((self.path, asked := self.headers.get("Range")))
        self.headers_seen.add(self.headers.get("x-oss-range-behavior"))
        content = self.files.get(self.path)
        fault = next((f for end, f in self.faults.items() if self.path.endswith(end)), ["", 0])
        kind = fault[0] if fault[1] else ""
        if content is None or kind in ("404", "503"):
            self.send_response(503 if kind == "503" else 404)
            fault[1] -= 1
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start, end = 0, len(content) - 1
        if asked and kind != "no ranges":
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(end, int(last)) if first and last else end
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        else:
            self.send_response(200)
        part = content[start : end + 1]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        half = len(part) // 2
        if kind == "breaks":
            fault[1] -= 1
            self.wfile.write(part[:half])
            self.close_connection = True
        elif kind == "resets":
            self.wfile.write(part[:half])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with RST
            self.close_connection = True
        elif kind == "waits":
            fault[1] -= 1
            self.wfile.write(part[:half])
            self.is_waiting.set()
            self.until.wait(20)
            self.wfile.write(part[half:])
        elif kind == "wrong bytes" and end < len(content) - 1:
            self.wfile.write(bytes(b ^ 1 for b in part))
        else:
            self.wfile.write(part)


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def picture_bytes(height: int, width: int, depth: int | None = None) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(height + (depth or 0))
    if depth is None:
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "png")
    else:
        values = rng.integers(depth // 2, depth + 1, (height, width)).astype(np.uint16)
        Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


@functools.cache
def served() -> dict[str, bytes]:
    """Small archives in the layouts of the real ones, by path."""
    depth = "2011_09_26_drive_000{}_sync/proj_depth/groundtruth/{}/000000000{}.png"
    files = {}
    for drive, number in ((1, 5), (2, 7)):
        name = f"2011_09_26_drive_000{drive}"
        members = {
            f"2011_09_26/{name}_sync/{camera}/data/000000000{n}.png": picture_bytes(376 - n, 1242)
            for camera in ("image_02", "image_03")
            for n in (number, number + 1)
        }
        files[f"/raw/{name}/{name}_sync.zip"] = archive_of(members)
    members = {
        f"train/{depth.format(1, 'image_02', 5)}": picture_bytes(371, 1242, 5000),
        f"train/{depth.format(1, 'image_03', 5)}": picture_bytes(371, 1242, 9),
        f"val/{depth.format(2, 'image_02', 7)}": picture_bytes(369, 1242, 7000),
        "../../evil/rgb_9.jpg": b"evil",
    }
    files["/depth/data_depth_annotated.zip"] = archive_of(members)
    members = {}
    for i in range(3):
        members[f"sync/kitchen/rgb_0000{i}.jpg"] = picture_bytes(480, 640)
        members[f"sync/kitchen/sync_depth_0000{i}.png"] = picture_bytes(480, 640, 2000 + i)
    files["/sync.zip"] = archive_of(members | {"../../evil/rgb_9.jpg": b"evil"})
    files["/nyu.mat"] = np.random.default_rng(0).bytes(300_000)
    return files


DRIVES = ["2011_09_26/2011_09_26_drive_000{0}_sync/image_02/data/000000000{1}.jpg"]
DRIVES += ["2011_09_26_drive_000{0}_sync/proj_depth/groundtruth/image_02/000000000{1}.png"]
KITTI_LIST = "".join(" ".join(DRIVES).format(*n) + " 721.5\n" for n in ((1, 5), (2, 7)))
KITTI_LIST += DRIVES[0].format(2, 8) + " None 721.5\n"
PAIR = "/kitchen/rgb_0000{0}.jpg /kitchen/sync_depth_0000{0}.png 518.8579\n"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What is served, what was asked for, and what goes wrong; two lists of some of the files."""
    files = dict(served())
    state = {"faults": {}, "asked": [], "connections": [], "headers_seen": set()}
    state |= {"is_waiting": threading.Event(), "until": threading.Event()}
    handler = type("Handler", (Server,), {"files": files, **state})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{httpd.server_port}"
    sources = {
        "nyu_train": f"{url}/sync.zip",
        "nyu_test": f"{url}/nyu.mat",
        "kitti_raw": url + "/raw/{drive}/{drive}_sync.zip",
        "kitti_depth": f"{url}/depth/data_depth_annotated.zip",
    }
    assert sources.keys() == fetching.SOURCES.keys()
    monkeypatch.setattr(fetching, "SOURCES", sources)
    monkeypatch.setattr(fetching, "WAIT", 0.01)
    md5 = hashlib.md5(files["/nyu.mat"], usedforsecurity=False).hexdigest()
    monkeypatch.setattr(fetching, "NYU_MAT_MD5", md5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    lists = {"train": PAIR.format(0) + PAIR.format(2), "test": PAIR.format(1)}
    for part, text in lists.items():
        (tmp_path / f"kitti_{part}.txt").write_text(KITTI_LIST)
        (tmp_path / f"nyu_{part}.txt").write_text(text)
    yield handler
    httpd.shutdown()
    httpd.server_close()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fetch(name: str, folder: Path) -> dict[str, bytes]:
    lists = (folder / f"{name}_{part}.txt" for part in ("train", "test"))
    fetching.fetch(name, folder / "root", *lists)
    return files_below(folder / "root")


def test_fetching_kitti_gets_what_the_list_names_and_no_more(server, tmp_path, monkeypatch, capsys):
    partial, replace = [], Path.replace
    spy = lambda path, target: partial.append(path.name) or replace(path, target)
    monkeypatch.setattr(Path, "replace", spy)
    found = fetch("kitti", tmp_path)
    # each process has partial files of its own
    assert len(partial) == 4 and all(str(os.getpid()) in name for name in partial)
    assert len(found) == 4 and not any(".partial" in name for name in found)
    image = "raw/2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000007.png"
    assert found[image] == picture_bytes(369, 1242)
    printed = capsys.readouterr().out
    assert "4 files" in printed and "127.0.0.1" in printed and "CC BY-NC-SA 3.0" in printed
    assert server.headers_seen == {"standard"}
    kitti = data.DepthDataset("kitti", tmp_path / "root", tmp_path / "kitti_test.txt")
    assert len(kitti) == 2 and kitti[1]["depth"].max().item() == pytest.approx(7000 / 256, rel=1e-3)
    # what is there is not fetched again, and what was lost is
    server.asked.clear()
    fetch("kitti", tmp_path)
    assert not server.asked and "0 files" in capsys.readouterr().out
    (tmp_path / "root" / image).unlink()
    assert fetch("kitti", tmp_path) == found and "1 files" in capsys.readouterr().out


def test_many_files_come_over_few_connections_and_one_look_at_the_directory(server, tmp_path):
    n = 400
    members = {f"sync/hall/{kind}_{i}": b"%d" % i for i in range(n) for kind in ("rgb", "depth")}
    server.files["/sync.zip"] = archive_of({f"{name}.png": c for name, c in members.items()})
    lines = [f"/hall/rgb_{i}.png /hall/depth_{i}.png 518.9\n" for i in range(n)]
    (tmp_path / "nyu_train.txt").write_text("".join(lines))
    found = fetch("nyu", tmp_path)
    assert len(found) == 2 * n + 1 and found["sync/hall/depth_7.png"] == b"7"
    assert len(server.connections) <= 10
    assert len(server.asked) <= 2 * n + 4  # the directory takes one or two requests


@pytest.mark.parametrize("gone", ["drive_0001_sync.zip", "sync.zip", "nyu.mat"])
def test_what_is_gone_blocks_nothing_else(gone, server, tmp_path):
    name = "kitti" if gone.startswith("drive") else "nyu"
    server.faults[gone] = ["404", 1000]
    with pytest.raises(InputError) as error:
        fetch(name, tmp_path)
    assert "\n" not in str(error.value) and "404" in str(error.value)
    assert fetching.SOURCES["nyu_test"].endswith(gone) or gone in str(error.value)
    assert len(files_below(tmp_path / "root")) == {"nyu.mat": 4, "sync.zip": 1}.get(gone, 3)
    assert sum(path.endswith(gone) for path, _ in server.asked) == 1  # 404 is final
    server.faults.clear()
    assert len(fetch(name, tmp_path)) == {"nyu": 5, "kitti": 4}[name]


def test_fetching_nyu_and_its_mat(server, tmp_path):
    found = fetch("nyu", tmp_path)
    names = [f"sync/kitchen/{kind}_0000{i}" for i in (0, 2) for kind in ("rgb", "sync_depth")]
    # the test pair, whose files sync.zip has too, comes from the .mat
    assert {name.rsplit(".", 1)[0] for name in found} == {*names, "nyu_depth_v2_labeled"}


def test_the_mat_goes_on_where_it_broke_off_and_is_checked(server, tmp_path):
    mat = tmp_path / "root" / data.NYU_MAT
    mat.parent.mkdir()
    server.faults["nyu.mat"] = ["breaks", 2]
    fetch("nyu", tmp_path)
    assert mat.read_bytes() == server.files["/nyu.mat"]
    starts = [int(asked[6:-1]) for path, asked in server.asked if path == "/nyu.mat"]
    assert len(starts) == 3 and 0 == starts[0] < starts[1] < starts[2]
    mat.unlink()
    server.files["/nyu.mat"] = bytes(300_000)
    with pytest.raises(InputError, match="MD5"):
        fetch("nyu", tmp_path)
    assert not mat.exists() and not Path(f"{mat}.partial").exists()


def test_two_fetches_of_the_mat_write_one_file(server, tmp_path):
    mat, results = tmp_path / data.NYU_MAT, []
    server.faults["nyu.mat"] = ["waits", 1]
    get = lambda: results.append(fetching.fetch_mat(mat, fetching.new_session()))
    first = threading.Thread(target=get)
    first.start()
    try:
        assert server.is_waiting.wait(20)
        get()  # finishes, while the first one still waits for its second half
        assert mat.read_bytes() == server.files["/nyu.mat"]
    finally:
        server.until.set()
        first.join()
    assert results == [(0, "")] * 2 and mat.read_bytes() == server.files["/nyu.mat"]
    assert [path.name for path in tmp_path.glob("*.mat*")] == [mat.name]


@pytest.mark.parametrize("fault", ["404", "no ranges", "wrong bytes", "breaks", "503", "resets"])
def test_a_host_that_fails_is_one_sentence_and_finished_files_stay(fault, server, tmp_path):
    server.faults["data_depth_annotated.zip"] = [fault, 1000]
    with pytest.raises(InputError) as error:
        fetch("kitti", tmp_path)
    sentence = str(error.value)
    assert "\n" not in sentence and "2 of 4 files" in sentence and "annotated.zip" in sentence
    said = {"404": "404", "no ranges": "range requests", "503": "503", "resets": "reset by peer"}
    assert said.get(fault, "") in sentence and "run it again" in sentence
    assert fetching.SOURCES["kitti_depth"] in sentence and sentence.count("http") == 1
    found = files_below(tmp_path / "root")
    assert len(found) == 2 and all(name.startswith("raw/") for name in found)
    server.faults.clear()
    assert len(fetch("kitti", tmp_path)) == 4


@pytest.mark.parametrize("fault", ["breaks", "503"])
def test_what_breaks_is_tried_again_after_waits_that_grow(fault, server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    server.faults["drive_0001_sync.zip"] = [fault, 3]
    assert len(fetch("kitti", tmp_path)) == 4
    assert waits == [fetching.WAIT * k for k in (1, 2, 4)]


def test_a_host_that_does_not_answer_is_waited_for_once(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(fetching.time, "sleep", waits.append)
    nobody = {name: re.sub(r"1:\d+", "1:9", url) for name, url in fetching.SOURCES.items()}
    monkeypatch.setattr(fetching, "SOURCES", nobody)
    with pytest.raises(InputError, match="4 of 4 files.*2 more archives: .*refused") as error:
        fetch("kitti", tmp_path)
    assert len(waits) == 3 and "\n" not in str(error.value)  # there are three archives


def test_an_archive_that_fails_again_and_again_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "GIVE_UP", 2)
    monkeypatch.setattr(fetching, "CONNECTIONS", 1)
    names = [f"hall/{kind}_{i}.png" for i in range(50) for kind in ("rgb", "depth")]
    server.files["/sync.zip"] = archive_of({f"sync/{name}": b"x" * 40 for name in names})
    server.faults["sync.zip"] = ["wrong bytes", 1000]
    lines = [f"/{image} /{depth} 1\n" for image, depth in zip(names[::2], names[1::2])]
    (tmp_path / "nyu_train.txt").write_text("".join(lines))
    with pytest.raises(InputError, match="100 of 101 files"):
        fetch("nyu", tmp_path)
    assert len(server.asked) < 4 * 10


def test_a_full_disk_ends_it_at_once(server, tmp_path, monkeypatch):
    def write_bytes(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        fetch("kitti", tmp_path)


def test_archives_that_a_user_has_are_read_from_there(server, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    for path, content in server.files.items():
        if path.endswith(".zip"):
            (root / path.rsplit("/", 1)[1]).write_bytes(content)
    (root / data.NYU_MAT).write_bytes(b"the user's own")
    found = importlib.util.find_spec
    no_remotezip = lambda name: None if name == "remotezip" else found(name)
    monkeypatch.setattr(importlib.util, "find_spec", no_remotezip)
    assert len(fetch("kitti", tmp_path)) == 5 + 4 and len(fetch("nyu", tmp_path)) == 9 + 4
    assert not server.asked


@pytest.mark.parametrize("package", ["remotezip", "h5py"])
def test_packages_are_asked_for_before_the_first_byte(package, server, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else found(n))
    with pytest.raises(InputError, match=package):
        fetch("nyu", tmp_path)
    assert not server.asked


def test_wrong_archives_and_members_that_lead_out(server, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "sync.zip").write_text("<html>Quota exceeded</html>")
    with pytest.raises(InputError, match="sync.zip.*not a zip file"):
        fetch("nyu", tmp_path)
    (root / "sync.zip").write_bytes(server.files["/depth/data_depth_annotated.zip"])
    with pytest.raises(InputError, match="kitchen/rgb_00000.jpg"):
        fetch("nyu", tmp_path)
    (root / "sync.zip").unlink()
    (tmp_path / "nyu_train.txt").write_text("evil/rgb_9.jpg evil/rgb_9.jpg 1\n")
    with pytest.raises(InputError, match="evil/rgb_9.jpg"):
        fetch("nyu", tmp_path)
    assert not list(tmp_path.rglob("rgb_9*"))
    with pytest.raises(InputError, match="must be the folder"):
        fetching.fetch("nyu", root / data.NYU_MAT)


def test_the_command_fetches_and_checks(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lists = ["--train-split", "kitti_train.txt", "--test-split", "kitti_test.txt"]
    monkeypatch.setattr(sys, "argv", ["fetch", "kitti", "--root", "root", *lists])
    fetching.main()
    assert "test: 2 pairs" in capsys.readouterr().out
    with Image.open("root/check_kitti.png") as picture:
        assert picture.size == (2 * 258 + 2, 2 * 194 + 2)


def test_sources_are_the_official_ones():
    assert all(url.startswith("https://") for url in fetching.SOURCES.values())
    ends = ["newcrfs/datasets/nyu/sync.zip", "nyu_depth_v2/nyu_depth_v2_labeled.mat"]
    ends += ["avg-kitti/raw_data/{drive}/{drive}_sync.zip", "avg-kitti/data_depth_annotated.zip"]
    assert all(url.endswith(end) for url, end in zip(fetching.SOURCES.values(), ends))
    assert fetching.NYU_MAT_MD5 == "520609c519fba3ba5ac58c8fefcc3530"
