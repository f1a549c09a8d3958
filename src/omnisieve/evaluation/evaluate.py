"""An evaluation from its configuration to its report."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from omnisieve import __version__
from omnisieve.backbones import BackboneError, adapter_for, load_backbone
from omnisieve.backbones.loading import hidden_size_of
from omnisieve.backbones.media import check_media, load_processor, media_loader
from omnisieve.backbones.protocols import protocol_of
from omnisieve.compressors import CompressorError
from omnisieve.config import ConfigError, EvalConfig
from omnisieve.data.errors import DataError
from omnisieve.data.manifest import Manifest
from omnisieve.data.protocol import Protocol
from omnisieve.evaluation.benchmarks import Benchmark, ManifestBenchmark, with_questions
from omnisieve.evaluation.methods import Method, check_methods, resolve_methods
from omnisieve.evaluation.report import Cell, EvaluationError, make_report
from omnisieve.evaluation.runner import Evaluation, Results

USER_ERRORS = (ConfigError, BackboneError, CompressorError, DataError, EvaluationError)
"""What a user can cure; their messages need no traceback."""


def evaluate(config: EvalConfig) -> tuple[dict[str, Any], list[Cell]]:
    """Load the model, ask every question under every method and ratio, and make the report.

    Returns:
        the content of `report.json`, and what it was made from.

    Raises:
        BackboneError, CompressorError, DataError: what the configuration names is not there or does not fit.
    """
    methods = resolve_methods(config.entries, config.settings, config.plugins)
    check_methods(methods, config.ratios, hidden_size_of(config.model.path))
    model, benchmark = open_benchmark(config)
    protocol = protocol_of(config.data, adapter_for(model).thinker.config, load_processor(config.model.path))
    results = run(config, model, benchmark, methods)
    report = make_report(
        results.cells,
        environment(config, protocol, results, str(model.device)),
        methods={method.label: _describe(method, config) for method in methods},
        failures=results.failures,
        decoder=results.decoder,
        samples=config.bootstrap,
        seed=config.seed,
    )
    return report, results.cells


def open_benchmark(config: EvalConfig) -> tuple[Any, ManifestBenchmark]:
    """The model, on the accelerator where there is one, and the manifest's clips read as it wants them.

    Raises:
        BackboneError, DataError: what the configuration names is not there or does not fit.
    """
    # Before the model is loaded: what is missing should show at once.
    tell(f"checking {config.model.path} and {config.manifest}")
    check_media(config.model.path, config.data)
    manifest = Manifest(config.manifest)
    for remark in manifest.check(config.limit):
        tell(remark)
    clips = with_questions(config.benchmark, manifest[: config.limit])
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    tell(f"loading {config.model.path} in {config.model.dtype}, for {len(clips)} clips")
    model = load_backbone(
        config.model.path,
        config.model.dtype,
        config.model.attn_implementation,
        device,
        config.model.encoder_attn_implementation,
    )
    loader = media_loader(config.model.path, adapter_for(model), config.data)
    return model, ManifestBenchmark(config.benchmark, clips, loader, questions_per_clip=config.questions_per_clip)


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def run(config: EvalConfig, model: Any, benchmark: Benchmark, methods: Sequence[Method]) -> Results:
    """Ask every question of `benchmark` under `methods`."""
    evaluation = Evaluation(
        model,
        benchmark,
        methods,
        config.ratios,
        clips_per_batch=config.batch_size,
        tokens_per_forward=config.tokens_per_forward,
        max_new_tokens=config.max_new_tokens,
        workers=config.data.workers,
    )
    return evaluation.run()


def environment(config: EvalConfig, protocol: Protocol, results: Results, device: str) -> dict[str, Any]:
    """What a reader must know to repeat the numbers."""
    return {
        "omnisieve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{device}, {torch.get_num_threads()} threads",
        "model": config.model.path,
        "dtype": config.model.dtype,
        "attn_implementation": config.model.attn_implementation,
        "encoder_attn_implementation": config.model.encoder_attn_implementation,
        "manifest": config.manifest,
        "protocol": {
            **asdict(protocol),
            "audio_seconds": config.data.audio.max_seconds,
            "sound": "the mean of all channels",
            "prompt": "the manifest's question alone, media first, by the model's chat template",
            "decoding": f"greedy, at most {config.max_new_tokens} new tokens",
            "right": "equal to the manifest's answer up to case, punctuation, articles and spacing",
            "interval": f"95 %, {config.bootstrap} bootstrap draws of whole clips, seed {config.seed}",
        },
        **results.guards,
        "seconds": {name: round(seconds, 2) for name, seconds in results.seconds.items()},
    }


def _describe(method: Method, config: EvalConfig) -> dict[str, Any]:
    described = {
        "method": method.name,
        "kind": method.kind,
        "settings": dict(method.settings),
        "at": dict(method.at),
        "llm": config.model.path if method.llm is None else f"{config.model.path} with the adapters of {method.llm}",
    }
    if method.preset is not None:
        described["preset"] = method.preset.name
    return described | ({"folder": str(Path(method.folder))} if method.folder is not None else {})
