"""Convert a data set to a manifest in messages form.

    python tools/convert_data.py llava_video.json train.jsonl --media-root videos
    python tools/convert_data.py questions.csv train.jsonl --columns path=file answer=label
    python tools/convert_data.py clips/ unlabelled.jsonl --question "What happens?"
    python tools/convert_data.py OWNER/NAME train.jsonl --format hf --split train

IN is JSON or JSON lines (messages, ShareGPT, LLaVA-Video, ms-swift, or columns), a CSV table, a folder of media files,
or a Hugging Face data set. Ids and all other keys are kept; media paths are written relative to OUT. An entry that
cannot be used is listed with its reason in OUT.skipped.jsonl; OUT is then not written, unless --skip-bad leaves those
out. Options of a question are asked with it, and its answer must be one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from omnisieve.data.errors import DataError, described
from omnisieve.data.formats import Columns, Converter, Skipped
from omnisieve.data.manifest import is_manifest
from omnisieve.data.sources import SOURCES, FormatError, read_entries, source_of
from omnisieve.files import NotOursError, replacing, write_text

FOLDER_QUESTION = "Describe what can be seen and heard."
SHOWN = 5


def main(argv: list[str]) -> int:
    """Convert and say what was done; 1 when entries cannot be used and were not to be left out."""
    args = parse(argv)
    try:
        return convert(args)
    except NotOursError as error:
        raise FormatError(str(error)) from error
    except OSError as error:  # what is read has errors of its own
        raise FormatError(f"{args.out} cannot be written: {described(error)}; choose another place") from error


def convert(args: argparse.Namespace) -> int:
    """Convert a data set; see `main`."""
    out: Path = args.out
    source = source_of(args.source) if args.format == "auto" else args.format
    if Path(args.source).resolve() == out.resolve():
        raise FormatError(f"{out} is the input itself; choose another file to write")
    converter = Converter(
        out,
        args.media_root or root_of(args.source, source),
        columns=columns_of(args.columns),
        question=args.question or (FOLDER_QUESTION if source == "folder" else None),
        allow_missing=args.allow_missing,
        sound=args.sound,
    )
    entries = read_entries(args.source, source, split=args.split, subset=args.subset)
    check_replaceable(out)
    skipped: list[Skipped] = []
    count = 0
    # What is not complete leaves the block by an error, and so gets no name.
    with suppress(Incomplete), replacing(out, lambda _: True) as staged:
        with staged.open("w", encoding="utf-8", newline="\n") as file:
            for entry in tqdm(entries, desc="convert", unit="entry"):
                line = converter.convert(entry)
                if isinstance(line, Skipped):
                    skipped.append(line)
                else:
                    file.write(f"{line}\n")
                    count += 1
        complete = count > 0 and (not skipped or args.skip_bad)
        if not complete:
            raise Incomplete
    tell_of_sound(converter)
    tell_of_columns(converter)
    report(out, count, skipped, complete)
    if complete:
        tell_of_answers(converter)
    return 0 if complete else 1


class Incomplete(Exception):
    """Entries cannot be used, and were not to be left out."""


def skipped_of(out: Path) -> Path:
    """Where the entries are listed that are not in a manifest."""
    return out.with_name(f"{out.name}.skipped.jsonl")


def check_replaceable(out: Path) -> None:
    """Refuse to write over files that this program did not write.

    Raises:
        FormatError: names the file.
    """
    if out.exists() and not is_manifest(out):
        raise FormatError(f"{out} is there and is no manifest; choose another file to write, or move it")
    path = skipped_of(out)
    if path.exists() and not is_list_of_skipped(path):
        raise FormatError(f"{path} is there, where unusable entries are listed, and is no such list; move it")


def is_list_of_skipped(path: Path) -> bool:
    """Whether a file is a list of unusable entries by its first line."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline()).keys() == {field.name for field in fields(Skipped)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="file, folder, or name on the hub")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="manifest to write; one that is there is replaced, another file is not"
    )
    parser.add_argument("--format", choices=("auto", *SOURCES), default="auto", help="auto: by folder and suffix")
    parser.add_argument("--media-root", type=Path, help="what media paths are relative to; the folder of IN")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="KEY=NAME",
        help="columns that hold path, question, answer and options",
    )
    parser.add_argument("--question", help="asked where an entry has none, as in a folder")
    parser.add_argument("--split", help="of a Hugging Face data set")
    parser.add_argument("--subset", help="of a Hugging Face data set on the hub, also called its config")
    parser.add_argument(
        "--sound",
        choices=("video", "both"),
        default="video",
        help="where a sound file is as long (within 1 s) as the video's own sound: the video's alone, or both",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used")
    parser.add_argument("--allow-missing", action="store_true", help="take entries whose media files are not there")
    return parser.parse_args(argv)


def root_of(source: str, kind: str) -> Path:
    """What relative media paths of a source are relative to."""
    path = Path(source)
    if path.is_dir():
        return path
    return Path() if kind == "hf" else path.parent


def columns_of(pairs: Sequence[str]) -> Columns:
    """Columns from `key=name`.

    Raises:
        FormatError: a pair is something else.
    """
    known = [field.name for field in fields(Columns)]
    given = dict(pair.partition("=")[::2] for pair in pairs)
    for key, name in given.items():
        if key not in known or not name:
            raise FormatError(f"--columns {key}={name}: write KEY=NAME, where KEY is one of {', '.join(known)}")
    return Columns(**given)


def counted(number: int) -> str:
    """So many entries."""
    return "1 entry" if number == 1 else f"{number} entries"


def having(number: int) -> str:
    """So many entries, and the verb that goes with them."""
    return f"{counted(number)} {'has' if number == 1 else 'have'}"


def tell_of_columns(converter: Converter) -> None:
    """Name once the columns that are not in the manifest."""
    if converter.dropped:
        names = ", ".join(map(repr, sorted(converter.dropped)))
        print(f"left out, because JSON cannot hold what is there: {names}", file=sys.stderr)


def tell_of_answers(converter: Converter) -> None:
    """Say how many entries have no answer, and where there may be one."""
    if not converter.unlabelled:
        return
    print(f"{having(converter.unlabelled)} no answer", file=sys.stderr)
    if converter.like_answers:
        names = ", ".join(map(repr, sorted(converter.like_answers)))
        print(f"is one of these columns the answer: {names}? Name it with --columns answer=NAME", file=sys.stderr)


def tell_of_sound(converter: Converter) -> None:
    """Say once what became of sound files beside videos that have sound themselves."""
    if converter.doubled:
        print(
            f"{having(converter.doubled)} a video with sound and, beside it, a sound file of the same length: it "
            "would be heard twice. The video's own is kept, the file is left out; --sound both keeps both",
            file=sys.stderr,
        )
    if converter.beside:
        print(
            f"{having(converter.beside)} a video with sound and, beside it, a sound file of another length: both "
            "are kept and heard",
            file=sys.stderr,
        )


def report(out: Path, count: int, skipped: Sequence[Skipped], complete: bool) -> None:
    """Say what was done, and write the list of what was not; an old list does not outlive a run without any."""
    path = skipped_of(out)
    if not skipped:
        path.unlink(missing_ok=True)
        print(f"{out}: {counted(count)}" if complete else f"{out} was not written: there is no entry", file=sys.stderr)
        return
    text = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in skipped)
    # Half a character, which UTF-8 cannot write, stays an escape of JSON.
    write_text(path, text.encode(errors="backslashreplace").decode())
    for entry in skipped[:SHOWN]:
        print(f"{entry.where}: {entry.reason}", file=sys.stderr)
    total = count + len(skipped)
    print(f"{len(skipped)} of {counted(total)} cannot be used; all are listed in {path}", file=sys.stderr)
    cure = "" if count == 0 else "; correct them, or leave them out with --skip-bad"
    print(f"{out}: {counted(count)}" if complete else f"{out} was not written{cure}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DataError as error:
        sys.exit(f"convert_data.py: {error}")
