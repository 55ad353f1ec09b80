"""Fetch what is missing of NYU-Depth V2 or KITTI: python -m extras.fetch nyu|kitti --root DIR

The lists of pairs say which files are needed. They are read out of the hosts' archives over HTTP
ranges, so no whole archive is downloaded. What cannot be had stops nothing else: it is named at the
end, and the same command goes on from there. This needs remotezip, and h5py for NYU's test pairs.
"""

import argparse
import importlib.util
import io
import itertools
import os
import re
import struct
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.nn.functional as F
from torchvision.datasets.utils import calculate_md5
from torchvision.utils import save_image
from tqdm import tqdm

import data
from cabins import InputError

KITTI = "https://s3.eu-central-1.amazonaws.com/avg-kitti"
SOURCES = {
    "nyu_train": "https://virutalbuy-public.oss-cn-hangzhou.aliyuncs.com"  # "virutal" is theirs
    "/share/newcrfs/datasets/nyu/sync.zip",
    "nyu_test": "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    "kitti_raw": KITTI + "/raw_data/{drive}/{drive}_sync.zip",
    "kitti_depth": KITTI + "/data_depth_annotated.zip",
}
NYU_MAT_MD5 = "520609c519fba3ba5ac58c8fefcc3530"
FOLDERS = {"kitti_raw": "raw", "kitti_depth": data.ANNOTATED}  # below the root
LICENCES = {"nyu": "NYU-Depth V2 states no licence", "kitti": "KITTI is under CC BY-NC-SA 3.0"}
CONNECTIONS = 8
TRIES, WAIT = 4, 1.0  # of each request; seconds before the second try, and twice that for the next
GIVE_UP = 16  # failures in a row after which the rest of an archive is not tried


def fetch(name: str, root: str | Path, train_split=None, test_split=None) -> None:
    """Get what the lists of "nyu" or "kitti" name and `root` lacks.

    Raises InputError at the end, in one sentence, if some of it could not be had.
    """
    if str(root).endswith(".mat"):
        raise InputError(f"--root is {root}; it must be the folder to fetch {name} into")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    wanted = missing_files(name, root, {"train": train_split, "test": test_split})
    mat = root / data.NYU_MAT if wanted.pop(SOURCES["nyu_test"], None) else None
    needs_mat = mat is not None and not mat.exists()
    remote = [url for url in wanted if not local_archive(root, url).exists()]
    for package, is_needed in (("remotezip", remote or needs_mat), ("h5py", mat)):
        if is_needed and importlib.util.find_spec(package) is None:
            raise InputError(f"fetching {name} needs {package}: pip install {package}")
    n_files = sum(map(len, wanted.values())) + needs_mat
    urls = [*remote, *[SOURCES["nyu_test"]] * needs_mat]
    hosts = ", ".join(sorted({host_of(url) for url in urls})) or "here"
    print(f"{n_files} files from {hosts}; {LICENCES[name]}")
    session = new_session() if urls else None
    failures = {}  # for each archive: how many files could not be had, and a reason
    silent = set()  # hosts whose last archive could not be opened; the next one gets a single try
    with tqdm(total=n_files, unit="file", disable=None) as bar:
        for url, files in wanted.items():
            tries = 1 if host_of(url) in silent else TRIES
            try:
                members, read = open_archive(local_archive(root, url), url, session, tries)
            except InputError as error:
                failures[url] = len(files), str(error)
                silent.add(host_of(url))
                continue
            silent.discard(host_of(url))
            failures[url] = extract(files, find_members(members, files), read, bar)
    if needs_mat:
        failures[SOURCES["nyu_test"]] = fetch_mat(mat, session)
    raise_for(failures, n_files)


def host_of(url: str) -> str:
    return url.split("/")[2]


def missing_files(name: str, root: Path, splits: dict) -> dict[str, dict[str, Path]]:
    """For each archive, how the paths of the files end that are needed of it, and where they go."""
    wanted = {}
    folders = [root / folder for folder in data.DATASETS[name].folders if (root / folder).is_dir()]
    for part, split in splits.items():
        kinds = ("kitti_raw", "kitti_depth") if name == "kitti" else (f"nyu_{part}",) * 2
        for image, depth, *_ in data.read_list(name, part, split):
            for file, kind, suffixes in zip((image, depth), kinds, (data.SUFFIXES, ())):
                if depth != "None" and not data.find(file, folders, suffixes):
                    drive, end = re.sub(r".*?([^/]+)_sync/.*", r"\1", file), file.lstrip("/")
                    files = wanted.setdefault(SOURCES[kind].format(drive=drive), {})
                    files[end] = root / FOLDERS.get(kind, "")
    return wanted


def local_archive(root: Path, url: str) -> Path:
    """Where the user may have put the archive of `url`."""
    return root / url.rsplit("/", 1)[1]


def new_session():
    """One session for all requests, so that eight connections serve them all."""
    import requests

    session = requests.Session()
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    # Without this, Aliyun OSS answers a range beyond the end of a file with the whole file.
    session.headers["x-oss-range-behavior"] = "standard"
    session.headers["Accept-Encoding"] = "identity"
    return session


def patiently(read: Callable, *arguments, tries: int = TRIES):
    """What `read` returns in the first try that succeeds. Raises InputError if none does."""
    for i in range(tries):
        try:
            return read(*arguments)
        except Exception as error:  # of many kinds: zipfile's, zlib's, urllib3's, remotezip's
            while error.__context__:  # the first cause says it best
                error = error.__context__
            reason = str(error).partition(" for url: ")[0] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if 400 <= status < 500 and status not in (408, 429) or i == tries - 1:
                raise InputError(reason) from error
            time.sleep(WAIT * 2**i)


def open_archive(
    path: Path, url: str, session, tries: int
) -> tuple[list, Callable[[zipfile.ZipInfo], bytes]]:
    """The directory of the archive in `path` or at `url`, and a function that reads a member.

    The directory is read once. Any number of threads may then read members: each is one request.
    """
    if path.exists():
        archive = patiently(zipfile.ZipFile, path, tries=1)
        return archive.infolist(), lambda member: patiently(archive.read, member, tries=1)
    from remotezip import RemoteFetcher, RemoteZip

    fetcher = RemoteFetcher(url, session, timeout=60)
    with patiently(lambda: RemoteZip(url, session=session, timeout=60), tries=tries) as archive:
        members = archive.infolist()
        offsets = sorted(member.header_offset for member in members) + [archive.start_dir]
    ends = dict(itertools.pairwise(offsets))

    def read(member: zipfile.ZipInfo) -> bytes:
        start = member.header_offset
        content = fetcher.fetch((start, ends[start] - 1)).read()
        lengths = struct.unpack("<HH", content[26:30])  # of the name and of what follows it
        content = io.BytesIO(content[30 + sum(lengths) :])
        return zipfile.ZipExtFile(content, "r", member).read()  # which checks the CRC-32

    return members, lambda member: patiently(read, member)


def find_members(members: list, files: dict[str, Path]) -> dict[str, zipfile.ZipInfo]:
    """The member of each file, whatever its suffix. It may lie up to two folders deeper."""
    stems, found = {end.rsplit(".", 1)[0]: end for end in files}, {}
    for member in members:
        folders = member.filename.rsplit(".", 1)[0].split("/")
        for stem in ("/".join(folders[i:]) for i in range(3)):
            if stem in stems and not {"", ".."} & {*folders}:  # which would lead out of the root
                found[stems[stem]] = member
    return found


def extract(
    files: dict[str, Path], found: dict[str, zipfile.ZipInfo], read: Callable, bar: tqdm
) -> tuple[int, str]:
    """Write files as if the archive were unpacked there, but each whole.

    Returns how many could not be had, and a reason.
    """

    def write(end: str) -> None:
        content, path = read(found[end]), files[end] / found[end].filename
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(f"{path}.{os.getpid()}.partial")  # another process may fetch it, too
        partial.write_bytes(content)
        partial.replace(path)

    reasons = [f"it has no {end}" for end in files if end not in found]
    n_done = in_a_row = 0
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        tasks = [pool.submit(write, end) for end in found]
        try:
            for task in tasks:
                bar.update()
                try:
                    task.result()
                    n_done, in_a_row = n_done + 1, 0
                except InputError as error:
                    reasons.append(str(error))
                    in_a_row += 1
                if in_a_row == GIVE_UP:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    return len(files) - n_done, reasons[0] if reasons else ""


def fetch_mat(path: Path, session) -> tuple[int, str]:
    """Download NYU's .mat, or the rest of it. Returns 1 and a reason if that fails, else 0.

    Two processes may do so at once: they write the same bytes to the same offsets of one file.
    """
    url, partial = SOURCES["nyu_test"], Path(f"{path}.partial")

    def go_on() -> None:
        done = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={done}-"}
        with session.get(url, headers=headers, stream=True, timeout=60) as response:
            if response.status_code == 416:  # it ended there
                return
            response.raise_for_status()
            start = done if response.status_code == 206 else 0
            n_bytes = start + int(response.headers.get("Content-Length", 0))
            bar = tqdm(desc=path.name, total=n_bytes, initial=start, unit="B", unit_scale=True)
            partial.touch()
            with bar, open(partial, "r+b") as file:  # which cuts nothing off
                file.seek(start)
                for block in response.iter_content(2**16):
                    file.write(block)
                    bar.update(len(block))

    try:
        patiently(go_on)
        if calculate_md5(partial) == NYU_MAT_MD5:
            partial.replace(path)
            return 0, ""
        partial.unlink()
        return 1, "its MD5 is wrong, and it is deleted"
    except (InputError, FileNotFoundError) as error:  # the latter if the other process was quicker
        return (0, "") if path.exists() else (1, str(error))


def raise_for(failures: dict[str, tuple[int, str]], n_files: int) -> None:
    """Raise InputError if anything is missing: how many files, of which archives, and why."""
    archives = defaultdict(list)  # by the reason
    for url, (n, reason) in failures.items():
        if n:
            archives[reason].append(url)
    texts = []
    for reason, urls in archives.items():
        others = f" and {len(urls) - 1} more archives" if len(urls) > 1 else ""
        texts.append(f"{urls[0]}{others}: {reason}")
    if texts:
        n_missing = sum(n for n, _ in failures.values())
        remedy = "finished files are kept, so run it again, or see docs/data.md, By hand"
        what = f"{n_missing} of {n_files} files could not be had"
        raise InputError(f"{what} ({'; '.join(texts)}); {remedy}")


def draw_pairs(path: Path, dataset: data.DepthDataset) -> None:
    """Draw eight images above their depths, which go from black, 0 m, to white, the range's end."""
    n = len(dataset)
    samples = [dataset[i] for i in range(0, n, -(-n // 8))]
    cells = [data.denormalize(sample["image"]) for sample in samples]
    cells += [sample["depth"].expand(3, -1, -1) / dataset.recipe.max_depth for sample in samples]
    cells = [F.interpolate(cell[None], (192, 256))[0] for cell in cells]
    save_image(cells, path, nrow=len(samples))
    print(f"{path} shows test images above their depths: do they belong together?")


def main() -> None:
    about = "Fetch what is missing of a data set, and check it."
    parser = argparse.ArgumentParser(prog="python -m extras.fetch", description=about)
    add = parser.add_argument
    add("data", choices=LICENCES)
    add("--root", required=True, metavar="DIR", help="folder of the data set")
    add("--train-split", metavar="FILE", help="list of training pairs; default: the authors'")
    add("--test-split", metavar="FILE", help="list of test pairs; default: the authors'")
    args = parser.parse_args()
    fetch(args.data, args.root, args.train_split, args.test_split)
    data.main()  # has the same options
    test_set = data.DepthDataset(args.data, args.root, args.test_split)
    draw_pairs(Path(args.root, f"check_{args.data}.png"), test_set)


if __name__ == "__main__":
    data.run_command(main)
