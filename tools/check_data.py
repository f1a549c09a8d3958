"""Look at every media file and every line of a manifest, and say what is wrong before a run does.

    python tools/check_data.py train.jsonl
    python tools/check_data.py train.jsonl --config recipes/quickstart.yaml --ratio 0.25 --max-tokens 16384
    python tools/check_data.py train.jsonl --decode

Files are probed: packets and the first frame are read; --decode reads them as training would, which also finds damage
inside. With a recipe, tokens per sample are counted before and after its compressor, and samples that it cannot bring
to its ratio are named; no frame is decoded for it.

Writes files.jsonl, samples.jsonl and summary.md into MANIFEST.check, or --report; with a recipe also sizes.jsonl, which
its train.group_by_length can name. A second run looks only at files that are new, changed or broken. Exit status 1:
something is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PretrainedConfig

from omnisieve.backbones import BackboneError, adapter_for
from omnisieve.backbones.families import family_of
from omnisieve.backbones.media import media_loader
from omnisieve.backbones.protocols import protocol_of
from omnisieve.backbones.reference import SHAPES, reference_config
from omnisieve.compressors import Compressor, CompressorError, UnreachableRatioError
from omnisieve.config import ConfigError, MediaSection, TrainConfig, read_config
from omnisieve.data.batch import Sample
from omnisieve.data.check import Files, Row, Sampling, identity_of, note, size_of
from omnisieve.data.dataset import LoadedMedium, MediaLoader
from omnisieve.data.errors import DataError, SampleError, described, shortened
from omnisieve.data.manifest import Manifest, ManifestError, MediaPart, holds
from omnisieve.data.read_ahead import ReadAhead
from omnisieve.data.sizes import write_sizes
from omnisieve.data.tokens import IGNORED, Run
from omnisieve.files import NotOursError, write_text
from omnisieve.layout import Modality, TokenLayout
from omnisieve.training.build import make_compressor
from omnisieve.training.reach import Reach, drawn

FILES, SAMPLES, SIZES, SUMMARY = "files.jsonl", "samples.jsonl", "sizes.jsonl", "summary.md"
KEYS: dict[str, tuple[str, ...]] = {
    FILES: ("path", "kind", "bytes", "changed", "asked", "problem"),
    SAMPLES: ("id", "problem"),
    SIZES: ("manifest", "preprocessing"),
    SUMMARY: (),
}
"""Files of a report, and the keys that the first line of each has at least."""
SHOWN = 5


def main(argv: list[str]) -> int:
    """Check and report; 1 when something is broken."""
    args = parse(argv)
    manifest = Manifest(args.manifest)
    folder: Path = args.report or args.manifest.with_name(f"{args.manifest.name}.check")
    make_folder(folder)
    media, loader = MediaSection(), None
    if args.config is not None:
        config = read_config(TrainConfig, args.config, args.overrides)
        media = config.data
        loader, compressors = token_counter(config, args.ratio)
    parts, lines = read_lines(manifest)
    # Without a recipe, files are looked at as for the released models.
    sampled = loader or protocol_of(media, reference_config(SHAPES[0]))
    sampling = Sampling(sampled, media.audio.max_seconds, media.decode_seconds)
    files = check_files(Files(parts, sampling, loader, decode=args.decode), folder / FILES, args.workers)
    samples = list(lines)
    if loader is not None:
        sizes = {part: size_of(row) for part, row in zip(parts, files, strict=True)}
        counter = Samples(manifest, loader, compressors, sizes, args.max_tokens or config.data.max_tokens)
        samples = list(tqdm(ahead(counter, args.workers), total=len(counter), desc="samples", unit="sample"))
        write_sizes(folder / SIZES, args.manifest, loader.preprocessing(""), map(sizes_of, samples))
    write_rows(folder / SAMPLES, samples)
    text = summary(args.manifest, files, samples)
    write_text(folder / SUMMARY, text, is_report)
    print(text)
    return int(any(row["problem"] for row in (*files, *samples)))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="JSON lines in messages form")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for example data.fps=1")
    parser.add_argument("--config", help="recipe of training: counts tokens for its model and compressor")
    parser.add_argument("--ratio", type=float, help="retained ratio; the recipe's")
    parser.add_argument(
        "--max-tokens", type=int, help="count samples that are longer, before compression; the recipe's"
    )
    parser.add_argument("--decode", action="store_true", help="decode every file as training would; takes far longer")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes")
    parser.add_argument("--report", type=Path, help="folder of the report; MANIFEST.check")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and (args.ratio or args.max_tokens or args.overrides):
        parser.error("tokens depend on a model: --ratio, --max-tokens and overrides need --config")
    return args


def token_counter(config: TrainConfig, ratio: float | None) -> tuple[MediaLoader, list[Compressor]]:
    """What turns files into counts for a recipe's model, whose weights are not needed.

    Of the compressors the first counts what stays; the others are at the ends of the range that training draws from.

    Raises:
        BackboneError: its folder holds no supported model.
    """
    try:
        family = family_of(str(PretrainedConfig.get_config_dict(config.model.path)[0].get("model_type")))
    except OSError as error:
        raise BackboneError(f"model.path {config.model.path}: {error}") from error
    if family is None:
        raise BackboneError(f"model.path {config.model.path} is no supported model")
    with torch.device("meta"):
        adapter = adapter_for(family.thinker(family.thinker.config_class.from_pretrained(config.model.path)))
    compressor = make_compressor(config, adapter.hidden_size)
    loader = media_loader(config.model.path, adapter, config.data, use_cache=False)
    if ratio is not None:
        return loader, [compressor.at(retained_ratio=ratio)]
    return loader, [compressor, *drawn(compressor, config.train.ratio)]


def read_lines(manifest: Manifest) -> tuple[list[MediaPart], list[Row]]:
    """Every medium once, in order; and a row per line, which names the mistake in it if there is one."""
    parts: dict[MediaPart, None] = {}
    rows = []
    for index in tqdm(range(len(manifest)), desc="lines", unit="line"):
        try:
            conversation = manifest[index]
        except ManifestError as error:
            rows.append({"id": None, "problem": note("manifest", str(error), "correct it")})
            continue
        parts.update(dict.fromkeys(conversation.media))
        mark = conversation.mark()
        problem = None if mark is None else problem_of(conversation.text_error(holds(mark)))
        rows.append({"id": conversation.id, "problem": problem})
    return list(parts), rows


def check_files(files: Files, path: Path, workers: int) -> list[Row]:
    """A row per file; those of an earlier run that still hold are taken from its report."""
    known = {identity_of(row): row for row in read_rows(path) if not row["problem"]}
    write_rows(path, list(known.values()))  # without a line that was cut short
    rows = [known.get(identity_of(files.identity(index))) for index in range(len(files))]
    missing = [index for index, row in enumerate(rows) if row is None]
    todo = files.choose(missing)
    bar = tqdm(total=len(files), initial=len(files) - len(missing), desc="files", unit="file")
    # Written as they come, so that a run that is cut short need not begin again.
    with path.open("a", encoding="utf-8") as report, bar:
        for index, row in zip(missing, ahead(todo, workers), strict=True):
            report.write(json.dumps(row, ensure_ascii=False) + "\n")
            report.flush()
            rows[index] = row
            bar.update()
    complete = [row for row in rows if row is not None]
    write_rows(path, complete)
    return complete


# Samples.


class Samples(Dataset[Row]):
    """Counts the tokens of samples, in worker processes."""

    def __init__(
        self,
        manifest: Manifest,
        loader: MediaLoader,
        compressors: Sequence[Compressor],
        sizes: Mapping[MediaPart, Run | None],
        max_tokens: int | None,
    ) -> None:
        self.manifest, self.loader, self.compressor = manifest, loader, compressors[0]
        self.reach = Reach(compressors[1:] or compressors, loader.preprocessor.rules.ids_per_chunk)
        self.sizes, self.max_tokens = sizes, max_tokens

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Row:
        row: Row = {"id": None, "problem": None, "notes": []}
        try:
            conversation = self.manifest[index]
            row["id"] = conversation.id
            sizes = [self.sizes[part] for part in conversation.media]
            broken = [str(part.path) for part, size in zip(conversation.media, sizes, strict=True) if size is None]
            if broken:
                row["notes"] = [note("replaced", f"{broken[0]} is broken", "training puts another sample in its place")]
                return row
            sample = self.loader.sample(conversation, [LoadedMedium(s) for s in sizes if s is not None])
            row |= self.count(sample)
            self.reach(conversation, sample)
            return row
        except SampleError as error:
            return row | {"problem": problem_of(error)}
        except DataError as error:
            return row | {"problem": note("manifest", str(error), "correct it")}

    def count(self, sample: Sample) -> Row:
        """Tokens before and after compression, and what is unusual about them."""
        counts = Counter(Modality(m).name.lower() for m in sample.tokens.modality.tolist())
        row: Row = {"tokens": len(sample.input_ids), **{f"{name}_tokens": n for name, n in sorted(counts.items())}}
        notes = []
        if (sample.labels == IGNORED).all():
            notes.append(note("unlabelled", "there is no answer", "none, if no labels are needed"))
        if self.max_tokens is not None and len(sample.input_ids) > self.max_tokens:
            text = f"{len(sample.input_ids)} tokens, above {self.max_tokens}"
            notes.append(note("too_long", text, "lower fps, max_frames or max_pixels, or cut the clip"))
        with suppress(UnreachableRatioError):  # which `reach` says, where training asks for it
            row["tokens_after"] = self.after(sample)
        return row | {"notes": notes}

    def after(self, sample: Sample) -> int:
        """Tokens that stay."""
        rules = self.loader.preprocessor.rules
        layout = TokenLayout.stack([sample.tokens], ids_per_window=rules.ids_per_chunk)
        budget = self.compressor.budget(layout)
        media = sum(int(layout.counts(m)[0]) for m in (Modality.VIDEO, Modality.AUDIO))
        return len(sample.input_ids) - media + int(budget.total[0])


def problem_of(error: SampleError) -> Row:
    """Why a sample cannot be used."""
    return note(error.kind, error.reason, error.cure)


def sizes_of(row: Row) -> list[int] | None:
    """Tokens of a sample: text and images, video, audio; None if it is broken."""
    if row["problem"] is not None or "tokens" not in row:
        return None
    video, audio = (row.get(f"{name}_tokens", 0) for name in ("video", "audio"))
    return [row["tokens"] - video - audio, video, audio]


# Reports.


def ahead(rows: Dataset[Row], workers: int) -> Iterable[Row]:
    """Rows in order, from worker processes."""
    return ReadAhead(rows, num_workers=workers)


def make_folder(folder: Path) -> None:
    """Make the folder of a report, or take the one that is there.

    Raises:
        DataError: it cannot be written, or holds a file of another's that has the name of one that is to be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = [folder / name for name in KEYS if os.path.lexists(folder / name)]
    except OSError as error:
        cure = "choose another folder with --report"
        raise DataError(f"{folder}: no report can be written there ({described(error)}); {cure}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{folder} cannot be written; choose another folder with --report")
    if foreign := [path for path in found if not is_report(path)]:
        raise DataError(f"{foreign[0]} is there and is no report of this program; move it, or name another --report")


def is_report(path: Path) -> bool:
    """Whether a file was written by this program, by its beginning."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
            if path.name == SUMMARY:
                return (
                    first.startswith("# ") and re.match(r"\n\d+ samples, \d+ media files, ", file.read(80)) is not None
                )
    except (OSError, UnicodeDecodeError):
        return False
    # A run that was killed may leave an empty file, or less than one line.
    cut_short = not first.endswith(("\n", "}")) and first[:9] == '{"path": '[: len(first)]
    return cut_short or is_row(first, KEYS[path.name])


def is_row(line: str, keys: Collection[str]) -> bool:
    """Whether a line is a JSON object with such keys."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() >= set(keys)


def read_rows(path: Path) -> list[Row]:
    """Rows about files of an earlier report; lines that a killed run cut short are passed over."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [json.loads(line) for line in file if is_row(line, KEYS[FILES])]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a file, all or none."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), is_report)


def summary(manifest: Path, files: Sequence[Row], samples: Sequence[Row]) -> str:
    """The report in short, as Markdown."""
    seconds = sum((row.get("video") or row.get("audio") or {}).get("seconds", 0.0) for row in files)
    broken = [row for row in (*files, *samples) if row["problem"]]
    lines = [
        f"# {manifest}",
        "",
        f"{len(samples)} samples, {len(files)} media files, {seconds / 3600:.2f} hours; {len(broken)} broken.",
    ]
    lines += table("Broken", [(row, row["problem"]) for row in broken])
    lines += table("To know", [(row, found) for row in (*files, *samples) for found in row.get("notes", ())])
    counted = {name: [row[name] for row in samples if name in row] for name in ("tokens", "tokens_after")}
    if counted["tokens"]:
        lines += ["", "| tokens per sample | median | 95 % below | most |", "|---|---|---|---|"]
        for label, values in zip(("before compression", "after"), counted.values(), strict=True):
            if values:
                median, high = np.percentile(values, [50, 95])
                lines.append(f"| {label} | {median:.0f} | {high:.0f} | {max(values)} |")
    return "\n".join(lines) + "\n"


def name_of(row: Row) -> str:
    """What the summary calls a file or a sample."""
    return shortened(row.get("path") or row["id"] or "line")


def table(title: str, found: Sequence[tuple[Row, Row]]) -> list[str]:
    """Remarks by kind, with a few examples each."""
    if not found:
        return []
    lines = ["", f"| {title} | count | for example | what to do |", "|---|---|---|---|"]
    for kind, count in Counter(remark["kind"] for _, remark in found).most_common():
        these = [(row, remark) for row, remark in found if remark["kind"] == kind]
        examples = "; ".join(f"{name_of(row)}: {remark['reason']}" for row, remark in these[:SHOWN])
        actions = "; ".join(dict.fromkeys(remark["action"] for _, remark in these))
        lines.append(f"| {kind} | {count} | {examples} | {actions} |")
    return lines


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BackboneError, CompressorError, ConfigError, DataError, NotOursError) as error:
        sys.exit(f"check_data.py: {error}")
