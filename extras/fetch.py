"""Fetch what is missing of NYU-Depth V2 or KITTI: python -m extras.fetch nyu|kitti --root DIR

The lists of pairs say which files are needed. They are read out of the hosts' archives over HTTP
ranges, so no whole archive is downloaded. What cannot be had stops nothing else: it is named at the
end, and the same command goes on from there. This needs remotezip, and h5py for NYU's test pairs.
"""

import importlib.util
import io
import itertools
import re
import struct
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.nn.functional as F
from torchvision.datasets.utils import calculate_md5
from torchvision.utils import save_image
from tqdm import tqdm

import data

KITTI = "https://s3.eu-central-1.amazonaws.com/avg-kitti"
SOURCES = {
    "nyu_train": "https://virutalbuy-public.oss-cn-hangzhou.aliyuncs.com"  # "virutal" is theirs
    "/share/newcrfs/datasets/nyu/sync.zip",
    "nyu_test": "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    "kitti_raw": KITTI + "/raw_data/{drive}/{drive}_sync.zip",
    "kitti_depth": KITTI + "/data_depth_annotated.zip",
}
NYU_MAT_MD5 = "520609c519fba3ba5ac58c8fefcc3530"
TARGETS = {"nyu_train": "sync", "kitti_raw": "raw", "kitti_depth": "data_depth_annotated"}
LICENCES = {"nyu": "NYU-Depth V2 states no licence", "kitti": "KITTI is under CC BY-NC-SA 3.0"}
CONNECTIONS = 8
TRIES, WAIT = 4, 1.0  # of each request; seconds before the second try, and twice that for the next
GIVE_UP = 16  # failures in a row after which the rest of an archive is not tried


def fetch(name: str, root: str | Path, train_split=None, test_split=None) -> None:
    """Get what the lists of "nyu" or "kitti" name and `root` lacks.

    Raises ValueError at the end, in one sentence, if some of it could not be had.
    """
    if name not in LICENCES:
        raise ValueError(f"{name} cannot be fetched: only nyu and kitti can")
    if str(root or ".mat").endswith(".mat"):
        raise ValueError(f"--root is {root}; it must be the folder to fetch {name} into")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    wanted = missing_files(name, root, {"train": train_split, "test": test_split})
    mat = root / data.NYU_MAT if wanted.pop(SOURCES["nyu_test"], None) else None
    needs_mat = mat is not None and not mat.exists()
    remote = [url for url in wanted if not local_archive(root, url).exists()]
    for package, is_needed in (("remotezip", remote or needs_mat), ("h5py", mat)):
        if is_needed and importlib.util.find_spec(package) is None:
            raise ValueError(f"fetching {name} needs {package}: pip install {package}")
    n_files = sum(map(len, wanted.values())) + needs_mat
    hosts = {url.split("/")[2] for url in [*remote, *[SOURCES["nyu_test"]] * needs_mat]}
    print(f"{n_files} files from {', '.join(sorted(hosts)) or 'here'}; {LICENCES[name]}")
    session = new_session() if hosts else None
    failures = {}  # for each archive: how many files could not be had, and a reason
    silent = set()  # hosts that did not answer, whose other archives get one try only
    with tqdm(total=n_files, unit="file", disable=None) as bar:
        for url, files in wanted.items():
            host = url.split("/")[2]
            n_failed, reason = extract(
                root, url, files, session, 1 if host in silent else TRIES, bar
            )
            failures[url] = n_failed, reason
            if n_failed == len(files) and not reason.startswith("4"):
                silent.add(host)
        if needs_mat:
            failures[SOURCES["nyu_test"]] = fetch_mat(mat, session)
    raise_for(failures, n_files)


def missing_files(name: str, root: Path, splits: dict) -> dict[str, dict[str, Path]]:
    """For each archive, the files that are needed of it: how their paths end, and where they go."""
    wanted = {}
    find = data.Finder(root, data.DATASETS[name].folders)
    for part, split in splits.items():
        kinds = ("kitti_raw", "kitti_depth") if name == "kitti" else (f"nyu_{part}",) * 2
        for image, depth, *_ in data.read_list(name, part, split):
            for file, kind in zip((image, depth), kinds):
                if depth != "None" and find(file) is None:
                    drive, end = re.sub(r".*?([^/]+)_sync/.*", r"\1", file), file.lstrip("/")
                    files = wanted.setdefault(SOURCES[kind].format(drive=drive), {})
                    files[end] = root / TARGETS.get(kind, "") / end
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
    # without this, Aliyun OSS answers a range beyond the end of a file with the whole file
    session.headers["x-oss-range-behavior"] = "standard"
    session.headers["Accept-Encoding"] = "identity"
    return session


def patiently(read: Callable, *arguments, tries: int = TRIES):
    """What `read` returns in the first try that succeeds. Raises ValueError if none does."""
    for i in range(tries):
        try:
            return read(*arguments)
        except Exception as error:  # of many kinds: zipfile's, zlib's, urllib3's, remotezip's
            reason = re.sub(r"\s+", " ", re.sub(r" for url: .*", "", str(error)))
            reason = re.sub(r".*Caused by \w+\(.*?\): (.*)[\"']\)+$", r"\1", reason)
            reason = reason or type(error).__name__
            is_final = re.match(r"4(?!08|29)\d\d ", reason)  # such as 404, but not 429
            if type(error).__name__ == "RangeNotSupported":
                is_final, reason = True, "the host answers a range with the whole file, status 200"
            if is_final or i == tries - 1:
                raise ValueError(reason) from error
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


def extract(
    root: Path, url: str, files: dict[str, Path], session, tries: int, bar
) -> tuple[int, str]:
    """Write files of an archive, each whole. Returns how many could not be had, and a reason.

    The archive is opened in up to `tries` tries.
    """
    try:
        members, read = open_archive(local_archive(root, url), url, session, tries)
    except ValueError as error:
        return len(files), str(error)
    targets = find_members(members, files)
    del members  # 100 MB for KITTI's depth
    stems = {path.with_suffix("") for path in targets}
    lacking = [end for end, path in files.items() if path.with_suffix("") not in stems]
    reasons = [f"it has no {lacking[0]}"] if lacking else []

    def write(path: Path, member: zipfile.ZipInfo) -> str:
        if path.exists():
            return ""
        try:
            content = read(member)
        except ValueError as error:
            return str(error)
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_whole(path, lambda partial: partial.write_bytes(content))
        return ""

    in_a_row = 0
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        tasks = [pool.submit(write, path, member) for path, member in targets.items()]
        try:
            for task in tasks:
                reason = task.result()
                reasons += [reason] if reason else []
                in_a_row = in_a_row + 1 if reason else 0
                bar.update()
                if in_a_row == GIVE_UP:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    n_failed = len(files) - sum(path.exists() for path in targets)
    return n_failed, reasons[0] if reasons else ""


def find_members(members: list, files: dict[str, Path]) -> dict[Path, zipfile.ZipInfo]:
    """The member of each file, by the path where it goes, whatever its suffix.

    A member may lie up to two folders deeper than the list says.
    """
    ends, found = {end.rsplit(".", 1)[0]: path for end, path in files.items()}, {}
    for member in members:
        folders = member.filename.rsplit(".", 1)[0].split("/")
        for end in ("/".join(folders[i:]) for i in range(3)):
            if end in ends and ".." not in folders:  # which would lead out of the root
                found[ends[end].with_suffix(Path(member.filename).suffix)] = member
    return found


def fetch_mat(path: Path, session) -> tuple[int, str]:
    """Download NYU's .mat, or the rest of it. Returns 1 and a reason if that fails, else 0."""
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
            with bar, open(partial, "ab" if start else "wb") as file:
                for block in response.iter_content(2**16):
                    file.write(block)
                    bar.update(len(block))

    try:
        patiently(go_on)
    except ValueError as error:
        return 1, str(error)
    if calculate_md5(partial) != NYU_MAT_MD5:
        partial.unlink()
        return 1, "its MD5 is wrong, and it is deleted"
    partial.replace(path)
    return 0, ""


def raise_for(failures: dict[str, tuple[int, str]], n_files: int) -> None:
    """Raise ValueError if anything is missing: how many files, of which archives, and why."""
    archives = {}
    for url, (n, reason) in failures.items():
        if n:
            archives.setdefault(reason, []).append(f"{n} of {url.rsplit('/', 1)[1]}")
    if archives:
        n_missing = sum(n for n, _ in failures.values())
        text = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in archives.items())
        remedy = "finished files are kept, so run it again, or see docs/data.md, By hand"
        raise ValueError(f"{n_missing} of {n_files} files could not be had ({text}); {remedy}")


def draw_pairs(path: Path, dataset: data.DepthDataset) -> None:
    """Draw eight images above their depths, which go from black, 0 m, to white, the range's end."""
    n = len(dataset)
    samples = [dataset[i] for i in range(0, n, -(-n // 8))]
    cells = [data.denormalize(sample["image"]) for sample in samples]
    cells += [sample["depth"].expand(3, -1, -1) / dataset.recipe.max_depth for sample in samples]
    cells = [F.interpolate(cell[None], (192, 256))[0] for cell in cells]
    data.write_whole(
        path, lambda partial: save_image(cells, partial, nrow=len(samples), format="png")
    )
    print(f"{path} shows test images above their depths: do they belong together?")


def main() -> None:
    parser = data.Parser(description="Fetch what is missing of a data set, and check it.")
    parser.add_argument("data", choices=LICENCES)
    data.add_data_options(parser)
    args = parser.parse_args()
    fetch(args.data, args.root, args.train_split, args.test_split)
    data.main()  # the same options
    scale = {"depth_scale": args.depth_scale, "max_depth": args.max_depth}
    test_set = data.DepthDataset(args.data, args.root, args.test_split, **scale)
    draw_pairs(Path(args.root) / f"check_{args.data}.png", test_set)


if __name__ == "__main__":
    data.run_command(main)
