"""Images and their captions, read from every published form by one reader with one set of rules.

    file = read(Path("captions_val2014.json"))          # for training, conversion, evaluation
    [(file.images[number].name, text) for number, text in file.captions]

Nothing is repaired and nothing is left out in silence: what cannot be read exactly is a BadSample
with its line or entry, among the rows where it stands, and the caller decides.
"""

import csv
import gc
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl.data import tars
from internvl.data.images import (
    IMAGE_ENDINGS,
    FileSlice,
    is_address,
)
from internvl.data.texts import (
    RepeatedKeys,
    json_type,
    not_json,
    parse_json,
    parse_line,
    printable,
    problem_lines,
    read_json,
    read_text,
    text_problem,
)
from internvl.errors import BadSample, DataError

_TEXT_KEYS = ("caption", "captions", "text", "texts")
_IMAGE_COLUMNS = ("image", "image_name", "filepath", "file_name", "filename")
_TEXT_COLUMNS = (*_TEXT_KEYS, "title", "comment")

ImageId = int | str
"""What COCO annotations call an image."""


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image that a file of captions lists."""

    where: str
    """Its line or entry, such as "line 3"."""
    name: str
    id: ImageId | None = None
    """In COCO form, else None."""
    slice: FileSlice | None = None
    """Where it is no file below the folder of images but lies in a tar."""


BAD = -1
"""Image of a row that is a problem."""


@dataclass
class CaptionFile:
    """What a file of captions holds, in its order, and what is wrong with it.

    Rows are columns of equal length: a large file has hundreds of thousands. Every image that is
    listed has a row of its own, good or bad.
    """

    path: Path
    split: str = "test"
    """Which images of Karpathy's file with a `split` field are read."""
    form: str = ""
    """The key of FORMS that it was read as."""
    images: list[NamedImage] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """Line or entry of every row."""
    numbers: list[int] = field(default_factory=list)
    """Number of every row's image in `images`, or BAD."""
    texts: list[str] = field(default_factory=list)
    """Every row's caption, or what is wrong."""
    tried: bytearray = field(default_factory=bytearray)
    """Nonzero for every image that a row is about, be the row good or bad."""
    _by_name: dict[str, int] = field(default_factory=dict)  # file_key -> number of its image

    @property
    def captions(self) -> Iterator[tuple[int, str]]:
        """(number of the image, caption) of every row that can be used."""
        pairs = zip(self.numbers, self.texts, strict=True)
        return (pair for pair in pairs if pair[0] != BAD)

    @property
    def problems(self) -> list[BadSample]:
        """The rows that cannot, each with file and line or entry."""
        rows = zip(self.places, self.numbers, self.texts, strict=True)
        return [self.problem(place, text) for place, number, text in rows if number == BAD]

    def problem(self, place: str, reason: str) -> BadSample:
        """What is wrong at a line or entry, named by file and place."""
        name = f"{self.path} {place}" if place else str(self.path)
        return BadSample(printable(name), printable(reason))

    def by_image(self) -> list[int]:
        """The rows with the captions of an image together, images in their order, problems last."""
        last = len(self.images)
        keys = [last if number == BAD else number for number in self.numbers]
        return sorted(range(len(keys)), key=keys.__getitem__)

    # What the forms below fill it with.

    def bad(self, where: str, reason: str) -> None:
        """Adds a problem."""
        self._add(printable(where), BAD, printable(reason))

    def _add(self, where: str, image: int, text: str) -> None:
        self.places.append(where)
        self.numbers.append(image)
        self.texts.append(text)

    def image(
        self,
        where: str,
        name: Any,
        id: ImageId | None = None,
        *,
        slice: FileSlice | None = None,
        again: bool = False,
    ) -> int | None:
        """Adds an image and returns its number; None and a problem where the name is none.

        Args:
            again: whether the same name means the same image, as in forms of a line per caption.
        """
        number = self._by_name.get(file_key(name)) if again and isinstance(name, str) else None
        if number is not None:
            return number
        reason = _name_problem(name)
        if reason:
            self.bad(where, reason)
            return None
        number = self._by_name[file_key(name)] = len(self.images)
        self.images.append(NamedImage(where, name, id, slice))
        self.tried.append(0)
        return number

    def caption(self, where: str, image: int, text: Any) -> None:
        """Adds a caption, or the problem that it is none."""
        self.tried[image] = 1
        # The usual caption costs one test: plain ASCII, neither blank nor with a NUL.
        if type(text) is str and text.isascii() and "\0" not in text and text.strip():
            self.places.append(where)
            self.numbers.append(image)
            self.texts.append(text)
            return
        reason = _caption_problem(text)
        if reason:
            self.bad(where, reason)
        else:
            self._add(where, image, text)

    def captions_of(self, where: str, image: int | None, texts: Iterable[Any]) -> None:
        """Adds the captions of an entry, if its image could be added."""
        if image is not None:
            for text in texts:
                self.caption(where, image, text)


def file_key(name: str) -> str:
    """The same text for names of the same file, such as a.png, ./a.png and b/../a.png.

    >>> file_key("./a.png")
    'a.png'
    """
    if name[:1] == "." or "/." in name or "//" in name:  # few names are spelled in several ways
        return name if is_address(name) else posixpath.normpath(name)
    return name


def _name_problem(name: Any) -> str | None:
    if name is None or name == "":
        return "no image is named; write its name"
    reason = text_problem(name)
    if reason:
        return f"the image's name {reason}"
    if not name.strip():
        return "no image is named; write its name"
    if "\\" in name:
        slashes = name.replace("\\", "/")
        return f"the image's name {name} has backslashes, as Windows has; write {slashes}"
    return None


def _caption_problem(text: Any) -> str | None:
    reason = text_problem(text)
    if reason:
        return f"the caption {reason}"
    return None if text.strip() else "the caption is empty; write it or remove it"


# Reading


def read(
    path: Path, form: str = "auto", *, split: str = "test", images: Path | None = None
) -> CaptionFile:
    """Reads a file of captions with everything that is wrong with it.

    Args:
        path: a file of one of FORMS, or a folder of images or tars.
        form: a key of FORMS; "auto" goes by the file's name and content.
        split: which images of a Karpathy file with a `split` field; "train" takes "restval" too.
        images: Karpathy's list of the images that are meant, by COCO's ids in their names, for a
            COCO file that lists more of them, or only their ids.

    Raises:
        DataError: the file is missing or not in this form at all.
    """
    if form != "auto" and form not in FORMS:
        raise DataError(f"{form!r} is no form of captions; known: {', '.join(FORMS)}")
    file = CaptionFile(path, split)
    with _collector_paused():
        chosen = form_of(path) if form == "auto" else form
        if images is not None:
            _coco(file, tree=read_json(path), chosen=images)
        elif chosen in _BY_CONTENT:
            _BY_CONTENT[chosen](file)
        else:
            file.form = chosen
            FORMS[chosen](file)
        _name_bare_images(file)
    return file


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps the garbage collector from walking a large JSON tree again and again while it grows:
    a third of the time of reading COCO's training captions, and nothing in it is a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_whole(
    path: Path, form: str = "auto", *, split: str = "test", images: Path | None = None
) -> CaptionFile:
    """Reads a file of captions that must be free of problems, as `read`.

    Raises:
        DataError: as `read`, or the file has problems; it lists the first ones.
    """
    file = read(path, form, split=split, images=images)
    problems = file.problems
    if problems:
        head = f"{path} has {len(problems):,} problem(s); put them right and start again"
        raise DataError("\n".join([head, *problem_lines(problems)]))
    return file


def _name_bare_images(file: CaptionFile) -> None:
    """Adds a problem for every image that no caption names, not even a bad one."""
    for image, tried in zip(file.images, file.tried, strict=True):
        if not tried:
            file.bad(image.where, f"{image.name} has no caption; write one or remove the image")


# Forms of one line for every caption

_ENDINGS = "|".join(ending.lstrip(".") for ending in IMAGE_ENDINGS)
_NAME_END = re.compile(rf"\.(?:{_ENDINGS}),", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)(?:#\w+)+", re.DOTALL)
_SPACED = re.compile(rf"(\S+\.(?:{_ENDINGS})(?:#\w+)+)\s+(.*)", re.IGNORECASE)
_PIPED = re.compile(r"([^|,\t]+)\|\s*(?:\d+|\w+_number)\s*\|(.*)")
# A caption in quotes that a CSV writer had to put there: it holds a comma or doubled quotes.
_QUOTED = re.compile(r'[^",]*,\s*"(?=[^\n]*(?:,|""))(?:[^"]|"")*"\s*')
_RECORD_LINES = 50  # most lines of a CSV record, whose quotes may hold line ends

Split = Callable[[str], tuple[str, str] | str]
"""A line to (image, caption), or to what is wrong with it."""


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) without the blank lines that end a file.

    A byte-order mark at the start of a line is left where files were put together.
    """
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        yield number, line.removeprefix("\ufeff")


def _comma(line: str) -> tuple[str, str] | str:
    """`name.jpg,caption`: the name ends at its ending, so a name and a caption may hold commas."""
    name, mark, text = line.partition(".jpg,")
    if mark and "," not in name and ".jpg," not in text:
        return (f"{name}.jpg" if name.strip() else ""), text
    if line.startswith('"'):
        return _quoted_line(line)
    end = _NAME_END.search(line)
    if end is None:
        name, mark, text = line.partition(",")
        return (name, text) if mark else "not `name.jpg,caption`"
    ending, name, text = end[0], line[: end.end() - 1], line[end.end() :]
    if ending.lower() in text.lower():
        return f"not `name.jpg,caption`: `{ending}` stands in it twice; quote the caption"
    return (name if name.strip() != ending[:-1] else ""), text


def _quoted_line(line: str) -> tuple[str, str] | str:
    try:
        name, *rest = next(csv.reader([line], strict=True, skipinitialspace=True))
    except csv.Error as error:
        return f"its quotes are not those of a CSV line ({error})"
    return (name, ",".join(rest)) if rest else "only one column; write `image,caption`"


def _tab(line: str) -> tuple[str, str] | str:
    """`name#0<TAB>caption`, `name#zhb#0<TAB>caption`, or the same with a space after the number."""
    name, tab, text = line.partition("\t")
    if not tab:
        spaced = _SPACED.fullmatch(line)
        if spaced is None:
            return "not `name#0<TAB>caption`"
        name, text = spaced[1], spaced[2]
    numbered = _NUMBERED.fullmatch(name.strip())
    return (numbered[1] if numbered else name), text


def _any_line(line: str) -> tuple[str, str] | str:
    """A line of any of these forms, by the mark that ends the name."""
    tab = line.find("\t")
    if tab >= 0 and _NAME_END.search(line, 0, tab) is None:
        return _tab(line)
    piped = _PIPED.fullmatch(line) if "|" in line else None
    if piped is not None:
        return piped[1], piped[2]
    if "#" in line and _SPACED.fullmatch(line):
        return _tab(line)
    return _comma(line) if "," in line else "neither `image,caption` nor `name#0<TAB>caption`"


def _lines(file: CaptionFile, split: Split) -> None:
    text = read_text(file.path)
    if split is not _tab and _is_csv(file.path, text):
        _csv(file, text)
        return
    for number, line in _numbered_lines(text):
        if number == 1 and _is_header(line):
            continue
        where = f"line {number}"
        if not line.strip():
            file.bad(where, "the line is blank; remove it")
            continue
        found = split(line)
        if isinstance(found, str):
            file.bad(where, found)
            continue
        image = file.image(where, found[0].strip(), again=True)
        if image is not None:
            file.caption(where, image, found[1])


def _is_header(line: str) -> bool:
    """Whether a first line names columns, such as `image,caption`."""
    words = [word.strip().strip('"').lower() for word in re.split(r"[,|\t]", line)]
    return words[0] in _IMAGE_COLUMNS and words[-1] in _TEXT_COLUMNS


# CSV


def _is_csv(path: Path, text: str) -> bool:
    """Whether captions with commas are quoted in this file.

    Published files write `name.jpg,a caption, with commas` without quotes and may hold captions
    that begin and end with one; a CSV writer quotes every caption that holds a comma. The more
    frequent of the two is the file's rule, and its header where it names more than two columns.
    """
    head = text.partition("\n")[0].removeprefix("\ufeff")
    in_name = path.suffix.lower() == ".csv"
    if _is_header(head):
        if head.count(",") > 1:
            return True
    elif in_name and not (_NAME_END.search(head) or head.startswith('"')):
        return True  # no header and no row: `_csv` says what is missing
    if '"' not in text:
        return False
    quoted = bare = 0
    for _, line in _numbered_lines(text):
        if _QUOTED.fullmatch(line):
            quoted += 1
        elif '"' not in line:
            bare += "," in line.partition(",")[2]
    return quoted >= bare if in_name else quoted > bare


def _csv(file: CaptionFile, text: str) -> None:
    """A CSV with a header line that names an image and a caption column, or of these two."""
    records = _records(text)
    _, head = next(records, (1, []))
    names = [name.strip().lower() for name in head] if isinstance(head, list) else []
    if not _is_header(",".join(names[:1] + names[-1:])) and len(names) == 2 and _looks_like(names):
        records, names = _records(text), ["image", "caption"]
    image = next((names.index(n) for n in _IMAGE_COLUMNS if n in names), None)
    caption = next((names.index(n) for n in _TEXT_COLUMNS if n in names), None)
    if image is None or caption is None:
        hint = _separator(text.partition("\n")[0])
        raise DataError(
            f"{file.path}: its first line must name a column `image` and one `caption`{hint}"
        )
    for number, row in records:
        where = f"line {number}"
        if isinstance(row, str):
            file.bad(where, row)
        elif len(row) != len(names):
            columns = f"{len(row)} columns, not {len(names)}"
            file.bad(where, f"{columns}; quote captions with commas")
        else:
            of_row = file.image(where, row[image].strip(), again=True)
            if of_row is not None:
                file.caption(where, of_row, row[caption])


def _separator(line: str) -> str:
    """What to add where a spreadsheet has written something else between the columns than commas.

    >>> _separator("image;caption")
    '; its columns are separated by `;`, save it with commas'
    """
    line = line.removeprefix("\ufeff").strip().lower()
    if line.startswith("sep="):
        return f"; remove the line `{line}`, which only Excel reads"
    for mark in (";", "\t", "|"):
        names = [name.strip().strip('"') for name in line.split(mark)]
        if len(names) > 1 and (names[0] in _IMAGE_COLUMNS or _looks_like(names)):
            shown = "tabs" if mark == "\t" else f"`{mark}`"
            return f"; its columns are separated by {shown}, save it with commas"
    return ""


def _looks_like(names: list[str]) -> bool:
    """Whether a first line without a header is an image and its caption."""
    return names[0].endswith(IMAGE_ENDINGS)


def _records(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, columns or what is wrong) of every CSV record.

    A quote that is never closed costs its own line: `csv` alone would take the rest of the file,
    up to the next quote, for one caption.
    """
    lines = [line for _, line in _numbered_lines(text)]
    start = 0
    while start < len(lines):
        end, record = start + 1, lines[start]
        while record.count('"') % 2 and end < len(lines) and end - start < _RECORD_LINES:
            if _NAME_END.search(lines[end].partition(" ")[0]):
                break  # that is a record of its own
            record, end = f"{record}\n{lines[end]}", end + 1
        number = start + 1
        if record.count('"') % 2:
            yield number, "a quote is opened and not closed; close it, or double it in a text"
            start += 1
            continue
        start = end
        if not record.strip():
            yield number, "the line is blank; remove it"
            continue
        try:
            yield number, next(csv.reader([record], strict=True, skipinitialspace=True))
        except csv.Error as error:
            yield number, f"it is no CSV ({error}); double the quotes inside of quotes"


# JSON


def _any_json(file: CaptionFile) -> None:
    """A `.json` or `.jsonl` file by what it holds: COCO, Karpathy, a list of entries, or lines."""
    text = read_text(file.path)
    whole, named_lines = text.strip(), file.path.suffix.lower() == ".jsonl"
    first, more, _ = whole.partition("\n")
    tree: Any = None
    lines = bool(more) and _is_object(first)
    if not lines:
        try:
            tree = parse_line(whole)
        except ValueError as error:
            if not named_lines or whole[:1] in ("", "<"):
                raise not_json(file.path, whole, error) from None
            lines = True
    if isinstance(tree, dict) and not tree.keys() & {"images", "annotations"}:
        lines = lines or named_lines or "image" in tree
    if lines:
        file.form = "jsonl"
        _json_lines(file, text)
        return
    if isinstance(tree, dict) and "annotations" in tree:
        file.form = "coco"
        _coco(file, tree=tree)
    else:
        file.form = "karpathy"
        _karpathy(file, tree)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_line(line), dict)
    except ValueError:
        return False


def _json_lines(file: CaptionFile, text: str | None = None) -> None:
    given = text is not None
    text = read_text(file.path) if text is None else text
    if text.lstrip().startswith("[") and not given:
        _entries(file, parse_json(file.path, text))
        return
    for number, line in _numbered_lines(text):
        where = f"line {number}"
        if not line.strip():
            file.bad(where, "the line is blank; remove it")
            continue
        try:
            row = parse_line(line)
        except ValueError as error:
            file.bad(where, f"not JSON ({error}); write the line again")
            continue
        _entry(file, where, row)


def _entries(file: CaptionFile, rows: list[Any]) -> None:
    for number, row in enumerate(rows, start=1):
        _entry(file, f"entry {number}", row)


def _entry(file: CaptionFile, where: str, row: Any) -> None:
    """An object with `image` and captions under one of their usual keys: a text or a list."""
    reason = _object_problem(row)
    if reason is None and "image" not in row:
        reason = "no `image`; write the image's path under this key"
    if reason:
        file.bad(where, reason)
    else:
        file.captions_of(where, file.image(where, row["image"], again=True), _texts(row))


def _texts(row: dict[str, Any]) -> list[Any]:
    value: Any = next((row[key] for key in _TEXT_KEYS if key in row), [])
    return value if isinstance(value, list) else [value]


def _object_problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a JSON object is expected, not {json_type(row)}"
    if isinstance(row, RepeatedKeys):
        return f"the key `{row.repeated}` is there twice; remove one"
    return None


# COCO


def _coco(file: CaptionFile, *, tree: Any = None, chosen: Path | None = None) -> None:
    """`images` and `annotations`, in the order of the annotations.

    An id is an integer or a text. Where two images have one id, it is unknown which of them is
    meant, and the captions of both are left out with the problem.
    """
    tree = read_json(file.path) if tree is None else tree
    listed = _list_of(file, tree, "images", needed=chosen is None)
    annotations = _list_of(file, tree, "annotations")
    file.form = "coco"
    coco = _CocoImages(file)
    if chosen is None:
        for number, row in enumerate(listed, start=1):
            coco.add(number, row)
    else:
        coco.choose(chosen, listed)
    numbers, add = coco.numbers, file.caption
    for number, row in enumerate(annotations, start=1):
        if type(row) is not dict:
            reason = _object_problem(row)
            if reason:
                file.bad(f"annotations entry {number}", reason)
                continue
        mark = row.get("id", number)
        where = f"annotation {mark}"
        if type(mark) is not int:
            good = type(mark) is str and text_problem(mark) is None
            where = where if good else f"annotations entry {number}"
        image_id = row.get("image_id")
        if type(image_id) not in (int, str):
            image_id, reason = _image_id(row, "image_id")
            if reason:
                file.bad(where, reason)
                continue
        image = numbers.get(image_id)
        if image is not None:
            if "caption" in row:
                add(where, image, row["caption"])
            else:
                file.tried[image] = 1
                file.bad(where, "no `caption`; write one")
        else:
            coco.miss(where, image_id)
    coco.report()


def _list_of(file: CaptionFile, tree: Any, key: str, needed: bool = True) -> list[Any]:
    what = f"an object is expected, not {json_type(tree)}"
    if isinstance(tree, dict):
        rows = tree.get(key, None if needed else [])
        if isinstance(rows, list) and getattr(tree, "repeated", None) != key:
            return rows
        what = f"`{key}` must be a list, not {json_type(rows)}"
        if key not in tree:
            what = f"key '{key}' missing"
        elif getattr(tree, "repeated", None) == key:
            what = f"key '{key}' is there twice"
    raise DataError(f"{file.path} is not a COCO caption file ({what}); fetch it again")


def _image_id(row: dict[str, Any], key: str) -> tuple[ImageId, str | None]:
    """The id under a key, or why it is none. 7.0, as tables write whole numbers, is 7."""
    if key not in row:
        return 0, f"no `{key}`; write one"
    value = row[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return 0, f"its `{key}` is {json_type(value)}; write an integer or a text"
    if isinstance(value, str) and text_problem(value):
        return 0, f"its `{key}` {text_problem(value)}"
    return value, None


class _CocoImages:
    """The images of a COCO file by id while its annotations are read."""

    def __init__(self, file: CaptionFile) -> None:
        self.file = file
        self.numbers: dict[ImageId, int] = {}
        """id -> number in `file.images`, of those that can be used."""
        self.unusable: dict[ImageId, tuple[str, str]] = {}
        """id -> where and why, of those that cannot."""
        self.others: set[ImageId] = set()
        """Ids that the file lists and nobody chose."""
        self.left_out: Counter[ImageId] = Counter()
        """Captions of unusable images."""
        self.entries: dict[ImageId, tuple[int, Any]] = {}
        """id -> entry and name that had it first."""
        self.files: dict[str, tuple[ImageId, str]] = {}
        """File -> id and name that it had first."""

    def add(self, number: int, row: Any) -> None:
        """Takes an entry of `images`."""
        entry = f"images entry {number}"
        reason = _object_problem(row)
        if reason:
            self.file.bad(entry, reason)
            return
        image_id, reason = _image_id(row, "id")
        if reason:
            self.file.bad(entry, reason)
            return
        name = row.get("file_name") or row.get("image")
        if image_id in self.entries:
            self._repeated(number, image_id, name)
            return
        self.entries[image_id] = number, name
        reason = _name_problem(name) if name else "neither `file_name` nor `image` names it"
        reason = reason or self._same_file(image_id, name)
        if reason:
            self.unusable[image_id] = entry, reason
            return
        added = self.file.image(f"image {image_id}", name, image_id)
        if added is not None:
            self.numbers[image_id] = added

    def _same_file(self, image_id: ImageId, name: str) -> str | None:
        """What is wrong where another id has the file already: each would be a wrong image for
        the captions of the other."""
        first, first_name = self.files.setdefault(file_key(name), (image_id, name))
        if first == image_id and type(first) is type(image_id):
            return None
        also = "" if name == first_name else f" ({first_name})"
        return (
            f"{name} is the file of image {first!r}{also} too; give the captions of image "
            f"{image_id!r} the id {first!r} and remove this entry"
        )

    def _repeated(self, number: int, image_id: ImageId, name: Any) -> None:
        first, first_name = self.entries[image_id]
        reason = (
            f"the id {image_id!r} is there already: entry {first} is {first_name}, entry {number} "
            f"is {name}; give every image an id of its own"
        )
        if name == first_name:
            self.file.bad(f"images entry {number}", reason)  # either is the image
            return
        self.unusable.setdefault(image_id, (f"images entries {first} and {number}", reason))
        used = self.numbers.pop(image_id, None)
        if used is not None:
            self.file.tried[used] = 2  # named by `report`, with its captions

    def choose(self, chosen: Path, listed: list[Any]) -> None:
        """Takes the images of Karpathy's list; `listed` are those that have captions besides."""
        for row in listed:
            if isinstance(row, dict) and not _image_id(row, "id")[1]:
                self.others.add(_image_id(row, "id")[0])
        for where, name in karpathy_names(chosen):
            number = coco_number(name)
            if number is None:
                raise DataError(f"{chosen} {where}: {name} does not end in COCO's number; check it")
            if number in self.numbers:
                raise DataError(f"{chosen} {where}: the number of {name} is there already")
            added = self.file.image(f"image {number}", name, number)
            if added is not None:
                self.numbers[number] = added

    def miss(self, where: str, image_id: ImageId) -> None:
        """Takes a caption whose image is not among `numbers`."""
        if image_id in self.unusable:
            self.left_out[image_id] += 1
        elif image_id not in self.others:
            other: ImageId = int(image_id) if _is_number(image_id) else str(image_id)
            near = f"; the id there is {other!r}, write both alike" if other in self.entries else ""
            self.file.bad(where, f"there is no image {image_id!r} under `images`{near}")

    def report(self) -> None:
        """Adds the problems of images that cannot be used, with the captions that they cost."""
        for image_id, (where, reason) in self.unusable.items():
            count = self.left_out[image_id]
            self.file.bad(where, f"{reason} ({count} caption(s) of it)" if count else reason)


def _is_number(value: ImageId) -> bool:
    return isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit()


def coco_number(name: str) -> int | None:
    """The number that ends a COCO file name, None where there is none.

    >>> coco_number("val2014/COCO_val2014_000000391895.jpg")
    391895
    """
    digits = Path(name).stem.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else None


# Karpathy


def karpathy_names(path: Path) -> list[tuple[str, str]]:
    """(where, name) of every image of Karpathy's list of {image, …}.

    Raises:
        DataError: another form, or entries that name no image; the first ones.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not Karpathy's list of images, but {json_type(rows)}; fetch it")
    problems: list[BadSample] = []
    names: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        where = f"entry {number}"
        reason = _object_problem(row) or _name_problem(row.get("image"))
        if reason:
            problems.append(BadSample(f"{path} {where}", printable(reason)))
        else:
            names.append((where, row["image"]))
    if problems:
        head = (
            f"{path} is not Karpathy's list of images: {len(problems)} problem(s); fetch it again"
        )
        raise DataError("\n".join([head, *problem_lines(problems)]))
    return names


def _karpathy(file: CaptionFile, tree: Any = None) -> None:
    """Karpathy's `dataset_*.json`, or a list of {image, caption} as LAVIS wrote it."""
    tree = read_json(file.path) if tree is None else tree
    if isinstance(tree, list):
        _entries(file, tree)
        return
    images = tree.get("images") if isinstance(tree, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f"{file.path} is neither a COCO caption file (`images` and `annotations`), nor "
            "Karpathy's (`images` with `split` and `sentences`), nor a list of {image, caption}; "
            "write one of these"
        )
    if "annotations" in tree:
        raise DataError(f"{file.path} is a COCO caption file, not Karpathy's; set its form to coco")
    splits = Counter(
        str(row["split"]) for row in images if isinstance(row, dict) and "split" in row
    )
    meant = ("train", "restval") if file.split == "train" else (file.split,)
    if not splits.keys() & {*meant}:
        known = f"it has {', '.join(splits)}" if splits else "its images name no `split`"
        raise DataError(
            printable(f"{file.path} has no split {file.split!r}; {known}; choose another file")
        )
    for number, row in enumerate(images, start=1):
        _sentences(file, f"image {number}", row, meant)


def _sentences(file: CaptionFile, where: str, row: Any, meant: tuple[str, ...]) -> None:
    reason = _object_problem(row)
    if reason is None and "split" not in row:
        reason = f"no `split`; write one, such as {meant[0]!r}"
    if reason is None and row["split"] not in meant:
        return
    folder, name = (row.get("filepath") or "", row.get("filename")) if reason is None else ("", "")
    if reason is None:
        reason = _name_problem(name) or (_name_problem(folder) if folder else None)
    sentences = row.get("sentences") if reason is None else []
    if reason is None and not isinstance(sentences, list):
        reason = f"`sentences` must be a list, not {json_type(sentences)}"
    if reason:
        file.bad(where, reason)
        return
    texts = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
    file.captions_of(where, file.image(where, f"{folder}/{name}" if folder else name), texts)


# Other forms


def _xtd(file: CaptionFile) -> None:
    """`test_1kcaptions_LANGUAGE.txt` with `test_image_names.txt` beside it, line by line."""
    beside = file.path.with_name("test_image_names.txt")
    names = list(_numbered_lines(read_text(beside)))
    texts = list(_numbered_lines(read_text(file.path)))
    if len(names) != len(texts):
        raise DataError(f"{file.path} has {len(texts)} lines and {beside} {len(names)}; fetch both")
    for (number, name), (_, text) in zip(names, texts, strict=True):
        where = f"line {number}"
        file.captions_of(where, file.image(where, name.strip()), [text])


def _folder(file: CaptionFile) -> None:
    """Images below a folder, with captions in a `.txt` of the same name, one a line."""
    entries = sorted(file.path.rglob("*"))
    texts = {entry for entry in entries if entry.suffix.lower() == ".txt"}
    for entry in entries:
        if entry.suffix.lower() not in IMAGE_ENDINGS:
            continue
        name = str(entry.relative_to(file.path))
        image = file.image(name, name)
        beside = entry.with_suffix(".txt")
        if beside in texts and beside.is_file():
            texts.discard(beside)
            lines = list(_numbered_lines(read_text(beside)))
            for number, line in lines if image is not None else ():
                where = f"{beside.relative_to(file.path)} line {number}"
                file.captions_of(where, image, [line])
    for left in sorted(texts):
        if left.stem.lower() not in ("readme", "license"):
            file.bad(str(left.relative_to(file.path)), "there is no image of this name beside it")


def _webdataset(file: CaptionFile) -> None:
    """Tars with an image under each key, and its captions: those of its `.json`, or the lines of
    its `.txt`."""
    for tar in tars.shards(file.path):
        for row in tars.shard_rows(tar):
            where = row["where"]
            if "bad" in row:
                file.bad(where, row["bad"])
                continue
            if len(row["slices"]) != 1:
                file.bad(where, f"a pair has one image, not {len(row['slices'])}")
                continue
            tree, lines = row.get("row"), row.get("caption", "").removeprefix("\ufeff")
            texts = _texts(tree) if isinstance(tree, dict) else []
            slice = FileSlice(*row["slices"][0])
            image = file.image(where, f"{tar.name}/{slice.name}", slice=slice)
            file.captions_of(where, image, texts or lines.splitlines())


FORMS: dict[str, Callable[[CaptionFile], None]] = {
    "flickr": lambda file: _lines(file, _comma),
    "token": lambda file: _lines(file, _tab),
    "coco": _coco,
    "karpathy": _karpathy,
    "xtd": _xtd,
    "csv": lambda file: _csv(file, read_text(file.path)),
    "jsonl": _json_lines,
    "folder": _folder,
    "webdataset": _webdataset,
}
"""How captions are written down: `name.jpg,caption` lines; `name#0<TAB>caption` lines; COCO caption
JSON; Karpathy's JSON; XTD's two texts; CSV with a header; JSONL; images with texts beside; tars
of them."""

_BY_CONTENT: dict[str, Callable[[CaptionFile], None]] = {
    "json": _any_json,
    "lines": lambda file: _lines(file, _any_line),
}
"""What `form_of` leaves to the content."""


def form_of(path: Path) -> str:
    """The form of a file by its name: a key of FORMS, or "json" or "lines", which go by content."""
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        return "json"
    if path.name.startswith("test_1kcaptions"):
        return "xtd"
    return "lines"
