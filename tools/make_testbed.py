"""Writes the synthetic testbed: `OUT/videos/*.mp4` and one JSONL manifest per split.

    python tools/make_testbed.py OUT [--domain a] [--splits train=480,val=48,test=104] [--workers 2]
    python tools/make_testbed.py --check      # compare world and backbone with the committed hashes

The same arguments give the same manifests, frames and waveforms everywhere; the bytes of the mp4 files depend on
the codec build, so hashes are taken before encoding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from omnisieve.data.manifest import is_manifest
from omnisieve.data.synthetic import DOMAINS, make_clip, manifest_text, world_hash, write_clip
from omnisieve.files import write_text

HASHES = Path(__file__).resolve().parent.parent / "data" / "testbed" / "manifest_hashes.json"
SIZES = {"train": 480, "val": 48, "test": 104}


def main() -> None:
    """Parse the command line and write, check or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder to write to (made when missing)")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="a")
    parser.add_argument("--splits", type=parse_sizes, default=SIZES, help="clips per split, e.g. train=480,val=48")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and encode clips")
    parser.add_argument("--check", action="store_true", help="only compare the world with the committed hashes")
    parser.add_argument("--record", action="store_true", help="only rewrite the committed hashes")
    args = parser.parse_args()
    if args.record:
        HASHES.write_text(json.dumps(compute_hashes(), indent=2) + "\n")
    elif args.check:
        check_hashes()
    elif args.out is None:
        parser.error("name a folder to write to, or give --check")
    else:
        make_testbed(args.out, args.domain, args.splits, args.workers)


def parse_sizes(text: str) -> dict[str, int]:
    """Parse `train=480,val=48` into a dictionary."""
    try:
        sizes = {name: int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=COUNT,NAME=COUNT, got {text!r}") from error
    if empty := [name for name, count in sizes.items() if count < 1]:
        raise argparse.ArgumentTypeError(f"{empty[0]} needs at least one clip; leave it out to write the others only")
    if unknown := set(sizes) - set(SIZES):
        raise argparse.ArgumentTypeError(f"unknown split {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    return sizes


def make_testbed(out: Path, domain: str, sizes: dict[str, int], workers: int) -> None:
    """Write all clips and manifests below `out`; manifests last, so that a complete one means complete videos."""
    for path in (out / f"{split}.jsonl" for split in sizes):
        if path.exists() and not is_manifest(path):
            sys.exit(f"make_testbed.py: {path} is there and is no manifest; choose another folder")
    videos = out / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    jobs = [(domain, split, index, str(videos)) for split, n in sizes.items() for index in range(n)]
    with ProcessPoolExecutor(workers) as pool:
        for _ in tqdm(pool.map(write_clip, jobs, chunksize=4), total=len(jobs), desc="clips", unit="clip"):
            pass
    for split, n in sizes.items():
        write_text(out / f"{split}.jsonl", manifest_text(domain, split, n))


def compute_hashes() -> dict[str, dict[str, str]]:
    """Return SHA-256 of the manifests at their default sizes, a few clips' frames and waveforms, and the backbone."""
    hashes: dict[str, dict[str, str]] = {"manifests": {}, "worlds": {}, "backbone": {}}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (HASHES.parent / "backbone" / name).read_bytes()
        hashes["backbone"][name] = hashlib.sha256(content).hexdigest()
    for domain in sorted(DOMAINS):
        for split, n in SIZES.items():
            text = manifest_text(domain, split, n)
            hashes["manifests"][f"{domain}/{split}={n}"] = hashlib.sha256(text.encode()).hexdigest()
            hashes["worlds"][f"{domain}/{split}[0:2]"] = world_hash([make_clip(domain, split, i) for i in range(2)])
    return hashes


def check_hashes() -> None:
    """Exit with an error that names every manifest or clip that differs from the committed hashes."""
    recorded, computed = json.loads(HASHES.read_text()), compute_hashes()
    wrong = [
        f"{kind} {name}"
        for kind in recorded
        for name in recorded[kind]
        if computed[kind].get(name) != recorded[kind][name]
    ]
    if wrong:
        sys.exit(f"the testbed differs from {HASHES}: {', '.join(wrong)}")
    print(f"{sum(len(part) for part in recorded.values())} hashes match {HASHES.name}")


if __name__ == "__main__":
    main()
