"""Data sets by name or folder: kodak, clic, tecnick, photos, photos-calib.

`datasets.json` beside this file says, for each name, how many images it has, where a file comes from and its
SHA-256. `photos` and `photos-calib` are photographs that installed packages ship, no image in both: `photos`
(lossless PNGs) is for evaluation, `photos-calib` for calibration.
"""

import http.client
import importlib.util
import json
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from licq.support.errors import InputError
from licq.support.files import atomic_path, sha256
from licq.support.progress import progress

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
_TIMEOUT = 20  # seconds without a byte before a download is given up


@dataclass(frozen=True)
class Dataset:
    """Image files under one name, in natural order (kodim2 before kodim10)."""

    name: str
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)


def known_datasets() -> dict[str, dict]:
    """The entries of `datasets.json`, by name."""
    return json.loads((Path(__file__).parent / "datasets.json").read_text(encoding="utf-8"))


def open_dataset(name_or_folder: str | Path) -> Dataset:
    """The data set of a name, or the images of a folder (not of its subfolders).

    A known name is looked for in $LICQ_DATA/<name>, then in <cache>/<name>; the cache is $LICQ_CACHE or
    ~/.cache/licq. Where the images have a stable public address they are then downloaded into the cache, and
    the SHA-256 of each is checked. A folder with the name of a data set is reached as ./name.

    Raises:
        InputError: unknown name, missing or empty folder, incomplete data set, no network.
    """
    text = str(name_or_folder)
    known = known_datasets()
    if text not in known:
        return _open_folder(text, known)
    entry = known[text]
    if "packaged" in entry:
        return Dataset(text, tuple(_packaged(text, item) for item in entry["packaged"]))
    folder = _local_folder(text)
    if folder is None:
        folder = _download(text, entry)
    paths = images_in(folder)
    expected = entry.get("images", len(paths))
    if len(paths) != expected:
        raise InputError(
            f"{folder} holds {len(paths)} images, {text} has {expected}; complete it, or give the path "
            f"{folder}/ itself to use what is there"
        )
    return Dataset(text, paths)


def is_local(name: str) -> bool:
    """Whether the data set of that name can be opened without a download."""
    return "packaged" in known_datasets()[name] or _local_folder(name) is not None


def images_in(folder: str | Path) -> tuple[Path, ...]:
    """The image files directly in `folder` (by suffix, hidden files left out), in natural order."""
    try:
        entries = [
            path for path in Path(folder).iterdir() if not path.name.startswith(".") and path.is_file()
        ]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    return tuple(sorted((path for path in entries if path.suffix.lower() in SUFFIXES), key=natural_key))


def natural_key(path: Path) -> list:
    """Sort key in which a run of digits counts as a number: kodim2 before kodim10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"([0-9]+)", path.name.lower())
        if part
    ] + [(1, 0, path.name)]


def cache_folder() -> Path:
    """Where downloads go: $LICQ_CACHE or ~/.cache/licq."""
    return Path(os.environ.get("LICQ_CACHE") or Path.home() / ".cache" / "licq")


def _open_folder(text: str, known: dict) -> Dataset:
    folder = Path(text).expanduser()
    if folder.is_file():
        raise InputError(f"{folder} is a file; give a folder of images or one of {', '.join(known)}")
    if not folder.is_dir():
        raise InputError(
            f"no data set or folder {text}; give a folder of images or one of {', '.join(known)}"
        )
    paths = images_in(folder)
    if not paths:
        raise InputError(
            f"the folder {folder} holds no images ({' '.join(sorted(SUFFIXES))}); put some there"
        )
    return Dataset(folder.resolve().name, paths)


def _packaged(name: str, item: str) -> Path:
    package, _, inside = item.partition("/")
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    raise InputError(f"{name}: the package {package} with {inside} is not installed; run make env")


def _local_folder(name: str) -> Path | None:
    """Where the images of a known data set lie; None where they do not."""
    roots = [Path(os.environ["LICQ_DATA"])] if os.environ.get("LICQ_DATA") else []
    # A cache folder that a broken download left incomplete is finished by the download, not used.
    for folder in [root / name for root in roots]:
        if folder.is_dir() and images_in(folder):
            return folder
    cached = cache_folder() / name
    entry = known_datasets()[name]
    if cached.is_dir() and len(images_in(cached)) >= entry.get("images", 1):
        return cached
    return None


def _download(name: str, entry: dict) -> Path:
    root = os.environ.get("LICQ_DATA")
    looked = f"{root}/{name}" if root else "LICQ_DATA (not set)"
    where = f"no images of {name} in {looked} or {cache_folder() / name}"
    if "url" not in entry:
        raise InputError(
            f"{where}; put there {entry['get']}, and set LICQ_DATA to the folder that holds {name}/"
        )
    folder = cache_folder() / name
    for file, digest in progress(entry["sha256"].items(), desc=f"downloading {name}", unit="image"):
        path = folder / file
        if path.exists() and sha256(path) == digest:
            continue
        try:
            content = _fetch(entry["url"] + file)
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise InputError(
                f"{where}, and {entry['url']} cannot be reached ({error}); set LICQ_DATA to the folder "
                f"that holds {name}/"
            ) from error
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
            if sha256(temporary) != digest:
                raise InputError(
                    f"{entry['url']}{file} is not the file it should be (SHA-256 differs); get {name} "
                    f"elsewhere and set LICQ_DATA to the folder that holds {name}/"
                )
    return folder


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        return response.read()
